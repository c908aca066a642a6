"""A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels."""

from . import cells, flops, functional
from .call import States
from .cells import Cell, cell
from .kernels.plan import Plan
from .kernels.tiles import Tiles
from .lstm import LSTM, LSTMCell
from .quantized import QuantizedLSTM, quantize
from .recurrent import Recurrent
from .session import Session
from .swap import swap
from .trace import CellTrace, Trace, trace
from .tuning import Tuned, tune

flops.register()
lstm = functional.lstm  # the import of .lstm has bound the module to this name

__all__ = ["LSTM", "Cell", "CellTrace", "LSTMCell", "Plan", "QuantizedLSTM", "Recurrent", "Session", "States", "Tiles"]
__all__ += ["Trace", "Tuned", "cell", "cells", "lstm", "quantize", "swap", "trace", "tune"]
__version__ = "0.1.0"
