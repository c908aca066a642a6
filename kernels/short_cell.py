"""The equations of cell.py in fewer instructions, as exact as products of 16 bits or TF32 are.

tanh has an error of 2^-11, as a number rounded to float16 has. The forget gate has none like it: c is multiplied
by it at every step, and the errors would add up.
"""

import triton
import triton.language as tl

from .gates import Gates
from .matmul import INTERPRETED


@triton.jit
def sigmoid(x):
    # 1 / (1 + exp(-x)) as the square of a root, which is one instruction; a division is eight.
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def tanh(x):
    if INTERPRETED:  # which has no inline assembly
        return 2.0 * sigmoid(2.0 * x) - 1.0
    else:  # one instruction; PTX gives its largest relative error as 2^-11
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def short_cell_forward(pre, c_prev):
    """As cell_forward()."""
    i = sigmoid(pre.i)  # (2)
    f = 1.0 - sigmoid(-pre.f)  # to rounding near 1, where a cell remembers for thousands of steps
    g = tanh(pre.g)
    o = sigmoid(pre.o)
    c = f * c_prev + i * g  # (3)
    h = o * tanh(c)  # (4)
    return Gates(i, f, g, o), c, h


@triton.jit
def short_cell_backward(gates, c_prev, c, dh, dc):
    """As cell_backward()."""
    i, f, g, o = gates
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)  # (6)
    di = dc * g * i * (1.0 - i)  # (7)
    df = dc * c_prev * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    return Gates(di, df, dg, do), dc * f  # (8)
