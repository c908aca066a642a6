"""The backward recurrence of large batches, in the loop of throughput_forward.py, backwards in time.

backward.py launches it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gates import cast_gates, load_gates, store_gates
from .launch import SIZES
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .row_tiles import Batch, part_of, row_of, rows_from, still_running
from .rows import Rows, Sizes, locate_neighbours, without_starts
from .saved import cut, load_dh
from .short_cell import short_cell_backward
from .sync import publish, wait_if


class Saved(NamedTuple):
    """Tensors that forward saved, and the gradients that come from outside: see the kernel's."""

    gates: Any
    c: Any
    c0: Any
    c_reset: Any
    dy: Any
    dhn: Any
    dc_steps: Any


class Part(NamedTuple):
    """A part of a tile before its cells are computed: (units, rows) each, but for start."""

    active: Any  # which cells there are
    state: Any  # where they lie in (D, B, H)
    gate: Any  # in (rows, D, 4H)
    start: Any  # (rows,): which are reset before the step
    gates: Any  # Gates
    c_prev: Any
    c: Any
    dh: Any  # in y and hn, not in the step after
    dc: Any


@triton.jit
def of_tile(rows, tile):
    """Rows whose steps are counted by the longest row of their whole tile."""
    place = rows.states, rows.offsets, rows.start_offsets, rows.step_stride, rows.backwards, rows.DIRECTIONS
    return Rows(rows.batch, rows.mask, rows.length, tile.last, *place)


@triton.jit
def load_part(k, tile, step, of, batch, units, saved, dc0, H: tl.constexpr, TILES: tl.constexpr):
    """Part k of a tile, whose Rows are `of`."""
    ACC: tl.constexpr = dc0.dtype.element_ty
    rows = of_tile(rows_from(tile * TILES.batch + k * TILES.part, batch, TILES.part), of)
    at, after, before = locate_neighbours(step, batch.layout, rows)
    units = units[:, None]
    active = (units < H) & at.mask[None, :]
    state, hidden = rows.states[None, :] * H + units, at.rows[None, :] * H + units
    gate = at.rows[None, :] * (4 * H) + units
    gates = cast_gates(load_gates(saved.gates + gate, active, H), ACC)
    c = tl.load(saved.c + hidden, mask=active, other=0.0)
    c_rows = row_of(before.mask, saved.c, before.rows, saved.c0, rows.states, H)
    if batch.layout.starts is not None:
        c_rows = tl.where(at.start, saved.c_reset + rows.states * H, c_rows)
    c_prev = tl.load(c_rows[None, :] + units, mask=active, other=0.0)
    dy, dhn = load_dh(saved.dy + hidden, active, saved.dhn + state, active & (~after.mask)[None, :])
    dc = tl.load(dc0 + state, mask=active, other=0.0)
    if saved.dc_steps is not None:
        dc += tl.load(saved.dc_steps + hidden, mask=active, other=0.0).to(ACC)
    return Part(active, state, gate, at.start, gates, c_prev, c, dy.to(ACC) + dhn.to(ACC), dc)


@triton.jit(do_not_specialize=SIZES)
def throughput_backward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence
    dy,  # (rows, D, H)
    dhn,  # (D, B, H): gradient of each row's last h
    weight_hh,  # (D, 4H, H)
    c0,  # (D, B, H)
    c,  # (rows, D, H): saved by forward
    gates,  # (rows, D, 4H): saved by forward
    dc_steps,  # as c: gradient of c of every step, beside its part in h; None: there is none
    c_reset,  # (D, B, H): the cell from which a reset row goes on; only with layout.starts
    layout,  # a LayoutTensors
    # Outputs
    dgates,  # as gates: w.r.t. the pre-activations; also the buffer through which programs exchange it
    dc0,  # (D, B, H): gradient of the cell before the last step so far; at launch that of each row's last cell
    dc_reset,  # (D, B, H): gradient of c_reset, summed over the resets; as c_reset, at launch 0
    sync,  # a Sync, whose flags count by row tile
    # Sizes
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not packed
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # of this launch
    row_begin,  # 0: a launch has all batch rows
    step_begin,  # steps [step_begin, step_end) in the order of this pass, from the direction's last to its first
    step_end,
    H: tl.constexpr,
    # Form
    MODE: tl.constexpr,  # "grid": programs hand dgates to each other; "step": one launch a step
    DIRECTIONS: tl.constexpr,  # D; of two the second ran from the last step to the first
    REVERSE: tl.constexpr,  # a single direction ran so, and this pass runs from the first
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.backward
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = dc0.dtype.element_ty
    BLOCK_B: tl.constexpr = TILES.batch
    UNITS: tl.constexpr = TILES.units
    PART: tl.constexpr = TILES.part
    PARTS: tl.constexpr = BLOCK_B // PART
    OF_OWN: tl.constexpr = shape(H, H, TILES.chunk, True, 4)
    RESIDENT: tl.constexpr = OF_OWN.CHUNKS if TILES.kept == 0 else TILES.kept
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    batch = Batch(layout, Sizes(T, B, total_rows, step_stride, row_stride), recurrence, DIRECTIONS, REVERSE)
    saved = Saved(gates, c, c0, c_reset, dy, dhn, dc_steps)
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    own = Weight(weight_hh + recurrence * (4 * H * H), units, 0)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    running = tl.cdiv(B, BLOCK_B)
    flags, steps = sync.flags, T.to(tl.int64)
    if MODE == "grid":
        flags += recurrence * running * steps

    for step in range(step_begin, step_end):
        running = still_running(running, step, layout, BLOCK_B)
        for tile in range(tl.program_id(1), running, tl.num_programs(1)):
            rows = rows_from(tile * BLOCK_B, batch, BLOCK_B)
            _, after, _ = locate_neighbours(step, layout, rows)
            next_rows, next_mask = dgates + after.rows * (4 * H), without_starts(after.mask, after, layout)
            if MODE == "grid":
                wait_if(step > 0, flags + tile * steps, step, sync.timeout_info, MAX_SPINS, 1)
            sum = recurrent_matmul(own, own_chunks, next_rows, next_mask, OF_OWN, ACC, PRECISION)
            next = load_part(0, tile, step, rows, batch, units, saved, dc0, H, TILES)
            sums = tl.reshape(tl.permute(tl.reshape(sum, (UNITS, PARTS, PART)), (1, 0, 2)), (PARTS, UNITS * PART))
            for k in tl.static_range(PARTS):
                part = next
                if k + 1 < PARTS:  # while the cells of this part are computed
                    next = load_part(k + 1, tile, step, rows, batch, units, saved, dc0, H, TILES)
                dh = tl.reshape(part_of(sums, k, PARTS), (UNITS, PART)) + part.dh  # (5)
                dgates_t, dc_prev = short_cell_backward(part.gates, part.c_prev, part.c, dh, part.dc)
                if layout.starts is not None:
                    dc_reset_t = tl.load(dc_reset + part.state, mask=part.active, other=0.0)
                    dc_prev, dc_reset_t = cut(part.start[None, :], dc_prev, dc_reset_t)
                    tl.store(dc_reset + part.state, dc_reset_t, mask=part.active)
                tl.store(dc0 + part.state, dc_prev, mask=part.active)
                store_gates(dgates + part.gate, dgates_t, part.active, H)
            if MODE == "grid":
                publish(flags + tile * steps + step)
