"""The forward recurrence with W_hh in registers: of few rows, h polled, or of few units in one program.

One kernel for the whole sequence. It has the loop of forward.py turned by half a step, the product of the next step
last: the compiler leaves a weight in registers across a loop only if a product before the loop has used it. Tiles are
(batch rows, units).
"""

import triton
import triton.language as tl

from .cell import cell_forward, four
from .dropout import drop
from .launch import SIZES
from .matmul import operand
from .operands import behind_stores, fetch, load_operand, multiply, sum_gates, write_zeros


@triton.jit
def load_gate_rows(
    weight,
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows of a weight (4H, H) for this program's units, gate by gate, as operands: of each chunk (SPLIT,
    4 * BLOCK_H, a part)."""
    index = tl.arange(0, 4 * BLOCK_H)
    units = tl.program_id(0) * BLOCK_H + index % BLOCK_H
    rows = weight + (index // BLOCK_H * H + units).to(tl.int64) * H
    operands = ()
    for k in tl.static_range(CHUNKS):
        operands = operands + (load_operand(rows, units < H, 1, k, H, SPLIT, K_WIDTH, PRECISION),)
    return operands


@triton.jit
def load_whole(weight, H: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """All of a weight (4H, H) as an operand. Its parts are the gates or, if these are more than four, of each gate some
    units after others: (SPLIT, units, BLOCK_H)."""
    tl.static_assert(SPLIT % 4 == 0)
    UNITS: tl.constexpr = 4 * BLOCK_H // SPLIT
    index = tl.arange(0, SPLIT)[:, None, None] * UNITS + tl.arange(0, UNITS)[None, None, :]
    columns = tl.arange(0, BLOCK_H)[None, :, None]
    at = (index // BLOCK_H * H + index % BLOCK_H) * H + columns
    x = tl.load(weight + at, mask=(index % BLOCK_H < H) & (columns < H), other=0.0)
    # Transposed, and back: Triton 3.6 would leave a weight that is loaded as it is in shared memory.
    return tl.permute(operand(x, PRECISION, True), (0, 2, 1))


@triton.jit
def for_all_parts(h, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """h (batch rows, units) as the operand of load_whole(): (SPLIT, batch rows, units)."""
    return tl.broadcast_to(operand(h, PRECISION)[None, :, :], (SPLIT, h.shape[0], h.shape[1]))


@triton.jit
def part_gates(x, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The product with load_whole() to the four gates (ROWS, UNITS): i, f, g, o."""
    return four(tl.permute(tl.reshape(x, (2, 2, UNITS, ROWS)), (3, 2, 0, 1)))


@triton.jit
def at_step(step, last, backwards, step_stride, offsets):
    """The time of a step in the direction's own order, or of its first or last step if there is none, and the first of
    its rows."""
    t = tl.minimum(tl.maximum(tl.where(backwards, last - step, step), 0), last)
    if offsets is None:
        return t, t.to(tl.int64) * step_stride
    else:
        return t, tl.load(offsets + t)


@triton.jit
def load_four(gates, at, mask, H: tl.constexpr):
    """Of all four gates what lies at the row_offsets of i: i, f, g, o."""
    i = tl.load(gates + at, mask=mask, other=0.0)
    f = tl.load(gates + at + H, mask=mask, other=0.0)
    g = tl.load(gates + at + 2 * H, mask=mask, other=0.0)
    o = tl.load(gates + at + 3 * H, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def store_four(gates, at, i, f, g, o, mask, H: tl.constexpr):
    """Stores what load_four() loads."""
    tl.store(gates + at, i, mask=mask)
    tl.store(gates + at + H, f, mask=mask)
    tl.store(gates + at + 2 * H, g, mask=mask)
    tl.store(gates + at + 3 * H, o, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def latency_forward_kernel(
    input_gates,  # (rows, D, 4H) in: x W_ih^T + b; rows = T * B, or the rows of the packed sequence; D = 1 in a stack
    weight_hh,  # (R, 4H, H) in: a matrix for each recurrence
    h0,  # (R, B, H) in
    c0,  # (R, B, H) in
    c_reset,  # (R, B, H) in: the cell from which a reset row goes on, its h being 0; only if RESET
    lengths,  # (B,) in: steps of each batch row; only if LENGTHS
    offsets,  # (T,) in: first row of each step; only if PACKED
    starts,  # (D, rows) in: the steps before which a row is reset; only if RESET
    order,  # (B,) in: the batch rows as they are dealt to programs; only if LENGTHS without PACKED
    weight_ih,  # (R - 1, 4H, H) in: of the layers above the first; only if STACK
    bias,  # (R - 1, 4H) in: of the same; only if STACK
    seed,  # (1,) in: of the dropout between layers; only if DROP
    keep,  # (1,) in: the share of units that it keeps; only if DROP
    y,  # (rows, D, H), of a stack (R, rows, H) out: h of every step, SENTINEL at launch; by it programs exchange h
    dropped,  # (R - 1, rows, H) out: y with dropout, for the layer above, SENTINEL at launch; only if DROP
    c,  # (rows, D, H), of a stack (R, rows, H) out: c of every step; only if SAVE
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H) out: activated gates; only if SAVE
    hn,  # (R, B, H) out: each row's last h
    cn,  # (R, B, H) out: each row's last cell; in between, where every step is a launch, the one after step_end
    zeros,  # (4H,) written by every program: what rows have that wait for nobody; only if some may
    timeout_info,  # (4,) out: who waited in vain; only if MAX_SPINS
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not PACKED
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # first recurrence of this launch
    row_begin,  # first batch row of this launch, a multiple of BLOCK_B
    step_begin,  # steps [step_begin, step_end) in the direction's own order; layer r of a stack is r steps behind
    step_end,
    H: tl.constexpr,
    LOCAL: tl.constexpr,  # one program holds all units and exchanges nothing
    GRID: tl.constexpr,  # programs hand h to each other; neither: one launch a step
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
    DIRECTIONS: tl.constexpr,  # D; of two the second runs from the last step to the first
    REVERSE: tl.constexpr,  # a single direction runs so
    LENGTHS: tl.constexpr,  # each batch row has its own length
    PACKED: tl.constexpr,  # rows of a PackedSequence: the steps have ever fewer; with LENGTHS
    RESET: tl.constexpr,  # rows are reset within the sequence
    STACK: tl.constexpr,  # the recurrences are layers, not directions
    DROP: tl.constexpr,  # dropout between the layers
    SAVE: tl.constexpr,  # keep c and gates for backward
    DOT: tl.constexpr,  # dtype of the matrix operands
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    BLOCK_B: tl.constexpr,  # batch rows of a program
    BLOCK_H: tl.constexpr,  # hidden units of a program
    SPLIT: tl.constexpr,  # warps of a program, each of which sums a part of every chunk
    K_WIDTH: tl.constexpr,  # of in_registers()
    PAIRS: tl.constexpr,  # of words()
):
    ACC: tl.constexpr = cn.dtype.element_ty
    CHUNK: tl.constexpr = SPLIT * (512 // y.dtype.element_ty.primitive_bitwidth)  # columns that one product sums
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    LATE: tl.constexpr = LENGTHS and (DIRECTIONS > 1 or REVERSE) and not LOCAL  # rows may begin after others
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    real_units = units < H
    # Past the last batch row a program computes this once more, and stores nothing.
    rows = row_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    real_rows = rows < B
    rows = tl.minimum(rows, B - 1).to(tl.int64)
    if LENGTHS and not PACKED:
        rows = tl.load(order + rows)
    mask = real_rows[:, None] & real_units[None, :]
    states = recurrence * B + rows  # the recurrence's rows in a (R, B, H) tensor
    state = states[:, None] * H + units[None, :]

    # Where this recurrence's rows lie among those of all: step t's at row_offsets, from the step's first on.
    batch_offsets = rows * row_stride
    row_offsets = batch_offsets * DIRECTIONS + recurrence
    backwards = recurrence > 0 if DIRECTIONS > 1 else REVERSE
    first_layer = True
    if STACK:
        first_layer = recurrence == 0
        row_offsets = recurrence * total_rows + batch_offsets
    of_weight = weight_hh + recurrence * (4 * H * H)
    if LOCAL:
        weights = (load_whole(of_weight, H, BLOCK_H, SPLIT, PRECISION),)
    else:
        weights = load_gate_rows(of_weight, H, CHUNKS, BLOCK_H, SPLIT, K_WIDTH, PRECISION)
    if STACK:
        above = recurrence > 0
        below = tl.maximum(recurrence - 1, 0)
        below_row_offsets = row_offsets - total_rows
        below_y = dropped if DROP else y
        of_weight = weight_ih + below * (4 * H * H)
        weights_below = load_gate_rows(of_weight, H, CHUNKS, BLOCK_H, SPLIT, K_WIDTH, PRECISION)
        bias_i, bias_f, bias_g, bias_o = load_four(bias + below * (4 * H), units, real_units & above, H)
        step_begin = tl.maximum(step_begin - recurrence.to(tl.int32), 0)
        step_end = tl.minimum(step_end - recurrence.to(tl.int32), T)
    if zeros is not None:
        write_zeros(zeros, H, CHUNK)

    last = T - 1
    if LENGTHS:
        length = tl.load(lengths + rows).to(tl.int32)
        last = tl.max(length) - 1
        step_end = tl.minimum(step_end, last + 1)
    c_tile = tl.load(c0 + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if not (LOCAL or GRID):
        c_tile += tl.load(cn + state, mask=mask & (step_begin > 0), other=0.0)
    if RESET:
        c_reset_tile = tl.load(c_reset + state, mask=mask, other=0.0)
        starts += batch_offsets if STACK else recurrence * total_rows + batch_offsets

    # The first step's product, with h0 or with what the launch before has left.
    t, step_offset = at_step(step_begin, last, backwards, step_stride, offsets)
    t_next, next_step_offset = at_step(step_begin + 1, last, backwards, step_stride, offsets)
    active_rows = real_rows & (step_begin < step_end)
    next_rows = active_rows
    if LENGTHS:
        active_rows = active_rows & (t < length)
        next_rows = next_rows & (t_next < length)
    h_rows = h0 + states * H
    if LOCAL:
        h_tile = tl.load(h0 + state, mask=mask, other=0.0)
    elif not GRID:
        t_prev, prev_step_offset = at_step(step_begin - 1, last, backwards, step_stride, offsets)
        has_prev = active_rows & (step_begin > 0)
        if LENGTHS:
            has_prev = has_prev & (t_prev < length)
        h_rows = tl.where(has_prev, y + (prev_step_offset * DIRECTIONS + row_offsets) * H, h_rows)
    # Fetched as in the loop: the compiler then has the weight in one layout alone.
    if LOCAL:
        x = (for_all_parts(h_tile, SPLIT, PRECISION),)
    else:
        x = fetch(
            h_rows, None, None, step_begin, timeout_info, "load", H, CHUNKS, SPLIT, K_WIDTH, PAIRS, PRECISION, MAX_SPINS
        )
    zero = tl.zeros((SPLIT, 4 * BLOCK_H // SPLIT if LOCAL else 4 * BLOCK_H, BLOCK_B), ACC)
    recurrent = multiply(weights, x, zero, DOT, PRECISION)
    if RESET:
        start = tl.load(starts + step_offset, mask=active_rows, other=0) != 0
        start_next = tl.load(starts + next_step_offset, mask=next_rows, other=0) != 0
        recurrent = tl.where(start[None, None, :], 0.0, recurrent)
    if LATE:
        # Of rows that begin later this is the product of their first step.
        first_i, first_f, first_g, first_o = sum_gates(recurrent, SPLIT, BLOCK_H, BLOCK_B)
        late_rows = real_rows != real_rows
    if STACK:
        awaited = (
            below_y + step_offset * H + below_row_offsets * H,
            active_rows & above,
            zeros,
            step_begin + 1,
            timeout_info,
        )
        x = fetch(*awaited, "await", H, CHUNKS, SPLIT, K_WIDTH, PAIRS, PRECISION, MAX_SPINS)
        recurrent = multiply(weights_below, x, recurrent, DOT, PRECISION)
    active = mask & active_rows[:, None]
    gate = (step_offset * DIRECTIONS + row_offsets)[:, None] * (4 * H) + units[None, :]
    pre_i, pre_f, pre_g, pre_o = load_four(input_gates, gate, active & first_layer, H)

    for step in range(step_begin, step_end):
        if LOCAL:
            rec_i, rec_f, rec_g, rec_o = part_gates(recurrent, BLOCK_H, BLOCK_B)
        else:
            rec_i, rec_f, rec_g, rec_o = sum_gates(recurrent, SPLIT, BLOCK_H, BLOCK_B)
        if STACK:
            rec_i += bias_i.to(ACC)[None, :]
            rec_f += bias_f.to(ACC)[None, :]
            rec_g += bias_g.to(ACC)[None, :]
            rec_o += bias_o.to(ACC)[None, :]
        if RESET:
            c_tile = tl.where(start[:, None], c_reset_tile, c_tile)
        of_i, of_f, of_g, of_o = pre_i.to(ACC), pre_f.to(ACC), pre_g.to(ACC), pre_o.to(ACC)
        if LATE:  # rows of which this is the first step have waited for nobody: their product is zero
            of_i += tl.where(late_rows[:, None], first_i, 0.0)
            of_f += tl.where(late_rows[:, None], first_f, 0.0)
            of_g += tl.where(late_rows[:, None], first_g, 0.0)
            of_o += tl.where(late_rows[:, None], first_o, 0.0)
        i, f, g, o, c_next, h = cell_forward(rec_i + of_i, rec_f + of_f, rec_g + of_g, rec_o + of_o, c_tile)
        c_tile = tl.where(active, c_next, c_tile)
        h = h.to(y.dtype.element_ty)
        hidden = (step_offset * DIRECTIONS + row_offsets)[:, None] * H + units[None, :]
        tl.store(y + hidden, h, mask=active)
        if DROP:
            h_dropped = drop(h, seed, keep, recurrence, t, rows[:, None] * H + units[None, :])
            tl.store(dropped + hidden, h_dropped, mask=active & (recurrence < tl.num_programs(2) - 1))

        # What the next step takes, as far as it waits for nobody; behind the last one this once more, for nothing.
        awaited_rows = active_rows & next_rows
        if RESET:
            awaited_rows = awaited_rows & ~start_next
        next = mask & next_rows[:, None]
        gate_next = (next_step_offset * DIRECTIONS + row_offsets)[:, None] * (4 * H) + units[None, :]
        if LOCAL or GRID:
            pre_i, pre_f, pre_g, pre_o = load_four(input_gates, gate_next, next & first_layer, H)
        if SAVE:
            tl.store(c + hidden, c_next, mask=active)
            store_four(gates, gate, i, f, g, o, active, H)
        if LOCAL:
            h_tile = tl.where(active, h, h_tile)
            if RESET:
                h_tile = tl.where(start_next[:, None], 0.0, h_tile)
            x = (for_all_parts(h_tile, SPLIT, PRECISION),)
            recurrent = multiply(weights, x, zero, DOT, PRECISION)
        if GRID:
            recurrent = zero
            if STACK:
                # The layer below is ahead: its part of the sum is made while this layer's own h is on the way.
                x_rows = behind_stores(below_y + next_step_offset * H) + below_row_offsets * H
                awaited = x_rows, next_rows & above, zeros, step + 2, timeout_info
                x = fetch(*awaited, "await", H, CHUNKS, SPLIT, K_WIDTH, PAIRS, PRECISION, MAX_SPINS)
                recurrent = multiply(weights_below, x, recurrent, DOT, PRECISION)
            h_rows = behind_stores(y + step_offset * (DIRECTIONS * H)) + row_offsets * H
            x = fetch(
                h_rows,
                awaited_rows,
                zeros,
                step + 1,
                timeout_info,
                "await",
                H,
                CHUNKS,
                SPLIT,
                K_WIDTH,
                PAIRS,
                PRECISION,
                MAX_SPINS,
            )
            recurrent = multiply(weights, x, recurrent, DOT, PRECISION)
        if LATE:
            late_rows = next_rows & ~active_rows
            if RESET:
                late_rows = late_rows & ~start_next
        t, step_offset, active_rows, active, gate = t_next, next_step_offset, next_rows, next, gate_next
        # A step ahead, because addresses that wait for these loads would make everyone wait.
        t_next, next_step_offset = at_step(step + 2, last, backwards, step_stride, offsets)
        if LENGTHS:
            next_rows = real_rows & (t_next < length)
        if RESET:
            start = start_next
            start_next = tl.load(starts + next_step_offset, mask=next_rows, other=0) != 0

    tl.store(cn + state, c_tile, mask=mask)
    # From this program's part of y, which may be of other threads than these.
    tl.debug_barrier()
    steps = T
    if LENGTHS:
        steps = length
    end = tl.where(backwards, 0, steps - 1)
    step_offset = end.to(tl.int64) * step_stride if offsets is None else tl.load(offsets + end, mask=real_rows, other=0)
    h_rows = tl.where(steps > 0, y + (step_offset * DIRECTIONS + row_offsets) * H, h0 + states * H)
    h = tl.load(h_rows[:, None] + units[None, :], mask=mask, other=0.0)
    tl.store(hn + state, h, mask=mask)
