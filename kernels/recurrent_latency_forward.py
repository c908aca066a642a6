"""The forward recurrence of any cell with W_hh in registers: of few rows, h polled, or of few units in one program.

The loop of recurrent_forward.py turned by half a step, the product of the next step last, as in latency_forward.py.
Tiles are (batch rows, units). Rows that begin in the middle, or are reset, poll the initial or the reset's h, which is
there.
"""

import triton
import triton.language as tl

from .latency_forward import for_all_parts
from .launch import SIZES
from .matmul import operand
from .operands import load_operand, multiply, sum_last
from .polling import behind_stores, fetch, form
from .rows import Sizes, locate_clamped, rows_of_program, with_starts
from .slots import (
    add_each,
    cast_each,
    first_of,
    load_each,
    load_slots,
    padded,
    select_each,
    split_last,
    store_each,
    store_slots,
    without_sentinel,
)


@triton.jit
def load_slot_operands(weight, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, CHUNKS: tl.constexpr, FORM: tl.constexpr):
    """The rows of a weight (SLOTS * H, H) for this program's units, slot by slot, as operands: of each chunk (SPLIT,
    padded(SLOTS) * BLOCK_H, a part)."""
    H: tl.constexpr = FORM.K
    index = tl.arange(0, padded(SLOTS) * BLOCK_H)
    slots, units = index // BLOCK_H, tl.program_id(0) * BLOCK_H + index % BLOCK_H
    rows = weight + (slots * H + units).to(tl.int64) * H
    operands = ()
    for k in tl.static_range(CHUNKS):
        operands = operands + (load_operand(rows, (slots < SLOTS) & (units < H), 1, k, FORM),)
    return operands


@triton.jit
def load_whole(
    weight, H: tl.constexpr, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """All of a weight (SLOTS * H, H) as an operand. Its parts are the padded slots or, if these are fewer, of each slot
    some units after others: (SPLIT, units, BLOCK_H)."""
    tl.static_assert(SPLIT % padded(SLOTS) == 0)
    UNITS: tl.constexpr = padded(SLOTS) * BLOCK_H // SPLIT
    index = tl.arange(0, SPLIT)[:, None, None] * UNITS + tl.arange(0, UNITS)[None, None, :]
    slots, units, columns = index // BLOCK_H, index % BLOCK_H, tl.arange(0, BLOCK_H)[None, :, None]
    mask = (slots < SLOTS) & (units < H) & (columns < H)
    x = tl.load(weight + (slots * H + units) * H + columns, mask=mask, other=0.0)
    # Transposed, and back: Triton 3.6 would leave a weight that is loaded as it is in shared memory.
    return tl.permute(operand(x, PRECISION, True), (0, 2, 1))


@triton.jit
def part_slots(x, SLOTS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The product with load_whole() to so many tiles: (ROWS, UNITS)."""
    PADDED: tl.constexpr = padded(SLOTS)
    return first_of(split_last(tl.permute(tl.reshape(x, (PADDED, UNITS, ROWS)), (2, 1, 0)), PADDED), SLOTS)


@triton.jit
def sum_slots(x, SLOTS: tl.constexpr, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(SPLIT, padded(SLOTS) * UNITS, ROWS), slot by slot, each part in another warp, to so many tiles of their sum:
    (ROWS, UNITS)."""
    PADDED: tl.constexpr = padded(SLOTS)
    x = tl.permute(tl.reshape(x, (SPLIT, PADDED, UNITS, ROWS)), (3, 2, 1, 0))
    return first_of(split_last(sum_last(x, (ROWS, UNITS, PADDED), SPLIT), PADDED), SLOTS)


@triton.jit(do_not_specialize=SIZES)
def recurrent_latency_forward_kernel(
    # As of recurrent_forward_kernel.
    x,
    weight_hh,
    bias_hh,
    vectors,
    initial,
    resets,
    layout,
    steps,  # of a grid h's is SENTINEL at launch; by it programs exchange h
    kept,
    ends,
    sync,
    T,
    B,
    total_rows,
    step_stride,
    row_stride,
    first_recurrence,
    row_begin,
    step_begin,
    step_end,
    H: tl.constexpr,
    CELL: tl.constexpr,
    MODE: tl.constexpr,  # "local": one program holds all units; "grid": programs hand h to each other
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    PAIRS: tl.constexpr,  # of words()
    MAX_SPINS: tl.constexpr,
):
    y = steps[0]
    TYPE: tl.constexpr = y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    G: tl.constexpr = CELL.gates
    STATES: tl.constexpr = CELL.states
    KEPT: tl.constexpr = CELL.kept
    VECTORS: tl.constexpr = CELL.vectors
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    SPLIT: tl.constexpr = TILES.split
    CHUNK: tl.constexpr = SPLIT * (512 // TYPE.primitive_bitwidth)  # columns that one product sums
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    RAGGED: tl.constexpr = layout.lengths is not None
    FORM: tl.constexpr = form(H, 1, TILES, TYPE.primitive_bitwidth, PAIRS, PRECISION, MAX_SPINS)
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, False, DIRECTIONS, REVERSE, BLOCK_B, True)
    real_units = (units < H)[None, :]
    mask = rows.mask[:, None] & real_units
    state = rows.states[:, None] * H + units[None, :]

    weight = weight_hh + recurrence * (G * H * H)
    if MODE == "local":
        weights = (load_whole(weight, H, G, BLOCK_H, SPLIT, PRECISION),)
    else:
        weights = load_slot_operands(weight, G, BLOCK_H, CHUNKS, FORM)
    p = ()
    if vectors is not None:
        p = load_each(vectors, recurrence * H + units[None, :], real_units, VECTORS, ACC)
    if bias_hh is not None:
        bias = load_slots(bias_hh + recurrence * (G * H) + units[None, :], real_units, H, G, ACC)
    if RAGGED:
        step_end = tl.minimum(step_end, rows.last + 1)
    states = load_each(initial, state, mask, STATES, ACC)
    initial_rows = initial[0] + rows.states * H
    if layout.starts is not None:
        reset_to = load_each(resets, state, mask, STATES, ACC)
        reset_rows = resets[0] + rows.states * H

    # The first step's product. Fetched as in the loop: the compiler then has the weight in only one layout.
    running = rows.mask & (step_begin < step_end)
    at = with_starts(locate_clamped(step_begin, layout, rows, running), layout, rows)
    after = with_starts(locate_clamped(step_begin + 1, layout, rows, running), layout, rows)
    zero = tl.zeros((SPLIT, padded(G) * BLOCK_H // (SPLIT if MODE == "local" else 1), BLOCK_B), ACC)
    if MODE == "local":
        h = states[0]
        if layout.starts is not None:
            h = tl.where(at.start[:, None], reset_to[0], h)
        recurrent = multiply(weights, (for_all_parts(h.to(TYPE), SPLIT, PRECISION),), zero, PRECISION)
    else:
        recurrent = multiply(weights, fetch(initial_rows, None, step_begin, sync, FORM, "load"), zero, PRECISION)
        if layout.starts is not None:
            # Chosen behind the product: Triton lays out its operands by the narrowest element that their addresses
            # depend on.
            h_rows = fetch(reset_rows, None, step_begin, sync, FORM, "load")
            recurrent = tl.where(at.start[None, None, :], multiply(weights, h_rows, zero, PRECISION), recurrent)
    active = mask & at.mask[:, None]
    of_input = load_slots(x + at.rows[:, None] * (G * H) + units[None, :], active, H, G, None)

    for step in range(step_begin, step_end):
        if MODE == "local":
            r = part_slots(recurrent, G, BLOCK_H, BLOCK_B)
        else:
            r = sum_slots(recurrent, G, SPLIT, BLOCK_H, BLOCK_B)
        if bias_hh is not None:
            r = add_each(r, bias)
        if layout.starts is not None:
            states = select_each(at.start[:, None], reset_to, states)
        h, others, values = CELL.forward(cast_each(of_input, ACC), r, states, p)
        h = h.to(TYPE)
        if MODE == "grid":
            h = without_sentinel(h)
        of_rows = (at.first * DIRECTIONS + rows.offsets)[:, None]
        hidden = of_rows * H + units[None, :]
        tl.store(y + hidden, h, mask=active)
        # What the next step takes and need not wait for; after the last step it is loaded again, and not used.
        going_on = at.mask & after.mask
        active_after = mask & after.mask[:, None]
        gate_after = (after.first * DIRECTIONS + rows.offsets)[:, None] * (G * H) + units[None, :]
        of_input = load_slots(x + gate_after, active_after, H, G, None)
        ended = (h.to(ACC),) + others
        states = select_each(active, ended, states)
        if kept is not None:
            store_slots(kept + of_rows * (KEPT * H) + units[None, :], values, active, H)
        for k in tl.static_range(1, STATES):
            if steps[k] is not None:
                tl.store(steps[k] + hidden, ended[k], mask=active)
        if MODE == "local":
            h = states[0]
            if layout.starts is not None:
                h = tl.where(after.start[:, None], reset_to[0], h)
            recurrent = multiply(weights, (for_all_parts(h.to(TYPE), SPLIT, PRECISION),), zero, PRECISION)
        else:
            h_rows = behind_stores(y + at.first * (DIRECTIONS * H)) + rows.offsets * H
            if RAGGED:
                h_rows = tl.where(going_on, h_rows, initial_rows)
            if layout.starts is not None:
                h_rows = tl.where(after.start, reset_rows, h_rows)
            h_rows = fetch(h_rows, None, step + 1, sync, FORM, "await")
            recurrent = multiply(weights, h_rows, zero, PRECISION)
        at, active = after, active_after
        # A step ahead, because addresses that wait for these loads would make everyone wait.
        after = with_starts(locate_clamped(step + 2, layout, rows, running), layout, rows)

    store_each(ends, state, states, mask)
