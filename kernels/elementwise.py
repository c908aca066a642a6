"""Functions of numbers that printed cells have beside those of cell.py."""

import triton
import triton.language as tl

from .cell import exp


@triton.jit
def log1p(x):
    # The rounding of 1 + x is divided out again: Kahan, as in Goldberg 1991, theorem 4.
    u = 1.0 + x
    d = u - 1.0
    same = (d == 0.0) | (d == float("inf"))
    return tl.where(same, x, tl.log(u) * (x / tl.where(same, 1.0, d)))


@triton.jit
def expm1(x):
    # Likewise; where exp(x) is below eps / 2 it is -1.
    u = exp(x)
    d = u - 1.0
    found = d * (x / tl.where((u == 1.0) | (u == 0.0), 1.0, tl.log(u)))
    return tl.where(u == 1.0, x, tl.where((d == -1.0) | (u > 1e30), d, found))


@triton.jit
def log_sigmoid(x):
    return minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)  # as torch's


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
