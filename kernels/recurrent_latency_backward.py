"""The backward recurrence of any cell with W_hh in registers: of few rows, dr polled, or of few units in one program.

The loop of recurrent_backward.py turned by half a step, as in latency_backward.py. Tiles are (batch rows, units).
"""

import triton
import triton.language as tl

from .latency_backward import load_gate_columns
from .launch import SIZES
from .matmul import operand
from .operands import multiply, sum_last, sum_parts
from .polling import behind_stores, fetch, form, write_zeros
from .rows import Sizes, locate_clamped, rows_of_program, with_mask, with_starts, without_starts
from .slots import (
    add_each,
    cast_each,
    join_last,
    load_each,
    load_slots,
    padded,
    select_each,
    store_each,
    store_slots,
    without_sentinel_each,
    zeros_like_each,
)
from .states import load_after, load_before


@triton.jit
def load_whole_transposed(
    weight, H: tl.constexpr, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """All of a weight (SLOTS * H, H), transposed, as an operand, a unit's padded slots side by side. Its parts are as
    many as these, of all units or, if they are more, of some units after others: (SPLIT, units, BLOCK_H)."""
    PADDED: tl.constexpr = padded(SLOTS)
    tl.static_assert(SPLIT % PADDED == 0)
    UNITS: tl.constexpr = PADDED * BLOCK_H // SPLIT
    parts = tl.arange(0, SPLIT)[:, None, None]
    rows = parts % PADDED * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    columns = parts // PADDED * UNITS + tl.arange(0, UNITS)[None, None, :]
    slots, units = rows % PADDED, rows // PADDED
    mask = (slots < SLOTS) & (units < H) & (columns < H)
    x = tl.load(weight + (slots * H + units) * H + columns, mask=mask, other=0.0)
    return tl.permute(operand(x, PRECISION, True), (0, 2, 1))


@triton.jit
def in_parts(tiles, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Tiles (batch rows, units) of the slots as an operand for load_whole_transposed(): (SPLIT, batch rows, units)."""
    PADDED: tl.constexpr = padded(len(tiles))
    ROWS: tl.constexpr = tiles[0].shape[0]
    UNITS: tl.constexpr = tiles[0].shape[1]
    for _ in tl.static_range(PADDED - len(tiles)):
        tiles = tiles + (tl.zeros_like(tiles[0]),)
    x = operand(join_last(tiles, PADDED), PRECISION)
    x = tl.permute(tl.reshape(x, (ROWS, PADDED, UNITS)), (1, 0, 2))
    if SPLIT > PADDED:
        x = tl.broadcast_to(x[None, :, :, :], (SPLIT // PADDED, PADDED, ROWS, UNITS))
        x = tl.reshape(x, (SPLIT, ROWS, UNITS))
    return x


@triton.jit
def sum_in_parts(x, SLOTS: tl.constexpr, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The product with load_whole_transposed() to its sum: (ROWS, UNITS)."""
    PADDED: tl.constexpr = padded(SLOTS)
    x = tl.permute(tl.reshape(x, (SPLIT // PADDED, PADDED, PADDED * UNITS // SPLIT, ROWS)), (3, 0, 2, 1))
    return sum_last(tl.reshape(x, (ROWS, UNITS, PADDED)), (ROWS, UNITS), PADDED)


@triton.jit(do_not_specialize=SIZES)
def recurrent_latency_backward_kernel(
    # As of recurrent_backward_kernel.
    dsteps,
    dends,
    weight_hh,
    vectors,
    initial,
    resets,
    steps,
    kept,
    layout,
    dr,  # of a grid SENTINEL at launch; by it programs exchange it
    dx,
    dinitial,
    dresets,
    dvectors,
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
    MODE: tl.constexpr,  # "local": one program holds all units; "grid": programs hand dr to each other
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    PAIRS: tl.constexpr,  # of words()
    MAX_SPINS: tl.constexpr,
):
    TYPE: tl.constexpr = dr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if dr.dtype.element_ty == tl.float64 else tl.float32
    G: tl.constexpr = CELL.gates
    KEPT: tl.constexpr = CELL.kept
    VECTORS: tl.constexpr = CELL.vectors
    STATES: tl.constexpr = CELL.states
    APART: tl.constexpr = len(CELL.apart)
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    SPLIT: tl.constexpr = TILES.split
    CHUNK: tl.constexpr = SPLIT * (512 // TYPE.primitive_bitwidth)  # columns of a gate that one product sums
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    # As in latency_backward.py.
    CHAINS: tl.constexpr = 1 if MODE == "local" else 4 if BLOCK_H == 16 else 2 if BLOCK_H == 32 else 1
    FORM: tl.constexpr = form(H, G, TILES, TYPE.primitive_bitwidth, PAIRS, PRECISION, MAX_SPINS)
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, False, DIRECTIONS, REVERSE, BLOCK_B, True)
    mask = rows.mask[:, None] & (units < H)[None, :]
    state = rows.states[:, None] * H + units[None, :]

    weight = weight_hh + recurrence * (G * H * H)
    if MODE == "local":
        weights = (load_whole_transposed(weight, H, G, BLOCK_H, SPLIT, PRECISION),)
    else:
        weights = load_gate_columns(weight, units, 0, CHUNKS, FORM)
    p, dp = (), ()
    if vectors is not None:
        p = load_each(vectors, recurrence * H + units[None, :], (units < H)[None, :], VECTORS, ACC)
        dp = load_each(dvectors, state, mask, VECTORS, ACC)
    if sync.zeros is not None:
        write_zeros(sync.zeros, G * H, CHUNK)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    # Of h what the equations themselves hand back: dends[0] comes in at each row's last step.
    ds = (tl.zeros(mask.shape, ACC),)
    for k in tl.static_range(1, STATES):
        ds = ds + (tl.load(dends[k] + state, mask=mask, other=0.0).to(ACC),)
    if layout.starts is not None:
        dreset = load_each(dresets, state, mask, STATES, ACC)

    # The first step, and what it takes. Its product is of zeros, made as in the loop: the compiler then has the weight
    # in only one layout.
    running = rows.mask & (step_begin < step_end)
    at = locate_clamped(rows.last - step_begin, layout, rows, running)
    before = locate_clamped(rows.last - step_begin - 1, layout, rows, step_begin < rows.last)
    at = with_starts(at, layout, rows)
    active = mask & at.mask[:, None]
    of_rows = at.rows[:, None]
    zero = tl.zeros((SPLIT, padded(G) * BLOCK_H // SPLIT if MODE == "local" else BLOCK_H, BLOCK_B), ACC)
    if MODE == "local":
        # Loaded, though all are masked: the compiler does not know.
        none = load_slots(dr + of_rows * (G * H) + units[None, :], mask & (step_begin > 0), H, G, None)
        of_next = (in_parts(none, SPLIT, PRECISION),)
    else:
        of_next = fetch(dr + at.rows * (G * H), at.mask, step_begin, sync, FORM, "zero")
    recurrent = multiply(weights, of_next, zero, PRECISION, CHAINS)
    values = ()
    if kept is not None:
        values = load_slots(kept + of_rows * (KEPT * H) + units[None, :], active, H, KEPT, None)
    s = load_before(CELL, steps, initial, resets, at, before, layout, rows, units, active, H, True)
    now = load_after(CELL, steps, of_rows * H + units[None, :], active)
    dy = load_each(dsteps, of_rows * H + units[None, :], active, STATES, None)
    dh_end = tl.load(dends[0] + state, mask=active, other=0.0)

    for step in range(step_begin, step_end):
        if MODE == "local":
            dh = sum_in_parts(recurrent, G, SPLIT, BLOCK_H, BLOCK_B)
        else:
            dh = sum_parts(recurrent, SPLIT, BLOCK_H, BLOCK_B)
        d = add_each((dh + dh_end.to(ACC) + ds[0],) + ds[1:], cast_each(dy, ACC))
        dx_t, dr_t, ds_t, dp_t = CELL.backward(cast_each(values, ACC), cast_each(s, ACC), cast_each(now, ACC), p, d)
        if layout.starts is not None:
            start = active & at.start[:, None]
            dreset = add_each(dreset, select_each(start, ds_t, zeros_like_each(ds_t)))
            ds_t = select_each(start, zeros_like_each(ds_t), ds_t)
        ds = select_each(active, ds_t, ds)
        if vectors is not None:
            dp = add_each(dp, select_each(active, dp_t, zeros_like_each(dp)))
        dr_t = cast_each(dr_t, TYPE)
        if MODE == "grid":
            dr_t = without_sentinel_each(dr_t)
        store_slots(dr + of_rows * (G * H) + units[None, :], dr_t, active, H)
        if MODE == "local":
            going_on = active if layout.starts is None else active & ~at.start[:, None]
            dr_t = select_each(going_on, dr_t, zeros_like_each(dr_t))
        if dx is not None:
            store_slots(dx + of_rows * (APART * H) + units[None, :], dx_t, active, H)
        # What the next turn takes and need not wait for; after the last one it is loaded again, and not used.
        after, at = at, with_starts(with_mask(before, layout, rows, running), layout, rows)
        next_mask = without_starts(after.mask & at.mask, after, layout)
        before = locate_clamped(rows.last - step - 2, layout, rows, step + 1 < rows.last)
        active = mask & at.mask[:, None]
        of_rows = (at.first * DIRECTIONS + rows.offsets)[:, None]
        if kept is not None:
            values = load_slots(kept + of_rows * (KEPT * H) + units[None, :], active, H, KEPT, None)
        s = load_before(CELL, steps, initial, resets, at, before, layout, rows, units, active, H, True)
        now = load_after(CELL, steps, of_rows * H + units[None, :], active)
        dy = load_each(dsteps, of_rows * H + units[None, :], active, STATES, None)
        dh_end = tl.load(dends[0] + state, mask=active & ~after.mask[:, None], other=0.0)
        if MODE == "local":
            of_next = (in_parts(dr_t, SPLIT, PRECISION),)
        else:
            of_next = behind_stores(dr + after.first * (DIRECTIONS * G * H)) + rows.offsets * (G * H)
            of_next = fetch(of_next, next_mask, step + 1, sync, FORM, "await")
        recurrent = multiply(weights, of_next, zero, PRECISION, CHAINS)

    store_each(dinitial, state, ds, mask)
    if layout.starts is not None:
        store_each(dresets, state, dreset, mask)
    if vectors is not None:
        store_each(dvectors, state, dp, mask)
