"""Records and their flat form, which autograd, the operators and torch.vmap take, are held to each other."""

import pytest
import torch
from torch import Tensor

import fused_lstm
from fused_lstm import chunks, operators, records
from fused_lstm.autograd import Differentiated, Saved, SecondOrder
from fused_lstm.paths import in_graph
from fused_lstm.recurrence import Inputs, Recurrence

RECORDS = list(records.PARTS)
OPERATORS = [operators.forward, operators.backward, operators.dropout, operators.one_step, in_graph.forward]
OPERATORS += [in_graph.backward, chunks.forward_in_chunks, chunks.backward_in_chunks]


def numbered(cls, count, numbers):
    """A record with a number of its own in every place, and `count` records where it has a tuple of them."""
    parts = []
    for part in records.PARTS[cls]:
        if part.repeated:
            parts.append(tuple(numbered(part.of, count, numbers) for _ in range(count)))
        else:
            parts.append(next(numbers) if part.of is None else numbered(part.of, count, numbers))
    return cls(*parts)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_a_flat_record_is_put_together_again(cls, count):
    record = numbered(cls, count, iter(range(1000)))
    flat = records.flatten(record)
    assert flat == list(range(len(flat)))  # each once, in the order of the fields
    again = records.unflatten(cls, flat)
    assert again == record and type(again) is cls
    for field, part in zip(again, records.PARTS[cls], strict=True):
        assert part.of is None or type(field) is (tuple if part.repeated else part.of)


def test_all_that_flattens_a_record_is_here():
    assert {Inputs, Recurrence, Saved, SecondOrder, Differentiated, *(op.args for op in OPERATORS)} <= set(RECORDS)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.overload.name())
def test_an_operator_takes_the_fields_of_its_record(operator):
    """By their names, which are those of the flat record in its order."""
    names = [argument.name for argument in operator.overload._schema.arguments]
    assert len(names) == len(set(names)) == len(records.flatten(numbered(operator.args, 1, iter(range(100)))))

    def paths(cls, at=()):
        return [leaf for name, part in zip(cls._fields, records.PARTS[cls], strict=True)
                for leaf in ([(*at, name)] if part.of is None else paths(part.of, (*at, name)))]  # fmt: skip

    assert [path[-1] for path in paths(operator.args)] == names


def test_a_record_that_is_saved_comes_back():
    class Context:
        def save_for_backward(self, *tensors: Tensor) -> None:
            self.saved_tensors = tensors

    ctx, tensor = Context(), torch.ones(2)
    records.save_record(ctx, fused_lstm.recurrence.Dropout(tensor, None))
    assert records.saved_record(ctx, fused_lstm.recurrence.Dropout) == (tensor, None)
    assert all(kept is None or isinstance(kept, Tensor) for kept in ctx.saved_tensors)
