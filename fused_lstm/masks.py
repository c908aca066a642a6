"""Steps that a mask skips. The other steps of each row are gathered at its front and run as a row of that length; what
comes out is gathered back to where it belongs. It stands before the choice of a path and is the same on each."""

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.layout import Layout

# lstm() of (T, B, I) input and hx, with the keywords lengths, reset and record.
Gathered = Callable[..., tuple[Tensor, Tensor, Tensor, Any]]
Record = Callable[[Tensor, Tensor, Tensor], None]


def as_tensor(given: Any, input: Tensor) -> Tensor:
    """A tensor as it is; an array or a list as one on the input's device."""
    return given if isinstance(given, Tensor) else torch.as_tensor(given).to(input.device)


def of_steps(name: str, given: Any, input: Tensor) -> Tensor:
    """What has a bool for each step and row, as a tensor: of a tensor, an array or a list.

    Raises:
        ValueError: it has not, or lies on another device than the input.
    """
    given = as_tensor(given, input)
    if given.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {given.dtype}")
    # As a tuple: a torch.Size would show as one in the text.
    shape = (input.shape[0], input.shape[1])
    if given.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one for each step and row, got {tuple(given.shape)}")
    if given.device != input.device:
        raise ValueError(f"{name} must be on {input.device} as the input, got {given.device}")
    return given


def checked(input: Tensor, batch_sizes: Tensor | None, mask: Any, mask_to: str) -> Tensor | None:
    """The mask that lstm() takes, as a tensor.

    Raises:
        ValueError: a mask or mask_to that it does not take.
    """
    if mask_to not in ("zero", "hold"):
        raise ValueError(f'mask_to must be "zero" or "hold", got {mask_to!r}')
    if mask is None:
        return None
    if batch_sizes is not None:
        raise ValueError("mask takes padded input, not a PackedSequence")
    return of_steps("mask", mask, input)


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
    def of(mask: Tensor, layout: Layout) -> "Steps":
        """mask: (T, B) bool; layout: lengths and resets, time first."""
        lengths, _, reset, _ = layout
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


def run(
    lstm: Gathered,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    mask: Tensor,
    mask_to: str,
    layout: Layout,
    reset_to: str,
    directions: int,
    batch_first: bool,
    record: Record | None,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Runs the steps at which mask is True.

    Args:
        lstm: runs the gathered steps.
        input, hx, mask, mask_to, reset_to, batch_first, record: as lstm() of functional.py takes them, checked.
        layout: the input's lengths and resets, time first.
        directions: D.

    Returns:
        As lstm() of functional.py.
    """
    x, mask = (input.transpose(0, 1), mask.T) if batch_first else (input, mask)
    steps, to_hx = Steps.of(mask, layout), reset_to == "hx"
    held = steps.held(directions, to_hx) if mask_to == "hold" else []
    entered, last = hx, None
    if steps.reset is not None:
        layers = hx[0].shape[0] // directions
        first, last = (resets.repeat(layers, 1)[..., None] for resets in steps.outer_resets(directions))
        if not to_hx:
            entered = hx[0].masked_fill(first, 0), hx[1].masked_fill(first, 0)

    cells = count()

    def record_scattered(y: Tensor, c: Tensor, gates: Tensor) -> None:
        assert record is not None
        cell = next(cells)
        of_direction = held and [held[cell % directions]]
        y, c = (steps.scatter(s, h[cell, None], of_direction) for s, h in zip((y, c), hx, strict=True))
        record(y, c, steps.scatter(gates, gates, []))

    y, hn, cn, states = lstm(
        steps.gather(x),
        entered,
        lengths=steps.total,
        reset=steps.gathered_resets(),
        record=record and record_scattered,
    )
    if last is not None:
        reset_state = hx if to_hx else (torch.zeros_like(hx[0]), torch.zeros_like(hx[1]))
        hn, cn = (torch.where(last, r.to(s.dtype), s) for r, s in zip(reset_state, (hn, cn), strict=True))

    def scattered(of_layers: tuple[Tensor, ...], initial: Tensor) -> tuple[Tensor, ...]:
        each = zip(of_layers, initial.split(directions), strict=True)
        outputs = (steps.scatter(*layer, held) for layer in each)
        return tuple(output.transpose(0, 1) if batch_first else output for output in outputs)

    (y,) = scattered((y,), hx[0][-directions:])
    if states is not None:
        states = states._replace(y=scattered(states.y, hx[0]), c=scattered(states.c, hx[1]))
    return y, hn, cn, states
