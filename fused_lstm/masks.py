"""Steps that a mask skips. The other steps of each row are gathered at its front and run as a row of that length; what
comes out is gathered back to where it belongs. It stands before the choice of a path and is the same on each."""

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor


def take_steps(x: Tensor, steps: Tensor) -> Tensor:
    """Row by row the steps, (T, B) int64, of (T, B, features)."""
    # torch.take_along_dim, but that makes constants of T and B in a graph.
    return x.gather(0, steps[..., None].expand(-1, -1, x.shape[-1]))


class Held(NamedTuple):
    """The state of one direction after each step, (T, B), where a skipped step leaves it as it was.

    source: int64, which of the gathered steps made it.
    initial: bool, where it is hx instead.
    zero: bool, where it is zero instead: after a reset to zero and past a row's end; None: nowhere.
    """

    source: Tensor
    initial: Tensor
    zero: Tensor | None

    def states(self, gathered: Tensor, initial: Tensor) -> Tensor:
        """gathered: (T, B, features), the states of the gathered steps; initial: (B, features), from hx."""
        states = take_steps(gathered, self.source)
        states = torch.where(self.initial[..., None], initial.to(states.dtype), states)
        return states if self.zero is None else states.masked_fill(self.zero[..., None], 0)


class Steps(NamedTuple):
    """Which steps run, and in which order they are gathered: (T, B), time first, int64 where nothing else is said.

    inside: bool, the steps within each row's length; None: all.
    reset: bool, the resets inside; None: none.
    before, upto: how many steps of the row run before each step, and with it.
    total: (B,), how many run in the row.
    order: the steps as they are gathered, those that run and then the others.
    place: where in that order each step is.
    """

    inside: Tensor | None
    reset: Tensor | None
    before: Tensor
    upto: Tensor
    total: Tensor
    order: Tensor
    place: Tensor

    @staticmethod
    def of(mask: Tensor, lengths: Tensor | None, reset: Tensor | None) -> "Steps":
        """mask, reset: (T, B) bool."""
        time = torch.arange(mask.shape[0], device=mask.device)[:, None]
        inside = None if lengths is None else time < lengths
        if inside is not None:
            mask = mask & inside
            reset = None if reset is None else reset & inside
        upto, total = mask.cumsum(0), mask.sum(0)
        before = upto - mask.long()
        place = torch.where(mask, before, total + time - before)
        order = torch.zeros_like(place).scatter(0, place, time.expand_as(place))
        return Steps(inside, reset, before, upto, total, order, place)

    def gather(self, x: Tensor) -> Tensor:
        """x: (T, B, features)."""
        return take_steps(x, self.order)

    def gathered_resets(self) -> Tensor | None:
        """(T, B) bool, the resets before the gathered steps: that of a skipped step comes before the next that runs."""
        if self.reset is None:
            return None
        upto = self.reset.cumsum(0).gather(0, self.order)
        return upto > torch.cat([torch.zeros_like(upto[:1]), upto[:-1]])

    def scatter(self, gathered: Tensor, initial: Tensor, held: list[Held]) -> Tensor:
        """Puts the states of the gathered steps, (T, B, directions * features), where they belong.

        held: of each direction, what skipped steps hold; empty: zero. initial: (directions, B, features), from hx.
        """
        if not held:  # the lengths of the gathered rows leave zeros for the other steps
            return take_steps(gathered, self.place)
        parts = gathered.chunk(len(held), -1)
        return torch.cat([h.states(*each) for h, *each in zip(held, parts, initial, strict=True)], -1)

    def outer_resets(self, directions: int) -> list[Tensor]:
        """Two of (D, B) bool: whether a reset comes before the first step that runs in each direction, and whether one
        comes after the last. Both are so in a row with a reset where no step runs."""
        assert self.reset is not None
        front, back = self.reset & (self.before == 0), self.reset & (self.before == self.total)
        # What is cut before a step in one direction is cut after it in the other, which ends before a cut at step 0.
        forward, reverse = (front.any(0), back.any(0)), (back[1:].any(0), front[1:].any(0))
        return [torch.stack(both[:directions]) for both in zip(forward, reverse, strict=True)]

    def held(self, directions: int, to_hx: bool) -> list[Held]:
        """What each direction holds at its skipped steps; to_hx: resets are to hx."""
        past = None if self.inside is None else ~self.inside
        sources = [(self.upto - 1).clamp(min=0), self.before.clamp(max=self.before.shape[0] - 1)]
        initials = [self.upto == 0, self.before == self.total]
        if self.reset is None:
            zeros = [past, past]
        else:
            upto = self.reset.cumsum(0)
            forward, reverse = (upto.gather(0, self.order.gather(0, source)) for source in sources)
            # Whether one lies between the step that made the state and this step.
            resets = [
                upto > forward.masked_fill(initials[0], 0),
                upto < torch.where(initials[1], self.reset.sum(0), reverse),
            ]
            if to_hx:
                initials, zeros = [i | r for i, r in zip(initials, resets, strict=True)], [past, past]
            else:
                zeros = [r if past is None else r | past for r in resets]
        return [Held(*each) for each in zip(sources, initials, zeros, strict=True)][:directions]


def run(call: Any, mask: Tensor, mask_to: str, run_call: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Runs the steps at which mask, (T, B), or (B, T) if the call is batch_first, is True.

    Args:
        call: a Call, or a CellCall. mask_to: as lstm() takes it. run_call: runs such a call without a mask; it returns
            y, each state after the last step, and the states of all steps, one after another as hx, or None.
    """
    batch_first, to_hx, D = call.options.batch_first, call.options.reset_to_hx, call.options.directions
    x, mask = (call.input.transpose(0, 1), mask.T) if batch_first else (call.input, mask)
    steps, hx = Steps.of(mask, call.lengths, call.starts), call.hx
    held = steps.held(D, to_hx) if mask_to == "hold" else []
    before, last = hx, None
    if steps.reset is not None:
        layers = hx[0].shape[0] // D
        first, last = (resets.repeat(layers, 1)[..., None] for resets in steps.outer_resets(D))
        if not to_hx:
            before = tuple(state.masked_fill(first, 0) for state in hx)

    recurrences = count()

    def record_scattered(*of_steps: Tensor) -> None:
        k = next(recurrences)
        of_direction = held and [held[k % D]]
        states = (steps.scatter(s, h[k, None], of_direction) for s, h in zip(of_steps, hx, strict=False))
        call.record(*states, *(steps.scatter(other, other, []) for other in of_steps[len(hx) :]))

    gathered = call.with_hx(*before)._replace(
        input=steps.gather(x),
        lengths=steps.total,
        starts=steps.gathered_resets(),
        options=call.options._replace(batch_first=False),
        record=None if call.record is None else record_scattered,
    )
    y, *ends, states = run_call(gathered)
    if last is not None:
        reset_to = hx if to_hx else tuple(map(torch.zeros_like, hx))
        ends = [torch.where(last, r.to(s.dtype), s) for r, s in zip(reset_to, ends, strict=True)]

    def scattered(of_layers: tuple[Tensor, ...], initial: Tensor) -> tuple[Tensor, ...]:
        each = zip(of_layers, initial.split(D), strict=True)
        outputs = (steps.scatter(*layer, held) for layer in each)
        return tuple(output.transpose(0, 1) if batch_first else output for output in outputs)

    (y,) = scattered((y,), hx[0][-D:])
    if states is not None:
        states = type(states)(*(scattered(*each) for each in zip(states, hx, strict=True)))
    return y, *ends, states
