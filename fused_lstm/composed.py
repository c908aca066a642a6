"""The recurrence composed of torch operations: a loop over the steps, for what torch's own LSTM cannot give.

It runs everywhere, in every dtype, and can be differentiated as often as one likes; it is slow.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from .recurrence import Inputs, Recurrence
from .reference import steps
from .sequence import Sequence
from .weights import Weights


def recurrences(how: Recurrence, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes what recurrence.forward() takes. Returns y, hn, cn, and of all steps the cells and activated gates, as x
    with D times Hout, H and 4H features; of a stack those of its last layer."""
    x, h0, c0, weights = inputs
    batch_first = how.sequence.batch_first
    if batch_first:
        how = how._replace(sequence=how.sequence.time_first(x.shape[1]))
        x = x.transpose(0, 1)
    sequences = how.sequences(weights)
    ends: list[tuple[Tensor, Tensor]] = []
    several: list[tuple[Tensor, Tensor, Tensor]] = []
    for k, w in enumerate(weights):
        y, hn, cn, cells, gates = one(x, h0[k], c0[k], w, sequences[0 if how.stacked else k])
        ends.append((hn, cn))
        several.append((y, cells, gates))
        if how.stacked and k < len(weights) - 1:
            x = y * how.drop(y.new_ones(y.shape), k, h0.shape[1])
    hn, cn = (torch.stack(states) for states in zip(*ends, strict=True))
    of_time = several[-1] if how.stacked else (torch.cat(tensors, -1) for tensors in zip(*several, strict=True))
    y, cells, gates = (tensor.transpose(0, 1) if batch_first else tensor for tensor in of_time)
    return y, hn, cn, cells, gates


def one(
    x: Tensor, h0: Tensor, c0: Tensor, weights: Weights, sequence: Sequence
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """recurrences() of a single one."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
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
