"""A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels."""

from . import flops, functional
from .call import States
from .kernels.plan import Plan
from .kernels.tiles import Tiles
from .lstm import LSTM, LSTMCell
from .swap import swap
from .trace import Trace, trace
from .tuning import Tuned, tune

flops.register()
lstm = functional.lstm  # the import of .lstm has bound the module to this name

__all__ = ["LSTM", "LSTMCell", "Plan", "States", "Tiles", "Trace", "Tuned", "lstm", "swap", "trace", "tune"]
__version__ = "0.1.0"
