"""The recurrence in plain PyTorch, forward and hand-written backward: the specification that the kernels are held to.

Line for line with kernels/README.md, whose numbers stand in the comments. The functions take and return what the
launchers fused_lstm.kernels.forward.forward and .backward.backward do. Sources: Hochreiter & Schmidhuber 1997 with the
forget gate of Gers et al. 2000, in the form of torch.nn.LSTM.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels.launch import Packing


def steps(input: Tensor, B: int, reverse: bool, packing: Packing | None) -> Iterator[tuple[slice, int]]:
    """Yields, in the direction's order, the rows of each step in the flattened sequence and how many there are."""
    if packing is None:
        begins, counts = [t * B for t in range(input.shape[0])], [B] * input.shape[0]
    else:
        begins = packing.offsets.tolist()
        counts = [int((packing.lengths > t).sum()) for t in range(len(begins))]
    order = zip(begins, counts, strict=True)
    for begin, n in reversed(list(order)) if reverse else order:
        yield slice(begin, begin + n), n


def forward(
    input_gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    reverse: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, cn, c and gates; shapes as in fused_lstm.kernels.forward.forward."""
    B, H = h0.shape
    h, c = h0.clone(), c0.clone()
    flat = input_gates.reshape(-1, 4 * H)
    y, cells, gates = flat.new_empty(len(flat), H), flat.new_empty(len(flat), H), torch.empty_like(flat)
    # A step touches the first n batch rows: all of them, or in a packed sequence those that are long enough.
    for rows, n in steps(input_gates, B, reverse, packing):
        a = flat[rows] + h[:n] @ weight_hh.T  # (1)
        i, f, g, o = a.chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()  # (2)
        c[:n] = f * c[:n] + i * g  # (3)
        h[:n] = o * c[:n].tanh()  # (4)
        y[rows], cells[rows], gates[rows] = h[:n], c[:n], torch.cat([i, f, g, o], dim=1)
    shape = input_gates.shape[:-1]
    return y.reshape(*shape, H), c, cells.reshape(*shape, H), gates.reshape(input_gates.shape)


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
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns dgates and dc0; shapes as in fused_lstm.kernels.backward.backward."""
    B, H = c0.shape
    dh, dc = dhn.clone(), dcn.clone()
    flat_dy, flat_c, flat_gates = dy.reshape(-1, H), c.reshape(-1, H), gates.reshape(-1, 4 * H)
    dgates = torch.empty_like(flat_gates)
    order = list(steps(dy, B, reverse, packing))
    for k in reversed(range(len(order))):
        rows, n = order[k]
        # c_{t-1}: the rows that the step before also had, and c0 for those that begin here.
        c_prev = c0[:n].clone()
        if k > 0:
            rows_prev, n_prev = order[k - 1]
            c_prev[:n_prev] = flat_c[rows_prev][:n]
        i, f, g, o = flat_gates[rows].chunk(4, dim=1)
        tanh_c = flat_c[rows].tanh()
        dh_t = flat_dy[rows] + dh[:n]  # (5)
        dc_t = dc[:n] + dh_t * o * (1 - tanh_c**2)  # (6)
        di = dc_t * g * i * (1 - i)  # (7)
        df = dc_t * c_prev * f * (1 - f)
        dg = dc_t * i * (1 - g**2)
        do = dh_t * tanh_c * o * (1 - o)
        dgates[rows] = torch.cat([di, df, dg, do], dim=1)
        dc[:n] = dc_t * f  # (8)
        dh[:n] = dgates[rows] @ weight_hh  # (5), for the step before
    return dgates.reshape(gates.shape), dc
