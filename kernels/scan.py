"""The cells and gates of a forward pass whose pre-activations are known: one scan over time, element by element."""

import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_forward
from .gates import cast_gates, load_gates, store_gates
from .launch import OPTIONS, on_device
from .layout import DENSE, Layout, LayoutTensors
from .tiles import ceil_div

BLOCK = 64  # units of a program, two a thread of its one warp: element by element, so more programs serve better


@triton.jit(do_not_specialize=["T", "step_stride", "row_stride"])
def scan_kernel(
    pre,  # (rows, 4H) in: pre-activations; rows = T * B, or the rows of the packed sequence
    c0,  # (B, H) in
    c_reset,  # (B, H) in: the cell from which a reset row goes on; only with layout.starts
    layout,  # a LayoutTensors, its order not looked at
    gates,  # (rows, 4H) out: activated gates; may be the memory of pre
    c,  # (rows, H) out: c of every step
    T,
    step_stride,  # rows from a step to the next, if not PACKED
    row_stride,  # rows from a batch row to the next
    H: tl.constexpr,
    REVERSE: tl.constexpr,  # the direction runs from the last step to the first
    BLOCK: tl.constexpr,  # hidden units of a program, which has one batch row
):
    ACC: tl.constexpr = c.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = units < H
    length = T
    if layout.lengths is not None:
        length = tl.load(layout.lengths + b).to(tl.int32)
    c_tile = tl.load(c0 + b * H + units, mask=mask, other=0.0)
    if layout.starts is not None:
        c_reset_tile = tl.load(c_reset + b * H + units, mask=mask, other=0.0)

    # No load waits for c: those of several steps are in flight at once.
    for step in tl.range(0, length, num_stages=4):
        t = length - 1 - step if REVERSE else step
        if layout.offsets is not None:
            row = tl.load(layout.offsets + t) + b
        else:
            row = t.to(tl.int64) * step_stride + b * row_stride
        gate = row * (4 * H) + units
        sums = cast_gates(load_gates(pre + gate, mask, H), ACC)
        if layout.starts is not None:
            c_tile = tl.where(tl.load(layout.starts + row) != 0, c_reset_tile, c_tile)
        activated, c_tile, _ = cell_forward(sums, c_tile)
        store_gates(gates + gate, activated, mask, H)
        tl.store(c + row * H + units, c_tile, mask=mask)


def scan(
    pre: Tensor,
    c0: Tensor,
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
) -> Tensor:
    """Activates the gates of one layer and direction in place and makes its cells.

    Args:
        pre: (T, B, 4H), (B, T, 4H) if the layout says so, or (rows, 4H) of a packed sequence, contiguous: the
            pre-activations, input and recurrent part.
        c0: (B, H) in the accumulator's dtype, contiguous.
        reverse, layout, c_reset: as forward.forward takes them.

    Returns:
        c: as pre with H features, in the dtype of c0. Past a row's length c and the gates are what they were.
    """
    B, H = c0.shape
    T = layout.steps(pre.shape)
    c = c0.new_empty((*pre.shape[:-1], H))
    if B > 0:
        with on_device(pre.device):
            tensors = LayoutTensors(layout.lengths, layout.offsets, layout.starts, None)
            args = pre, c0, c_reset, tensors, pre, c, T, *layout.strides(T, B), H, reverse, BLOCK
            scan_kernel[(B, ceil_div(H, BLOCK))](*args, num_warps=1, **OPTIONS)
    return c
