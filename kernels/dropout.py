"""Dropout between the layers of a stack: masks from a counter, the same again in backward, of which none is stored."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, on_device
from .layout import DENSE, Layout
from .tiles import ceil_div

BLOCK = 512  # elements of (B, H) of a program, four a thread


@triton.jit
def drop(x, seed, keep_prob, layer, t, offsets):
    """x / keep_prob where the unit is kept and 0 elsewhere: of Philox with the counter (offset in (B, H), t, layer, 0)
    the first number decides, so that a mask does not depend on how a launch is cut or where its rows lie."""
    offset = offsets.to(tl.uint32)
    zero = offset * 0
    number, _, _, _ = tl.philox(tl.load(seed), offset, zero + t.to(tl.uint32), zero + layer.to(tl.uint32), zero)
    share = tl.load(keep_prob)
    return tl.where(tl.uint_to_uniform_float(number) < share, x.to(share.dtype) / share, 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["B", "step_stride", "row_stride", "layer"])
def drop_kernel(
    x,  # (rows, H) in: y of a layer
    lengths,  # (B,) in: steps of each batch row; None: all
    offsets,  # (T,) in: first row of each step; None: not packed
    seed,  # (1,) in
    keep_prob,  # (1,) in: the share of units that is kept
    dropped,  # (rows, H) out: what the layer above takes
    B,
    step_stride,  # rows from a step to the next, if not PACKED
    row_stride,  # rows from a batch row to the next
    layer,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of (B, H) of a program, which has one step
):
    t = tl.program_id(0)
    state_offsets = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = state_offsets // H
    mask = rows < B
    if lengths is not None:
        mask = mask & (t < tl.load(lengths + rows, mask=mask, other=0))
    if offsets is not None:
        step_offset = tl.load(offsets + t)
    else:
        step_offset = t.to(tl.int64) * step_stride
    at = (step_offset + rows * row_stride) * H + state_offsets % H
    tile = tl.load(x + at, mask=mask, other=0.0)
    tl.store(dropped + at, drop(tile, seed, keep_prob, layer, t, state_offsets), mask=mask)


def dropout(x: Tensor, seed: Tensor, keep_prob: Tensor, layer: int, B: int, layout: Layout = DENSE) -> Tensor:
    """What the layer above `layer` of a stack takes of its output.

    Args:
        x: (T, B, H), (B, T, H) if the layout says so, or (rows, H) of a packed sequence, contiguous.
        seed, keep_prob: of the Stack, as `seed` and `keep`. layer: its place in it. B: batch rows.
        layout: as forward.forward takes it.

    Returns:
        As x; zero past a row's length.
    """
    H = x.shape[-1]
    T = layout.steps(x.shape)
    dropped = x.new_zeros(x.shape) if layout.padded else x.new_empty(x.shape)
    if B > 0:
        with on_device(x.device):
            args = x, layout.lengths, layout.offsets, seed, keep_prob, dropped, B, *layout.strides(T, B), layer
            drop_kernel[(T, ceil_div(B * H, BLOCK))](*args, H, BLOCK=BLOCK, **OPTIONS)
    return dropped
