"""The workloads that are measured, in the order of how much they tell: a deadline cuts off the end."""

from dataclasses import dataclass
from itertools import product

import torch

# fp32 and tf32 differ in cuDNN's switch alone; see measure.precision().
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One workload.

    mode: "forward" (inference, no autograd) or "forward+backward" (gradients of the input and of every parameter).
    T, B, I, H: steps, batch rows, input features, hidden units.
    dtype: a key of DTYPES.
    layers, directions: as num_layers of torch.nn.LSTM, and 2 for bidirectional.
    """

    mode: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    dtype: str
    layers: int = 1
    directions: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the input and of the weights."""
        return DTYPES[self.dtype]

    @property
    def shape(self) -> str:
        """All sizes but B, in words; what goes without saying (I = H, one layer, one direction) is left out."""
        parts = [f"T{self.T}", f"H{self.H}"]
        parts += [f"I{self.I}"] if self.I != self.H else []
        parts += [f"L{self.layers}"] if self.layers > 1 else []
        parts += [f"D{self.directions}"] if self.directions > 1 else []
        return " ".join(parts)


def _square(T: int, H: int, B: int, dtype: str, mode: str) -> Case:
    return Case(mode=mode, T=T, B=B, I=H, H=H, dtype=dtype)


_SHAPES = [
    (512, 16),
    (1024, 16),
    (256, 16),
    (512, 1),
    (512, 64),
    (1024, 64),
    (256, 64),
    (1024, 1),
    (256, 1),
    (128, 16),
    (128, 64),
    (128, 1),
]
GPU = [_square(512, H, B, *rest) for (H, B), *rest in product(_SHAPES, ("bf16", "tf32", "fp16", "fp32"), MODES)]

CPU = [
    *(_square(128, H, B, "fp32", mode) for (H, B), mode in product([(256, 16), (256, 1), (64, 16)], MODES)),
    *(Case(mode, T=64, B=8, I=64, H=128, dtype="fp32", layers=2, directions=2) for mode in MODES),
]

# Small enough for Triton's interpreter.
DRY = [
    Case(mode, T=3, B=B, I=5, H=H, dtype=dtype)
    for (B, H), dtype, mode in product([(2, 7), (1, 20)], ("bf16", "tf32", "fp16", "fp32"), MODES)
]
