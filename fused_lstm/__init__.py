"""A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels."""

from . import functional
from .functional import States
from .kernels.plan import Plan, Tiles
from .lstm import LSTM, LSTMCell, swap

lstm = functional.lstm  # the import of .lstm has bound the module to this name

__all__ = ["LSTM", "LSTMCell", "Plan", "States", "Tiles", "lstm", "swap"]
__version__ = "0.1.0"
