"""What a backward step takes of its own: the cell before, the gradients of its outputs, and those of a reset."""

import triton
import triton.language as tl


@triton.jit
def cells_before(c, c0, c_reset, at, before, layout, rows, H: tl.constexpr):
    """Pointers to the rows of c_{t-1}: of the step before, of c0 for a row's first step, or of the reset's cell."""
    c_rows = tl.where(before.mask, c + before.rows * H, c0 + rows.states * H)
    if layout.starts is not None:
        c_rows = tl.where(at.start, c_reset + rows.states * H, c_rows)
    return c_rows


@triton.jit
def load_dh(dy, dy_mask, dhn, dhn_mask):
    """The gradients of h_t, as y_t and as a row's last h."""
    return tl.load(dy, mask=dy_mask, other=0.0), tl.load(dhn, mask=dhn_mask, other=0.0)


@triton.jit
def cut(start, dc_prev, dc_reset):
    """Gives the gradient of c_{t-1} to the reset's cell where a reset cuts the sequence."""
    dc_reset += tl.where(start, dc_prev, 0.0)
    return tl.where(start, 0.0, dc_prev), dc_reset
