"""Where the steps of a program's batch rows lie among the rows of a tensor: one rule for every kernel."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """What a kernel is told about the rows of a tensor."""

    T: Any
    B: Any
    total_rows: Any  # of a (rows, ...) tensor
    step_stride: Any  # rows from a step to the next, if they are not packed
    row_stride: Any  # rows from a batch row to the next


class Rows(NamedTuple):
    """The batch rows of a program in one recurrence."""

    batch: Any  # (BLOCK_B,) int64: the batch rows
    mask: Any  # which of them are there
    length: Any  # their steps: (BLOCK_B,), or one number for all
    last: Any  # the last step, of the longest of them
    states: Any  # (BLOCK_B,): their rows in a (R, B, ...) tensor
    offsets: Any  # (BLOCK_B,): their rows in a (rows, D, ...) or (R, rows, ...) tensor, from the step's first on
    start_offsets: Any  # the same in `starts`
    step_stride: Any
    backwards: Any  # whether the recurrence runs from the last step to the first
    DIRECTIONS: Any


class Step(NamedTuple):
    """One step of these rows."""

    t: Any  # its time
    first: Any  # its first row among those of one direction or layer
    rows: Any  # (BLOCK_B,): the rows of a (rows, D, ...) or (R, rows, ...) tensor
    mask: Any  # which batch rows have the step
    start: Any = False  # which rows are reset before it, of with_starts()


@triton.jit
def rows_of_program(
    layout,
    sizes,
    recurrence,
    row_begin,
    STACK: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """The Rows of this program. CLAMPED: past the last batch row it has that one again, to compute and not to store."""
    batch = row_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = batch < sizes.B
    if CLAMPED:
        batch = tl.minimum(batch, sizes.B - 1).to(tl.int64)
        if layout.order is not None:
            batch = tl.load(layout.order + batch)
    else:
        batch = batch.to(tl.int64)
        if layout.order is not None:
            batch = tl.load(layout.order + batch, mask=mask, other=0)
    length, last = sizes.T, sizes.T - 1
    if layout.lengths is not None:
        if CLAMPED:
            length = tl.load(layout.lengths + batch).to(tl.int32)
        else:
            length = tl.load(layout.lengths + batch, mask=mask, other=0)
        last = tl.max(length) - 1
    batch_offsets = batch * sizes.row_stride
    offsets = recurrence * sizes.total_rows + batch_offsets if STACK else batch_offsets * DIRECTIONS + recurrence
    start_offsets = batch_offsets if STACK else recurrence * sizes.total_rows + batch_offsets
    backwards = recurrence > 0 if DIRECTIONS > 1 else REVERSE
    states = recurrence * sizes.B + batch
    return Rows(batch, mask, length, last, states, offsets, start_offsets, sizes.step_stride, backwards, DIRECTIONS)


@triton.jit
def time_of(step, rows):
    """The time of a step, counted in the recurrence's own order."""
    return tl.where(rows.backwards, rows.last - step, step)


@triton.jit
def time_before(t, rows):
    return tl.where(rows.backwards, t + 1, t - 1)


@triton.jit
def time_after(t, rows):
    return tl.where(rows.backwards, t - 1, t + 1)


@triton.jit
def that_have(t, mask, layout, rows):
    """The rows of a mask that have a step at time t."""
    if layout.lengths is not None:
        mask = mask & (t < rows.length)
    return mask


@triton.jit
def locate(t, layout, rows, mask, exists):
    """The Step at time t, if it `exists` in the sequence at all, for the rows of a mask as far as they have it."""
    mask = that_have(t, mask, layout, rows)
    if layout.offsets is not None:
        first = tl.load(layout.offsets + t, mask=exists, other=0)
    else:
        first = t.to(tl.int64) * rows.step_stride
    return Step(t, first, first * rows.DIRECTIONS + rows.offsets, mask)


@triton.jit
def locate_clamped(step, layout, rows, mask):
    """The Step of so many in the recurrence's own order; if there is none of that number, its first or last one. mask:
    the rows that have any."""
    t = tl.minimum(tl.maximum(time_of(step, rows), 0), rows.last)
    if layout.offsets is not None:
        first = tl.load(layout.offsets + t)
    else:
        first = t.to(tl.int64) * rows.step_stride
    return Step(t, first, first * rows.DIRECTIONS + rows.offsets, that_have(t, mask, layout, rows))


@triton.jit
def with_mask(at, layout, rows, mask):
    """A Step of locate_clamped() with another mask."""
    return Step(at.t, at.first, at.rows, that_have(at.t, mask, layout, rows))


@triton.jit
def locate_neighbours(step, layout, rows):
    """For the backward pass, whose steps run against the recurrence's own order: the Step, and the ones after and
    before it in that order."""
    at = locate(time_of(rows.last - step, rows), layout, rows, rows.mask, True)
    after = locate(time_after(at.t, rows), layout, rows, rows.mask & (step > 0), step > 0)
    before = locate(time_before(at.t, rows), layout, rows, rows.mask & (step < rows.last), step < rows.last)
    return with_starts(at, layout, rows), with_starts(after, layout, rows), before


@triton.jit
def is_start(at, layout, rows):
    """Which rows are reset before a step."""
    return tl.load(layout.starts + rows.start_offsets + at.first, mask=at.mask, other=0) != 0


@triton.jit
def with_starts(at, layout, rows):
    """A Step that also says which rows are reset before it."""
    if layout.starts is not None:
        return Step(at.t, at.first, at.rows, at.mask, is_start(at, layout, rows))
    else:
        return at


@triton.jit
def without_starts(mask, at, layout):
    """The rows of a mask that are not reset before a step."""
    if layout.starts is not None:
        mask = mask & ~at.start
    return mask


@triton.jit
def last_h(y, h0, layout, rows, OUT: tl.constexpr):
    """Pointers to each row's last h in y; without steps it is h0."""
    end = tl.where(rows.backwards, 0, rows.length - 1)
    if layout.offsets is not None:
        first = tl.load(layout.offsets + end, mask=rows.mask, other=0)
    else:
        first = end.to(tl.int64) * rows.step_stride
    at_end = y + (first * rows.DIRECTIONS + rows.offsets) * OUT
    return tl.where(rows.length > 0, at_end, h0 + rows.states * OUT)
