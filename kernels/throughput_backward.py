"""The backward recurrence of large batches, in the loop of throughput_forward.py, backwards in time.

backward.py launches it.
"""

import triton
import triton.language as tl

from .cell import cell_backward
from .gates import cast_gates, load_gates, store_gates
from .launch import SIZES
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .row_tiles import of_tile, part_of, row_of, rows_from, still_running
from .rows import Sizes, locate_neighbours, without_starts
from .saved import cut, load_dh
from .sync import publish, wait_if


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
    BLOCK_H: tl.constexpr = TILES.units
    PART: tl.constexpr = TILES.part
    OF_OWN: tl.constexpr = shape(H, H, TILES.chunk, True, 4)
    RESIDENT: tl.constexpr = OF_OWN.CHUNKS if TILES.kept == 0 else TILES.kept
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    own = Weight(weight_hh + recurrence * (4 * H * H), units, 0)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    running = tl.cdiv(B, BLOCK_B)
    flags, steps = sync.flags, T.to(tl.int64)
    if MODE == "grid":
        flags += recurrence * running * steps

    for step in range(step_begin, step_end):
        running = still_running(running, step, layout, BLOCK_B)
        for tile in range(tl.program_id(1), running, tl.num_programs(1)):
            rows = rows_from(tile * BLOCK_B, layout, sizes, recurrence, DIRECTIONS, REVERSE, BLOCK_B)
            _, after, _ = locate_neighbours(step, layout, rows)
            if MODE == "grid":
                wait_if(step > 0, flags + tile * steps, step, sync.timeout_info, MAX_SPINS, 1)
            next_rows, next_mask = dgates + after.rows * (4 * H), without_starts(after.mask, after, layout)
            recurrent = recurrent_matmul(own, own_chunks, next_rows, next_mask, OF_OWN, ACC, PRECISION)
            for k in tl.static_range(BLOCK_B // PART):
                first = tile * BLOCK_B + k * PART
                of_part = of_tile(rows_from(first, layout, sizes, recurrence, DIRECTIONS, REVERSE, PART), rows)
                at, after, before = locate_neighbours(step, layout, of_part)
                active = (units < H)[:, None] & at.mask[None, :]
                state = of_part.states[None, :] * H + units[:, None]
                gate = at.rows[None, :] * (4 * H) + units[:, None]
                hidden = at.rows[None, :] * H + units[:, None]
                saved = load_gates(gates + gate, active, H)
                c_t = tl.load(c + hidden, mask=active, other=0.0)
                c_rows = row_of(before.mask, c, before.rows, c0, of_part.states, H)
                if layout.starts is not None:
                    c_rows = tl.where(at.start, c_reset + of_part.states * H, c_rows)
                c_prev = tl.load(c_rows[None, :] + units[:, None], mask=active, other=0.0)
                dy_t, dhn_t = load_dh(dy + hidden, active, dhn + state, active & (~after.mask)[None, :])
                dc = tl.load(dc0 + state, mask=active, other=0.0)
                if dc_steps is not None:
                    dc += tl.load(dc_steps + hidden, mask=active, other=0.0).to(ACC)
                dh = part_of(recurrent, k, BLOCK_B // PART) + (dy_t.to(ACC) + dhn_t.to(ACC))  # (5)
                dgates_t, dc_prev = cell_backward(cast_gates(saved, ACC), c_prev, c_t, dh, dc)
                if layout.starts is not None:
                    dc_reset_t = tl.load(dc_reset + state, mask=active, other=0.0)
                    dc_prev, dc_reset_t = cut(at.start[None, :], dc_prev, dc_reset_t)
                    tl.store(dc_reset + state, dc_reset_t, mask=active)
                tl.store(dc0 + state, dc_prev, mask=active)
                store_gates(dgates + gate, dgates_t, active, H)
            if MODE == "grid":
                publish(flags + tile * steps + step)
