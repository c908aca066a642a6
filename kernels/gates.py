"""The four gates of a unit as one value: loaded, stored, added and split in one place each, for every kernel."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Gates(NamedTuple):
    """Four tiles of one shape: the gates, their pre-activations, or gradients of either."""

    i: Any
    f: Any
    g: Any
    o: Any


@triton.jit
def load_gates(pointers, mask, H: tl.constexpr):
    """The four gates, whose i lies at the pointers; in memory a gate of all H units follows the gate before."""
    i = tl.load(pointers, mask=mask, other=0.0)
    f = tl.load(pointers + H, mask=mask, other=0.0)
    g = tl.load(pointers + 2 * H, mask=mask, other=0.0)
    o = tl.load(pointers + 3 * H, mask=mask, other=0.0)
    return Gates(i, f, g, o)


@triton.jit
def store_gates(pointers, gates, mask, H: tl.constexpr):
    """Stores four gates where load_gates() finds them."""
    tl.store(pointers, gates.i, mask=mask)
    tl.store(pointers + H, gates.f, mask=mask)
    tl.store(pointers + 2 * H, gates.g, mask=mask)
    tl.store(pointers + 3 * H, gates.o, mask=mask)


@triton.jit
def add_gates(a, b):
    return Gates(a.i + b.i, a.f + b.f, a.g + b.g, a.o + b.o)


@triton.jit
def scale_gates(gates, scales):
    """The gates times the scales, or as they are where there are none."""
    if scales is None:
        return gates
    else:
        return Gates(gates.i * scales.i, gates.f * scales.f, gates.g * scales.g, gates.o * scales.o)


@triton.jit
def cast_gates(gates, TYPE: tl.constexpr):
    return Gates(gates.i.to(TYPE), gates.f.to(TYPE), gates.g.to(TYPE), gates.o.to(TYPE))


@triton.jit
def select_gates(mask, gates):
    """The gates where the mask is set, and zero elsewhere."""
    i, f = tl.where(mask, gates.i, 0.0), tl.where(mask, gates.f, 0.0)
    g, o = tl.where(mask, gates.g, 0.0), tl.where(mask, gates.o, 0.0)
    return Gates(i, f, g, o)


@triton.jit
def split_gates(x, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(4 * UNITS, ROWS) with the four gates of a unit side by side, to four tiles (UNITS, ROWS)."""
    return four(tl.permute(tl.reshape(x, (UNITS, 2, 2, ROWS)), (0, 3, 1, 2)))


@triton.jit
def four(x):
    """The gates of x, whose last two dimensions are 2 and 2."""
    ig, fo = tl.split(x)
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return Gates(i, f, g, o)
