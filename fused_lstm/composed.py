"""The recurrence composed of torch operations: a loop over the steps, for what torch's own LSTM cannot give.

It runs everywhere, in every dtype, and can be differentiated as often as one likes; it is slow.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from .reference import steps

if TYPE_CHECKING:
    from .layer import Members, Weights
    from .sequence import Sequence


def members(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: "list[Weights]",
    sequence: "Sequence",
    members: "Members",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes what layer.forward() takes; returns y, hn, cn, and of all steps the cells and the activated gates, like x
    with D times Hout, H and 4H features; of a stack those of its last layer."""
    batch_first = sequence.batch_first
    if batch_first:
        x, sequence = x.transpose(0, 1), sequence.by_time(x.shape[1])
    sequences, ends, several = sequence.each(members.directions(len(weights))), [], []
    for m, own in enumerate(weights):
        y, *end, cells, gates = one(x, h0[m], c0[m], *own, sequences[0 if members.layers else m])
        ends.append(end)
        several.append((y, cells, gates))
        if members.layers and m < len(weights) - 1:
            x = y * members.drop(y.new_ones(y.shape), m, h0.shape[1], sequence)
    hn, cn = (torch.stack(states) for states in zip(*ends, strict=True))
    of_time = several[-1] if members.layers else (torch.cat(tensors, -1) for tensors in zip(*several, strict=True))
    y, cells, gates = (tensor.transpose(0, 1) if batch_first else tensor for tensor in of_time)
    return y, hn, cn, cells, gates


def one(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    sequence: "Sequence",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """members() of a single one."""
    input_gates = linear(x.reshape(-1, x.shape[-1]), weight_ih, bias_ih) + (0 if bias_hh is None else bias_hh)
    layout, lengths = sequence.layout, None
    if layout.padded:
        # All rows take every step, and keep their states past their ends: torch.vmap cannot index by a condition.
        layout, lengths = layout._replace(lengths=None), layout.lengths
    T, h, c, rows_of = layout.steps(x.shape), h0, c0, []
    of_steps: list[tuple[Tensor, ...]] = []  # h, c and the activated gates
    for k, (rows, active) in enumerate(steps(x, h0.shape[0], sequence.reverse, layout)):
        h_prev, c_prev = h[active], c[active]
        if layout.starts is not None:
            start = layout.starts.reshape(-1)[rows, None]
            h_reset, c_reset = (s[active] if sequence.reset_to_hx else torch.zeros_like(s[active]) for s in (h0, c0))
            h_prev, c_prev = torch.where(start, h_reset, h_prev), torch.where(start, c_reset, c_prev)
        i, f, g, o = (input_gates[rows] + linear(h_prev, weight_hh)).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c_prev + i * g
        h_t = o * c_t.tanh()
        if weight_hr is not None:
            h_t = linear(h_t, weight_hr)
        of_step: tuple[Tensor, ...] = (h_t, c_t, torch.cat([i, f, g, o], dim=1))
        if lengths is None:
            h, c = h.index_copy(0, active, h_t), c.index_copy(0, active, c_t)
        else:
            inside = ((T - 1 - k if sequence.reverse else k) < lengths)[:, None]
            h, c = torch.where(inside, h_t, h), torch.where(inside, c_t, c)
            of_step = tuple(torch.where(inside, tensor, 0) for tensor in of_step)
        rows_of.append(rows)
        of_steps.append(of_step)

    def placed(tiles: tuple[Tensor, ...]) -> Tensor:
        flat = x.new_zeros(len(input_gates), tiles[0].shape[1])
        return flat.index_copy(0, torch.cat(rows_of), torch.cat(tiles)).view(*x.shape[:-1], flat.shape[1])

    y, cells, gates = map(placed, zip(*of_steps, strict=True))
    return y, h, c, cells, gates
