"""The states of a cell around a step, as its backward pass takes them: tiles of (units, batch rows) or, with
ROWS_FIRST, of (batch rows, units)."""

import triton
import triton.language as tl


@triton.constexpr_function
def takes(states, k):
    return k in states


@triton.jit
def across(of_rows, units, ROWS_FIRST: tl.constexpr):
    """A tile of what the batch rows have and what the units add to it."""
    return of_rows[:, None] + units[None, :] if ROWS_FIRST else of_rows[None, :] + units[:, None]


@triton.jit
def load_before(
    CELL: tl.constexpr,
    steps,
    initial,
    resets,
    at,
    before,
    layout,
    rows,
    units,
    mask,
    H,
    ROWS_FIRST: tl.constexpr = False,
):
    """The states before a step, as far as backward takes them: those after the step before, the initial ones for a
    row's first step, or the reset's. In their own types; those that it does not take are zeros."""
    STATES: tl.constexpr = CELL.states
    states = ()
    for k in tl.static_range(STATES):
        if takes(CELL.before, k):
            tensor, row = tl.where(before.mask, steps[k], initial[k]), tl.where(before.mask, before.rows, rows.states)
            if layout.starts is not None:
                tensor, row = tl.where(at.start, resets[k], tensor), tl.where(at.start, rows.states, row)
            states = states + (tl.load(across(tensor + row * H, units, ROWS_FIRST), mask=mask, other=0.0),)
        else:
            states = states + (tl.zeros(mask.shape, tl.float32),)
    return states


@triton.jit
def load_after(CELL: tl.constexpr, steps, at, mask):
    """The states after a step, as far as backward takes them; as load_before()."""
    STATES: tl.constexpr = CELL.states
    states = ()
    for k in tl.static_range(STATES):
        if takes(CELL.after, k):
            states = states + (tl.load(steps[k] + at, mask=mask, other=0.0),)
        else:
            states = states + (tl.zeros(mask.shape, tl.float32),)
    return states
