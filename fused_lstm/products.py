"""torch's own matrix products around the kernels, parallel over time: their precision, and the type of their sums."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .kernels.layout import accumulator


class Fp32Precision:
    """Within it torch's float32 matrix products on CUDA have a precision, "ieee" or "tf32"."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = self.precision

    def __exit__(self, *error: Any) -> None:
        torch.backends.cuda.matmul.fp32_precision = self.before


UNCHANGED: Any = nullcontext()


def matmul_precision(like: Tensor, ieee: bool) -> AbstractContextManager[None]:
    """Holds torch's float32 matrix products on CUDA to the precision that cuDNN's own switch asks of nn.LSTM.

    A compiled graph cannot change a global switch: there they follow torch's own, as the rest of the graph does.
    """
    if not like.is_cuda or like.dtype != torch.float32 or torch.compiler.is_compiling():
        return UNCHANGED
    return Fp32Precision("ieee" if ieee else "tf32")


def matmul_tn(a: Tensor, b: Tensor, total: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """total + a^T b; accumulate: in the accumulator's dtype."""
    if accumulate and a.dtype != accumulator(a.dtype):
        product = torch.mm(a.T, b, out_dtype=torch.float32) if a.is_cuda else a.T.float() @ b.float()
        return product if total is None else product + total
    return a.T @ b if total is None else torch.addmm(total, a.T, b)
