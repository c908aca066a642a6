"""The forward recurrence of large batches.

A program has the rows of W_hh of its units and goes over several row tiles at every step, one after another: what a
tile waits for has been written while the others had their turn. forward.py launches it.
"""

import triton
import triton.language as tl

from .cell import cell_forward
from .gates import add_gates, four, load_gates, store_gates
from .launch import SIZES
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .row_tiles import ends, part_of, row_of, rows_from, still_running
from .rows import Sizes, locate, time_before, time_of, with_starts, without_starts
from .sync import publish, wait_if


@triton.jit
def gate_rows_of_thread(H: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows of W_hh (4H, ...) for this program's units; 4H past the last unit: (4 * BLOCK_H,).

    Bit 3 and the highest one of a row's number say which gate it is: in the sum of a product on tensor cores a thread
    has the rows that differ in these alone, so that a unit's four gates meet without leaving it."""
    row = tl.arange(0, 4 * BLOCK_H)
    gate = row // 8 % 2 + row // (2 * BLOCK_H) * 2
    units = tl.program_id(0) * BLOCK_H + row % (2 * BLOCK_H) // 16 * 8 + row % 8
    return tl.where(units < H, gate * H + units, 4 * H)


@triton.jit
def gates_of_thread(x, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """A sum (4 * UNITS, ROWS) of gate_rows_of_thread() to four tiles (UNITS, ROWS)."""
    x = tl.permute(tl.reshape(x, (2, UNITS // 8, 2, 8, ROWS)), (1, 3, 4, 0, 2))
    return four(tl.reshape(x, (UNITS, ROWS, 2, 2)))


@triton.jit(do_not_specialize=SIZES)
def throughput_forward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence
    input_gates,  # (rows, D, 4H): x W_ih^T + b
    weight_hh,  # (D, 4H, H)
    h0,  # (D, B, H)
    c_reset,  # (D, B, H): the cell from which a reset row goes on, its h being 0; only with layout.starts
    layout,  # a LayoutTensors
    # Outputs
    y,  # (rows, D, H): h of every step; also the buffer by which programs exchange it
    c,  # (rows, D, H): c of every step; None: nothing is kept for backward
    gates,  # (rows, D, 4H): activated gates; as c
    hn,  # (D, B, H): each row's last h; at launch h0
    cn,  # (D, B, H): the cells of the last step so far; at launch c0
    sync,  # a Sync, whose flags count by row tile
    # Sizes
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not packed
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # of this launch
    row_begin,  # 0: a launch has all batch rows
    step_begin,  # steps [step_begin, step_end) in the direction's own order
    step_end,
    H: tl.constexpr,
    # Form
    MODE: tl.constexpr,  # "grid": programs hand h to each other; "step": one launch a step
    DIRECTIONS: tl.constexpr,  # D; of two the second runs from the last step to the first
    REVERSE: tl.constexpr,  # a single direction runs so
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.forward
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = cn.dtype.element_ty
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    PART: tl.constexpr = TILES.part
    OF_OWN: tl.constexpr = shape(H, 4 * H, TILES.chunk)
    RESIDENT: tl.constexpr = OF_OWN.CHUNKS if TILES.kept == 0 else TILES.kept
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    own = Weight(weight_hh + recurrence * (4 * H * H), gate_rows_of_thread(H, BLOCK_H), 0)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    running = tl.cdiv(B, BLOCK_B)
    flags, steps = sync.flags, T.to(tl.int64)
    if MODE == "grid":
        flags += recurrence * running * steps

    for step in range(step_begin, step_end):
        running = still_running(running, step, layout, BLOCK_B)
        for tile in range(tl.program_id(1), running, tl.num_programs(1)):
            rows = rows_from(tile * BLOCK_B, layout, sizes, recurrence, DIRECTIONS, REVERSE, BLOCK_B)
            at = with_starts(locate(time_of(step, rows), layout, rows, rows.mask, True), layout, rows)
            before = locate(time_before(at.t, rows), layout, rows, step > 0, step > 0)
            h_rows = row_of(before.mask, y, before.rows, h0, rows.states, H)
            if MODE == "grid":
                wait_if(step > 0, flags + tile * steps, step, sync.timeout_info, MAX_SPINS, 1)
            h_mask = without_starts(at.mask, at, layout)
            recurrent = recurrent_matmul(own, own_chunks, h_rows, h_mask, OF_OWN, ACC, PRECISION)  # (1)
            for k in tl.static_range(BLOCK_B // PART):
                first = tile * BLOCK_B + k * PART
                of_part = rows_from(first, layout, sizes, recurrence, DIRECTIONS, REVERSE, PART)
                at_part = with_starts(locate(at.t, layout, of_part, of_part.mask, True), layout, of_part)
                active = (units < H)[:, None] & at_part.mask[None, :]
                state = of_part.states[None, :] * H + units[:, None]
                gate = at_part.rows[None, :] * (4 * H) + units[:, None]
                hidden = at_part.rows[None, :] * H + units[:, None]
                from_input = load_gates(input_gates + gate, active, H)
                c_prev = tl.load(cn + state, mask=active, other=0.0)
                if layout.starts is not None:
                    start = at_part.start[None, :]
                    c_prev = tl.where(start, tl.load(c_reset + state, mask=active & start, other=0.0), c_prev)
                sums = gates_of_thread(part_of(recurrent, k, BLOCK_B // PART), BLOCK_H, PART)
                activated, c_next, h = cell_forward(add_gates(sums, from_input), c_prev)
                h = h.to(y.dtype.element_ty)
                tl.store(y + hidden, h, mask=active)
                tl.store(cn + state, c_next, mask=active)
                tl.store(hn + state, h, mask=active & ends(at_part, of_part)[None, :])
                if c is not None:
                    tl.store(c + hidden, c_next, mask=active)
                    store_gates(gates + gate, activated, active, H)
            if MODE == "grid":
                publish(flags + tile * steps + step)
