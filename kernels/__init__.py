"""The recurrence in Triton: tensors in, tensors out. No module and no autograd is known here."""
