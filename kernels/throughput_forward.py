"""The forward recurrence of large batches.

A program has the rows of W_hh of its units and goes over several row tiles at every step, one after another: what a
tile waits for has been written while the others had their turn. A tile's cells are computed part by part, some batch
rows by 32 bytes of units, while what the next part needs is loaded. forward.py launches it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gates import add_gates, four, load_gates, store_gates
from .launch import SIZES
from .matmul import Weight, load_chunk, load_chunks, load_columns, operand, shape, widened
from .row_tiles import Batch, part_of, row_of, rows_from, still_running
from .rows import Sizes, locate, time_before, time_of, with_starts, without_starts
from .short_cell import short_cell_forward
from .sync import publish, wait_if


class Part(NamedTuple):
    """A part of a tile before its cells are computed: (rows, units) each, but for ends."""

    active: Any  # which cells there are
    state: Any  # where they lie in (D, B, H)
    hidden: Any  # in (rows, D, H)
    gate: Any  # in (rows, D, 4H)
    ends: Any  # (rows, 1): which rows have their last step
    from_input: Any  # Gates
    c_prev: Any


@triton.constexpr_function
def span(dtype):
    """Units of a part: 32 bytes, of which four threads have 8 each."""
    return max(8, 256 // dtype.primitive_bitwidth)


@triton.jit
def rows_of_product(tile, batch, BLOCK_B: tl.constexpr):
    """The Rows of a tile in the order of a product's rows. Of every 16 of these a thread has two, 8 apart, which this
    order puts into different halves of the tile: a part has one of them."""
    row = tl.arange(0, BLOCK_B)
    order = row // 8 % 2 * (BLOCK_B // 2) + row // 16 * 8 + row % 8
    return rows_from(tile * BLOCK_B + order - row, batch, BLOCK_B)


@triton.jit
def gate_rows_of_thread(H: tl.constexpr, BLOCK_H: tl.constexpr, SPAN: tl.constexpr):
    """The rows of W_hh (4H, ...) for this program's units; 4H past the last unit: (4 * BLOCK_H,).

    Of every eight columns of a product's sum on tensor cores a thread has the same two. In this order they are the four
    gates of units that lie side by side, 8 bytes of each span(): it computes their cells, loads and stores alone."""
    OF_THREAD: tl.constexpr = SPAN // 4
    row = tl.arange(0, 4 * BLOCK_H)
    unit = row // 2 % 4 * OF_THREAD + row // 8 % (OF_THREAD // 2) * 2 + row % 2 + row // (4 * SPAN) * SPAN
    units = tl.program_id(0) * BLOCK_H + unit
    return tl.where(units < H, row // SPAN % 4 * H + units, 4 * H)


@triton.jit
def add_product(sum, weight, x, PRECISION: tl.constexpr, PIPELINED: tl.constexpr = False):
    """matmul.dot() the other way round, the weight being transposed already: sum + x^T weight."""
    x = operand(x, PRECISION, PIPELINED)
    return tl.dot(tl.trans(widened(x)), weight, sum, input_precision=PRECISION, out_dtype=sum.dtype)


@triton.jit
def transposed(chunks):
    """Chunks of a weight as add_product() takes them."""
    columns = ()
    for k in tl.static_range(len(chunks)):
        columns = columns + (tl.trans(widened(chunks[k])),)
    return columns


@triton.jit
def tile_matmul(weight, resident, rows, mask, SHAPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """matmul.recurrent_matmul() the other way round: (batch rows, units)."""
    RESIDENT: tl.constexpr = len(resident)
    sum = tl.zeros((mask.shape[0], weight.units.shape[0]), ACC)
    x = load_columns(rows, mask, 0, SHAPE.K, SHAPE.BLOCK_K)
    for k in tl.static_range(RESIDENT):
        x_k = x
        if k + 1 < RESIDENT:
            x = load_columns(rows, mask, k + 1, SHAPE.K, SHAPE.BLOCK_K)
        sum = add_product(sum, resident[k], x_k, PRECISION)
    if RESIDENT < SHAPE.CHUNKS:
        for k in tl.range(RESIDENT, SHAPE.CHUNKS, num_stages=3):
            chunk = tl.trans(widened(load_chunk(weight, k, SHAPE, PRECISION, True)))
            sum = add_product(sum, chunk, load_columns(rows, mask, k, SHAPE.K, SHAPE.BLOCK_K), PRECISION, True)
    return sum


@triton.jit
def in_parts(sum, TILES: tl.constexpr, SPAN: tl.constexpr):
    """A sum of tile_matmul() as the parts that load_part() loads: (parts, rows * units * gates)."""
    SPANS: tl.constexpr = TILES.units // SPAN
    x = tl.permute(tl.reshape(sum, (TILES.batch // 16, 2, 8, SPANS, 4 * SPAN)), (1, 0, 2, 3, 4))
    x = tl.permute(tl.reshape(x, (TILES.batch // TILES.part, TILES.part, SPANS, 4 * SPAN)), (0, 2, 1, 3))
    return tl.reshape(x, (TILES.batch // TILES.part * SPANS, TILES.part * 4 * SPAN))


@triton.jit
def gates_of_thread(x, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """A part of a sum as four tiles (ROWS, SPAN), its columns being gate_rows_of_thread()."""
    x = tl.permute(tl.reshape(x, (ROWS, 2, 2, SPAN // 8, 4, 2)), (0, 4, 3, 5, 1, 2))
    return four(tl.reshape(x, (ROWS, SPAN, 2, 2)))


@triton.jit
def load_part(k, tile, t, batch, input_gates, cn, c_reset, H: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr):
    """Part k of a tile at time t: the first rows' spans of units come first, then the next rows'."""
    SPANS: tl.constexpr = TILES.units // SPAN
    rows = rows_from(tile * TILES.batch + k // SPANS * TILES.part, batch, TILES.part)
    at = with_starts(locate(t, batch.layout, rows, rows.mask, True), batch.layout, rows)
    units = tl.program_id(0) * TILES.units + k % SPANS * SPAN + tl.arange(0, SPAN)[None, :]
    active = at.mask[:, None] & (units < H)
    state, hidden = rows.states[:, None] * H + units, at.rows[:, None] * H + units
    gate = at.rows[:, None] * (4 * H) + units
    ends = rows.mask & (t == tl.where(rows.backwards, 0, rows.length - 1))
    c_prev = tl.load(cn + state, mask=active, other=0.0)
    if batch.layout.starts is not None:
        start = at.start[:, None]
        c_prev = tl.where(start, tl.load(c_reset + state, mask=active & start, other=0.0), c_prev)
    return Part(active, state, hidden, gate, ends[:, None], load_gates(input_gates + gate, active, H), c_prev)


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
    SPAN: tl.constexpr = span(y.dtype.element_ty)
    PARTS: tl.constexpr = BLOCK_B // TILES.part * (TILES.units // SPAN)
    OF_OWN: tl.constexpr = shape(H, 4 * H, TILES.chunk)
    RESIDENT: tl.constexpr = OF_OWN.CHUNKS if TILES.kept == 0 else TILES.kept
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    batch = Batch(layout, Sizes(T, B, total_rows, step_stride, row_stride), recurrence, DIRECTIONS, REVERSE)
    own = Weight(weight_hh + recurrence * (4 * H * H), gate_rows_of_thread(H, TILES.units, SPAN), 0)
    own_chunks = transposed(load_chunks(own, RESIDENT, OF_OWN, PRECISION))
    running = tl.cdiv(B, BLOCK_B)
    flags, steps = sync.flags, T.to(tl.int64)
    if MODE == "grid":
        flags += recurrence * running * steps

    for step in range(step_begin, step_end):
        running = still_running(running, step, layout, BLOCK_B)
        for tile in range(tl.program_id(1), running, tl.num_programs(1)):
            rows = rows_of_product(tile, batch, BLOCK_B)
            at = with_starts(locate(time_of(step, rows), layout, rows, rows.mask, True), layout, rows)
            before = locate(time_before(at.t, rows), layout, rows, step > 0, step > 0)
            h_rows = row_of(before.mask, y, before.rows, h0, rows.states, H)
            h_mask = without_starts(at.mask, at, layout)
            if MODE == "grid":
                wait_if(step > 0, flags + tile * steps, step, sync.timeout_info, MAX_SPINS, 1)
            sum = tile_matmul(own, own_chunks, h_rows, h_mask, OF_OWN, ACC, PRECISION)  # (1)
            next = load_part(0, tile, at.t, batch, input_gates, cn, c_reset, H, TILES, SPAN)
            sums = in_parts(sum, TILES, SPAN)
            for k in tl.static_range(PARTS):
                part = next
                if k + 1 < PARTS:  # while the cells of this part are computed
                    next = load_part(k + 1, tile, at.t, batch, input_gates, cn, c_reset, H, TILES, SPAN)
                pre = add_gates(gates_of_thread(part_of(sums, k, PARTS), TILES.part, SPAN), part.from_input)
                activated, c_next, h = short_cell_forward(pre, part.c_prev)
                h = h.to(y.dtype.element_ty)
                tl.store(y + part.hidden, h, mask=part.active)
                tl.store(cn + part.state, c_next, mask=part.active)
                tl.store(hn + part.state, h, mask=part.active & part.ends)
                if c is not None:
                    tl.store(c + part.hidden, c_next, mask=part.active)
                    store_gates(gates + part.gate, activated, part.active, H)
            if MODE == "grid":
                publish(flags + tile * steps + step)
