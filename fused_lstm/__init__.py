"""A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels."""

from .kernels.plan import Plan, Tiles
from .lstm import LSTM, swap

__all__ = ["LSTM", "Plan", "Tiles", "swap"]
__version__ = "0.1.0"
