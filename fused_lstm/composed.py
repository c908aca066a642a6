"""The recurrence composed of torch operations: a loop over the steps, for what torch's own LSTM cannot give.

It runs everywhere, in every dtype, and can be differentiated as often as one likes; it is slow.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .recurrence import Inputs, Recurrence
from .sequence import Sequence
from .weights import Weights

# Of the input's part of a step and the states before it: the states after it, and what else is asked for.
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Iterable[Tensor], Iterable[Tensor]]]


def recurrences(how: Recurrence, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Takes what recurrence.forward() takes. Returns y, hn, cn, and of all steps the cells and activated gates, as x
    with D times Hout, H and 4H features; of a stack those of its last layer."""
    x, h0, c0, weights = inputs
    batch_first = how.sequence.batch_first
    if batch_first:
        how = how._replace(sequence=how.sequence.time_first(x.shape[1]))
        x = x.transpose(0, 1)
    sequences = how.sequences(weights)
    ends: list[tuple[Tensor, ...]] = []
    several: list[tuple[Tensor, ...]] = []
    for k, w in enumerate(weights):
        pre = linear(x.reshape(-1, x.shape[-1]), w.weight_ih, w.bias_ih) + (0 if w.bias_hh is None else w.bias_hh)
        sequence = sequences[0 if how.stacked else k]
        of_steps, end = unrolled(pre.view(*x.shape[:-1], pre.shape[1]), (h0[k], c0[k]), step_of(w), sequence)
        ends.append(end)
        several.append(of_steps)
        if how.stacked and k < len(weights) - 1:
            x = of_steps[0] * how.drop(torch.ones_like(of_steps[0]), k, h0.shape[1])
    hn, cn = (torch.stack(states) for states in zip(*ends, strict=True))
    of_time = several[-1] if how.stacked else (torch.cat(tensors, -1) for tensors in zip(*several, strict=True))
    y, cells, gates = (tensor.transpose(0, 1) if batch_first else tensor for tensor in of_time)
    return y, hn, cn, cells, gates


def step_of(weights: Weights) -> Step:
    """The LSTM's step; beside h and c it gives the activated gates."""

    def step(pre: Tensor, states: tuple[Tensor, ...]) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        h_prev, c_prev = states
        i, f, g, o = (pre + linear(h_prev, weights.weight_hh)).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c_prev + i * g
        h = o * c.tanh()
        if weights.weight_hr is not None:
            h = linear(h, weights.weight_hr)
        return (h, c), (torch.cat([i, f, g, o], dim=1),)

    return step


class Steps(NamedTuple):
    """What a loop over the steps takes of each: (B, ...) tensors, in the direction's order.

    of_input: the input's part. starts: (B, 1) bool, which rows are reset before it; None: none. inside: (B, 1) bool,
    which rows have it, of padded rows; None: all that there are.
    """

    of_input: tuple[Tensor, ...]
    starts: tuple[Tensor | None, ...]
    inside: tuple[Tensor | None, ...]

    @staticmethod
    def of(pre: Tensor, B: int, sequence: Sequence) -> "Steps":
        """pre: (T, B, features), or (rows, features) packed."""
        layout = sequence.layout
        if layout.offsets is not None:
            ends = [*layout.offsets.tolist(), pre.shape[0]]
            of_input = pre.split([end - begin for begin, end in pairwise(ends)])
        else:
            of_input = pre.unbind()
        nothing = (None,) * len(of_input)
        starts = nothing if layout.starts is None else layout.starts.reshape(len(of_input), B, 1).unbind()
        inside: tuple[Tensor | None, ...] = nothing
        if layout.lengths is not None and layout.offsets is None:
            inside = tuple((t < layout.lengths)[:, None] for t in range(len(of_input)))
        of_time = of_input, starts, inside
        return Steps(*(each[::-1] for each in of_time) if sequence.reverse else of_time)


def unrolled(
    pre: Tensor, states: tuple[Tensor, ...], step: Step, sequence: Sequence
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Runs one direction.

    Args:
        pre: (T, B, features), or (rows, features) packed, the input's part of every step.
        states: each (B, ·), before the first step. step: see Step. sequence: time first.

    Returns:
        what the step gives at every step, states first, each (T, B, ·) or (rows, ·), zero past a row's length; and each
        row's last states.
    """
    steps = Steps.of(pre, states[0].shape[0], sequence)
    initial = states if sequence.reset_to_hx else tuple(map(torch.zeros_like, states))
    of_steps: list[tuple[Tensor, ...]] = []
    for of_input, start, inside in zip(*steps, strict=True):
        rows = len(of_input)  # those of packed rows that have the step are the first
        before = states if rows == len(states[0]) else tuple(state[:rows] for state in states)
        if start is not None:
            # All rows take every step: torch.vmap cannot index by a condition.
            before = tuple(torch.where(start, *each) for each in zip(initial, before, strict=True))
        after, more = map(tuple, step(of_input, before))
        of_step = (*after, *more)
        if inside is not None:
            after = tuple(torch.where(inside, *each) for each in zip(after, states, strict=True))
            of_step = tuple(torch.where(inside, tensor, 0) for tensor in of_step)
        elif rows < len(states[0]):
            after = tuple(torch.cat([new, old[rows:]]) for new, old in zip(after, states, strict=True))
        states = after
        of_steps.append(of_step)
    if sequence.reverse:
        of_steps.reverse()
    join = torch.stack if pre.dim() == 3 else torch.cat
    return tuple(map(join, zip(*of_steps, strict=True))), states
