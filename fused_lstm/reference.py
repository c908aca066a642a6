"""The recurrence in plain PyTorch, forward and hand-written backward: the specification that the kernels are held to.

Line for line with kernels/README.md, whose numbers stand in the comments. The functions take and return what the
launchers fused_lstm.kernels.forward.forward and .backward.backward do. Sources: Hochreiter & Schmidhuber 1997 with the
forget gate of Gers et al. 2000, in the form of torch.nn.LSTM.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels.layout import DENSE, Layout


def steps(input: Tensor, B: int, reverse: bool, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, in the direction's order, each step's rows in the flattened sequence and the batch rows that they are."""
    T = layout.steps(input.shape)
    batch = torch.arange(B, device=input.device)
    step_stride, row_stride = layout.strides(T, B)
    for t in reversed(range(T)) if reverse else range(T):
        active = batch if layout.lengths is None else batch[layout.lengths > t]
        yield active * row_stride + (t * step_stride if layout.offsets is None else layout.offsets[t]), active


def forward(
    input_gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, hn, cn, c and gates; shapes as in fused_lstm.kernels.forward.forward."""
    B, H = c0.shape
    h, c = h0.clone(), c0.clone()
    flat = input_gates.reshape(-1, 4 * H)
    y, cells, gates = flat.new_zeros(len(flat), h0.shape[1]), flat.new_zeros(len(flat), H), torch.zeros_like(flat)
    for rows, active in steps(input_gates, B, reverse, layout):
        h_prev, c_prev = h[active], c[active]
        if layout.starts is not None and c_reset is not None:
            start = layout.starts.reshape(-1)[rows, None]
            h_prev, c_prev = h_prev.masked_fill(start, 0), c_prev.where(~start, c_reset[active])
        a = flat[rows] + h_prev @ weight_hh.T  # (1)
        i, f, g, o = a.chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()  # (2)
        c[active] = f * c_prev + i * g  # (3)
        h_t = o * c[active].tanh()  # (4)
        h[active] = h_t if weight_hr is None else h_t @ weight_hr.T
        y[rows], cells[rows], gates[rows] = h[active], c[active], torch.cat([i, f, g, o], dim=1)
    shape = input_gates.shape[:-1]
    return y.reshape(*shape, h0.shape[1]), h, c, cells.reshape(*shape, H), gates.reshape(input_gates.shape)


def backward(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    c: Tensor,
    gates: Tensor,
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
    weight_hr: Tensor | None = None,
    dc_steps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns dgates, dc0, dc_reset and dh_steps; shapes as in fused_lstm.kernels.backward.backward."""
    B, H = c0.shape
    dh, dc, dc_reset = dhn.clone(), dcn.clone(), None if c_reset is None else torch.zeros_like(c0)
    flat_dy, flat_c, flat_gates = dy.reshape(-1, dhn.shape[1]), c.reshape(-1, H), gates.reshape(-1, 4 * H)
    dgates, dh_steps = torch.zeros_like(flat_gates), torch.zeros_like(flat_dy)
    order = list(steps(dy, B, reverse, layout))
    for k in reversed(range(len(order))):
        rows, active = order[k]
        # c_{t-1}: of the rows that the step before also had, and c0 for those that begin here.
        c_before = c0.clone()
        if k > 0:
            rows_prev, active_prev = order[k - 1]
            c_before[active_prev] = flat_c[rows_prev]
        c_prev, start = c_before[active], torch.zeros(len(rows), 1, dtype=torch.bool, device=dy.device)
        if layout.starts is not None and c_reset is not None:
            start = layout.starts.reshape(-1)[rows, None]
            c_prev = c_prev.where(~start, c_reset[active])
        i, f, g, o = flat_gates[rows].chunk(4, dim=1)
        tanh_c = flat_c[rows].tanh()
        dh_steps[rows] = dh_t = flat_dy[rows] + dh[active]  # (5)
        if weight_hr is not None:
            dh_t = dh_t @ weight_hr
        dc_t = dc[active] + dh_t * o * (1 - tanh_c**2)  # (6)
        if dc_steps is not None:
            dc_t = dc_t + dc_steps.reshape(-1, H)[rows]
        di = dc_t * g * i * (1 - i)  # (7)
        df = dc_t * c_prev * f * (1 - f)
        dg = dc_t * i * (1 - g**2)
        do = dh_t * tanh_c * o * (1 - o)
        dgates[rows] = torch.cat([di, df, dg, do], dim=1)
        if dc_reset is not None:
            dc_reset[active] += (dc_t * f).masked_fill(~start, 0)
        dc[active] = (dc_t * f).masked_fill(start, 0)  # (8)
        dh[active] = (dgates[rows] @ weight_hh).masked_fill(start, 0)  # (5), for the step before
    return dgates.reshape(gates.shape), dc, dc_reset, None if weight_hr is None else dh_steps.reshape(dy.shape)
