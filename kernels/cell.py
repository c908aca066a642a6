"""The LSTM cell on registers, forward and backward: its equations stand here and nowhere else in the kernels.

The numbers in the comments are those of kernels/README.md. All tiles of a call have one shape.
"""

import triton
import triton.language as tl

from .gates import Gates


@triton.jit
def exp(x):
    # tl.exp takes three instructions more, to give denormal results, too.
    return tl.exp2(1.4426950408889634 * x)


@triton.jit
def tanh(x):
    # Near 0 the quotient would cancel: the odd series keeps the relative accuracy there (its next term is below 1e-8 of
    # x for |x| < 0.25).
    e = exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    y = tl.where(x < 0.0, -y, y)
    if x.dtype == tl.float64:
        return y
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, y)


@triton.jit
def sigmoid(x):
    # Below 0 the quotient is exact to rounding; above, 1 minus that of -x is. 1 / (1 + exp(-x)) would round f near 1
    # downwards, and a cell that remembers for thousands of steps sums that up.
    e = exp(-tl.abs(x))
    y = e / (1.0 + e)
    return tl.where(x > 0.0, 1.0 - y, y)


@triton.jit
def cell_forward(pre, c_prev):
    """Pre-activations and c_{t-1} to the activated gates, c_t and h_t."""
    i = sigmoid(pre.i)  # (2)
    f = sigmoid(pre.f)
    g = tanh(pre.g)
    o = sigmoid(pre.o)
    c = f * c_prev + i * g  # (3)
    h = o * tanh(c)  # (4)
    return Gates(i, f, g, o), c, h


@triton.jit
def cell_backward(gates, c_prev, c, dh, dc):
    """Saved gates and cells, dL/dh_t and the dL/dc_t that came from t+1, to dgates_t and the dL/dc_{t-1} it leaves."""
    i, f, g, o = gates
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)  # (6)
    di = dc * g * i * (1.0 - i)  # (7)
    df = dc * c_prev * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    return Gates(di, df, dg, do), dc * f  # (8)
