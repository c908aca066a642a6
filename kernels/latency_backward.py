"""The backward recurrence with W_hh in registers: of few rows, dgates polled, or of few units in one program.

One kernel for the whole sequence. It has the loop of backward.py turned by half a step, as latency_forward.py that of
forward.py. Tiles are (batch rows, units).
"""

import triton
import triton.language as tl

from .cell import cell_backward
from .dropout import drop
from .latency_forward import at_step, load_four, store_four
from .launch import SIZES
from .matmul import operand
from .operands import behind_stores, fetch, load_operand, multiply, sum_last, sum_of_team, sum_parts, write_zeros


@triton.jit
def load_gate_columns(
    weight,
    columns,
    gate,
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATES: tl.constexpr,
    SPLIT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of GATES gates, the args one first, the rows of a weight (4H, H), transposed, as operands: of each chunk (SPLIT,
    columns, a part)."""
    operands = ()
    for k in tl.static_range(GATES * CHUNKS):
        rows = weight + (gate + k // CHUNKS) * (H * H) + columns
        operands = operands + (load_operand(rows, columns < H, H, k % CHUNKS, H, SPLIT, K_WIDTH, PRECISION),)
    return operands


@triton.jit
def load_gates(weight, H: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """All of a weight (4H, H), transposed, as an operand, a unit's four gates side by side. Its parts are quarters of
    the 4H, of all units or, if these are more than four, of some units after others: (SPLIT, units, BLOCK_H)."""
    tl.static_assert(SPLIT % 4 == 0)
    UNITS: tl.constexpr = 4 * BLOCK_H // SPLIT
    parts = tl.arange(0, SPLIT)[:, None, None]
    rows = parts % 4 * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    columns = parts // 4 * UNITS + tl.arange(0, UNITS)[None, None, :]
    at = (rows % 4 * H + rows // 4) * H + columns
    x = tl.load(weight + at, mask=(rows < 4 * H) & (columns < H), other=0.0)
    return tl.permute(operand(x, PRECISION, True), (0, 2, 1))


@triton.jit
def gates_in_parts(i, f, g, o, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Gates (batch rows, units) as an operand for load_gates(): (SPLIT, batch rows, units)."""
    ROWS: tl.constexpr = i.shape[0]
    UNITS: tl.constexpr = i.shape[1]
    x = operand(tl.join(tl.join(i, g), tl.join(f, o)), PRECISION)
    x = tl.permute(tl.reshape(x, (ROWS, 4, UNITS)), (1, 0, 2))
    if SPLIT > 4:
        x = tl.reshape(tl.broadcast_to(x[None, :, :, :], (SPLIT // 4, 4, ROWS, UNITS)), (SPLIT, ROWS, UNITS))
    return x


@triton.jit
def sum_quarters(x, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The product with load_gates() to its sum: (ROWS, UNITS)."""
    x = tl.permute(tl.reshape(x, (SPLIT // 4, 4, 4 * UNITS // SPLIT, ROWS)), (3, 0, 2, 1))
    return sum_last(tl.reshape(x, (ROWS, UNITS, 4)), (ROWS, UNITS), 4)


@triton.jit(do_not_specialize=SIZES)
def latency_backward_kernel(
    dy,  # (rows, D, H) in; rows = T * B, or the rows of the packed sequence; of a stack (rows, H), of its last layer
    dhn,  # (R, B, H) in: gradient of each row's last h
    weight_hh,  # (R, 4H, H) in: a matrix for each recurrence
    c0,  # (R, B, H) in
    c,  # (rows, D, H), of a stack (R, rows, H) in: saved by forward
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H) in: saved by forward
    dc_steps,  # as c, in: gradient of c of every step, beside its part in h; only if DC_STEPS
    dcn,  # (R, B, H) in: gradient of each row's last cell
    c_reset,  # (R, B, H) in: the cell from which a reset row goes on; only if RESET
    dc_reset,  # (R, B, H) in/out: its gradient, summed over the resets; only if RESET
    lengths,  # (B,) in: steps of each batch row; only if LENGTHS
    offsets,  # (T,) in: first row of each step; only if PACKED
    starts,  # (D, rows) in: the steps before which a row is reset; only if RESET
    order,  # (B,) in: the batch rows as they are dealt to programs; only if LENGTHS without PACKED
    weight_ih,  # (R - 1, 4H, H) in: of the layers above the first; only if STACK
    seed,  # (1,) in: of the dropout between layers; only if DROP
    keep,  # (1,) in: the share of units that it keeps; only if DROP
    dgates,  # as gates, out: w.r.t. the pre-activations, SENTINEL at launch; by it programs exchange them
    dc0,  # (R, B, H) out: gradient of c0; in between, where every step is a launch, of the cell before step_end
    products,  # (R, TEAM, 2, B, H) int64 between the programs of a team, zero at launch; only if TEAM > 1
    zeros,  # (4H,) written by every program: what rows have that wait for nobody; only if some may
    timeout_info,  # (4,) out: who waited in vain; only if MAX_SPINS
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not PACKED
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # first recurrence of this launch
    row_begin,  # first batch row of this launch, a multiple of BLOCK_B
    step_begin,  # steps [step_begin, step_end) in the order of this pass, from the direction's last to its first; a
    step_end,  # layer of a stack is as many steps behind as layers are above it
    H: tl.constexpr,
    LOCAL: tl.constexpr,  # one program holds all units and exchanges nothing
    GRID: tl.constexpr,  # programs hand dgates to each other; neither: one launch a step
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
    DIRECTIONS: tl.constexpr,  # D; of two the second ran from the last step to the first
    REVERSE: tl.constexpr,  # a single direction ran so, and this pass runs from the first
    LENGTHS: tl.constexpr,  # each batch row has its own length
    PACKED: tl.constexpr,  # rows of a PackedSequence: the steps have ever fewer; with LENGTHS
    RESET: tl.constexpr,  # rows are reset within the sequence
    STACK: tl.constexpr,  # the recurrences are layers, not directions
    DROP: tl.constexpr,  # dropout between the layers
    DC_STEPS: tl.constexpr,  # the cells of all steps have a gradient of their own; not if STACK
    DOT: tl.constexpr,  # dtype of the matrix operands
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    BLOCK_B: tl.constexpr,  # batch rows of a program
    BLOCK_H: tl.constexpr,  # hidden units of a program
    TEAM: tl.constexpr,  # programs that share the products of all their units, a gate for each: 4; otherwise 1
    SPLIT: tl.constexpr,  # warps of a program, each of which sums a part of every chunk
    K_WIDTH: tl.constexpr,  # of in_registers()
    PAIRS: tl.constexpr,  # of words()
):
    ACC: tl.constexpr = dc0.dtype.element_ty
    TYPE: tl.constexpr = dgates.dtype.element_ty
    CHUNK: tl.constexpr = SPLIT * (512 // TYPE.primitive_bitwidth)  # columns of a gate that one product sums
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    GATES: tl.constexpr = 4 // TEAM  # whose products this program makes
    # Of few units a warp has too few sums of its own to fill the time from one matrix instruction to the next.
    CHAINS: tl.constexpr = 1 if LOCAL else 4 if TEAM * BLOCK_H == 16 else 2 if TEAM * BLOCK_H == 32 else 1
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    # Past the last batch row a program computes this once more, and stores nothing.
    rows = row_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    real_rows = rows < B
    rows = tl.minimum(rows, B - 1).to(tl.int64)
    if LENGTHS and not PACKED:
        rows = tl.load(order + rows)
    mask = real_rows[:, None] & (units < H)[None, :]
    states = recurrence * B + rows  # the recurrence's rows in a (R, B, H) tensor
    state = states[:, None] * H + units[None, :]

    # Where this recurrence's rows lie among those of all: step t's at row_offsets, from the step's first on.
    batch_offsets = rows * row_stride
    row_offsets = batch_offsets * DIRECTIONS + recurrence
    backwards = recurrence > 0 if DIRECTIONS > 1 else REVERSE
    last_layer = True
    if STACK:
        depth = tl.num_programs(2) - 1 - tl.program_id(2)
        last_layer = depth == 0
        row_offsets = recurrence * total_rows + batch_offsets

    # The rows of W_hh^T that this program multiplies: of all gates for its own units, or of one for its whole team's.
    gate_of_team = tl.program_id(0) % TEAM
    team_units = tl.program_id(0) // TEAM * (TEAM * BLOCK_H) + tl.arange(0, TEAM * BLOCK_H)
    of_weight = weight_hh + recurrence * (4 * H * H)
    if LOCAL:
        weights = (load_gates(of_weight, H, BLOCK_H, SPLIT, PRECISION),)
    else:
        weights = load_gate_columns(of_weight, team_units, gate_of_team, H, CHUNKS, GATES, SPLIT, K_WIDTH, PRECISION)
    if STACK:
        above_row_offsets = row_offsets + total_rows
        of_weight = weight_ih + tl.minimum(recurrence, tl.num_programs(2) - 2) * (4 * H * H)
        weights_above = load_gate_columns(
            of_weight, team_units, gate_of_team, H, CHUNKS, GATES, SPLIT, K_WIDTH, PRECISION
        )
        step_begin = tl.maximum(step_begin - depth, 0)
        step_end = tl.minimum(step_end - depth, T)
    if TEAM > 1:
        of_team = rows[:, None] * H + team_units[None, :]
        team_mask = real_rows[:, None] & (team_units < H)[None, :]
        own = rows[:, None] * H + tl.minimum(units, H - 1)[None, :]
        part = B.to(tl.int64) * H
        products += recurrence * (2 * TEAM) * part
    if zeros is not None:
        write_zeros(zeros, 4 * H, CHUNK)

    last = T - 1
    if LENGTHS:
        length = tl.load(lengths + rows).to(tl.int32)
        last = tl.max(length) - 1
        step_end = tl.minimum(step_end, last + 1)
    dc = tl.load(dcn + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if not (LOCAL or GRID):
        dc += tl.load(dc0 + state, mask=mask & (step_begin > 0), other=0.0)
    if RESET:
        dc_reset_tile = tl.load(dc_reset + state, mask=mask, other=0.0)
        starts += batch_offsets if STACK else recurrence * total_rows + batch_offsets

    # The first step, and what it takes: of dgates none, or those that the launch before has left.
    t, step_offset = at_step(last - step_begin, last, backwards, step_stride, offsets)
    t_prev, prev_step_offset = at_step(last - step_begin - 1, last, backwards, step_stride, offsets)
    active_rows = real_rows & (step_begin < step_end)
    next_mask = active_rows & (step_begin > 0)
    has_prev = step_begin < last
    if LENGTHS:
        active_rows = active_rows & (t < length)
        has_prev = has_prev & (t_prev < length)
    next_step_offset = step_offset
    if not (LOCAL or GRID):
        t_next, next_step_offset = at_step(last - step_begin + 1, last, backwards, step_stride, offsets)
        if LENGTHS:
            next_mask = next_mask & (t < length) & (t_next < length)
    ending_rows = active_rows & ~next_mask
    c_rows = tl.where(has_prev, c + (prev_step_offset * DIRECTIONS + row_offsets) * H, c0 + states * H)
    if RESET:
        start = tl.load(starts + step_offset, mask=active_rows, other=0) != 0
        c_rows = tl.where(start, c_reset + states * H, c_rows)
        cut_rows = tl.load(starts + next_step_offset, mask=next_mask, other=0) != 0
    active = mask & active_rows[:, None]
    gate = (step_offset * DIRECTIONS + row_offsets)[:, None] * (4 * H) + units[None, :]
    # Loaded as in the loop: the compiler then has the weight in one layout alone.
    if LOCAL:
        i, f, g, o = load_four(dgates, gate, mask & (step_begin > 0), H)
        x = (gates_in_parts(i, f, g, o, SPLIT, PRECISION),)
    else:
        dgates_rows = dgates + (next_step_offset * DIRECTIONS + row_offsets) * (4 * H) + gate_of_team * H
        before = dgates_rows, next_mask, zeros, step_begin, timeout_info
        HOW: tl.constexpr = "zero" if GRID else "load"
        x = fetch(*before, HOW, H, CHUNKS, SPLIT, K_WIDTH, PAIRS, PRECISION, MAX_SPINS, GATES)
    zero = tl.zeros((SPLIT, 4 * BLOCK_H // SPLIT if LOCAL else TEAM * BLOCK_H, BLOCK_B), ACC)
    recurrent = multiply(weights, x, zero, DOT, PRECISION, CHAINS)
    if RESET:
        # Behind the product: Triton lays out its operands by the narrowest element that their addresses depend on.
        recurrent = tl.where(cut_rows[None, None, :], 0.0, recurrent)
    if STACK:
        above = dgates + (step_offset + above_row_offsets) * (4 * H) + gate_of_team * H
        awaited = above, active_rows & ~last_layer, zeros, step_begin + 1, timeout_info
        x = fetch(*awaited, "await", H, CHUNKS, SPLIT, K_WIDTH, PAIRS, PRECISION, MAX_SPINS, GATES)
        of_above = multiply(weights_above, x, zero, DOT, PRECISION, CHAINS)
    hidden = (step_offset * DIRECTIONS + row_offsets)[:, None] * H + units[None, :]
    of_dy = hidden - recurrence * total_rows * H if STACK else hidden
    i, f, g, o = load_four(gates, gate, active, H)
    c_t = tl.load(c + hidden, mask=active, other=0.0)
    c_prev = tl.load(c_rows[:, None] + units[None, :], mask=active, other=0.0)
    dh_t = tl.load(dy + of_dy, mask=active & last_layer, other=0.0).to(ACC)
    dh_t += tl.load(dhn + state, mask=active & ending_rows[:, None], other=0.0).to(ACC)
    if DC_STEPS:
        dc_t = tl.load(dc_steps + hidden, mask=active, other=0.0)

    for step in range(step_begin, step_end):
        if STACK:
            if DROP:
                dh = sum_parts(of_above, SPLIT, TEAM * BLOCK_H, BLOCK_B)
                dh = drop(dh, seed, keep, recurrence, t, rows[:, None] * H + team_units[None, :])
                dh += sum_parts(recurrent, SPLIT, TEAM * BLOCK_H, BLOCK_B)
            else:
                dh = sum_parts(recurrent + of_above, SPLIT, TEAM * BLOCK_H, BLOCK_B)
        elif LOCAL:
            dh = sum_quarters(recurrent, SPLIT, BLOCK_H, BLOCK_B)
        else:
            dh = sum_parts(recurrent, SPLIT, TEAM * BLOCK_H, BLOCK_B)
        if TEAM > 1:
            of_step = products + step % 2 * part
            dh = sum_of_team(
                dh, of_step, gate_of_team, 2 * part, of_team, team_mask, own, step, timeout_info, TEAM, MAX_SPINS
            )
        dh += dh_t  # (5)
        if DC_STEPS:
            dc += dc_t.to(ACC)
        di, df, dg, do, dc_prev = cell_backward(i.to(ACC), f.to(ACC), g.to(ACC), o.to(ACC), c_prev, c_t, dh, dc)
        if RESET:
            dc_reset_tile += tl.where(start[:, None], dc_prev, 0.0)
            dc_prev = tl.where(start[:, None], 0.0, dc_prev)
        dc = tl.where(active, dc_prev, dc)
        di, df, dg, do = di.to(TYPE), df.to(TYPE), dg.to(TYPE), do.to(TYPE)
        store_four(dgates, gate, di, df, dg, do, active, H)

        if LOCAL:
            linked = active
            if RESET:
                linked = active & ~start[:, None]
            di, df = tl.where(linked, di, 0.0), tl.where(linked, df, 0.0)
            dg, do = tl.where(linked, dg, 0.0), tl.where(linked, do, 0.0)
        if LOCAL or GRID:
            # What the step before in time takes, as far as it waits for nobody; behind the last one this once more.
            next_step_offset = step_offset
            t, step_offset = t_prev, prev_step_offset
            t_prev, prev_step_offset = at_step(last - step - 2, last, backwards, step_stride, offsets)
            next_mask = active_rows
            has_prev = step + 1 < last
            if LENGTHS:
                active_rows = real_rows & (t < length)
                next_mask = next_mask & active_rows
                has_prev = has_prev & (t_prev < length)
                ending_rows = active_rows & ~next_mask
            c_rows = tl.where(has_prev, c + (prev_step_offset * DIRECTIONS + row_offsets) * H, c0 + states * H)
            if RESET:
                next_mask = next_mask & ~start
                start = tl.load(starts + step_offset, mask=active_rows, other=0) != 0
                c_rows = tl.where(start, c_reset + states * H, c_rows)
            active = mask & active_rows[:, None]
            gate = (step_offset * DIRECTIONS + row_offsets)[:, None] * (4 * H) + units[None, :]
            hidden = (step_offset * DIRECTIONS + row_offsets)[:, None] * H + units[None, :]
            of_dy = hidden - recurrence * total_rows * H if STACK else hidden
            i, f, g, o = load_four(gates, gate, active, H)
            if LENGTHS or RESET:
                c_t = tl.load(c + hidden, mask=active, other=0.0)
            else:
                c_t = c_prev
            c_prev = tl.load(c_rows[:, None] + units[None, :], mask=active, other=0.0)
            dh_t = tl.load(dy + of_dy, mask=active & last_layer, other=0.0).to(ACC)
            if LENGTHS:
                dh_t += tl.load(dhn + state, mask=active & ending_rows[:, None], other=0.0).to(ACC)
            if DC_STEPS:
                dc_t = tl.load(dc_steps + hidden, mask=active, other=0.0)
            if LOCAL:
                x = (gates_in_parts(di, df, dg, do, SPLIT, PRECISION),)
                recurrent = multiply(weights, x, zero, DOT, PRECISION, CHAINS)
            if STACK:
                # The layer above is ahead: its part of the sum is made while this layer's own dgates are on the way.
                above = behind_stores(dgates + step_offset * (4 * H) + gate_of_team * H) + above_row_offsets * (4 * H)
                awaited = above, active_rows & ~last_layer, zeros, step + 2, timeout_info
                x = fetch(*awaited, "await", H, CHUNKS, SPLIT, K_WIDTH, PAIRS, PRECISION, MAX_SPINS, GATES)
                of_above = multiply(weights_above, x, zero, DOT, PRECISION, CHAINS)
            if GRID:
                dgates_rows = behind_stores(dgates + next_step_offset * (DIRECTIONS * 4 * H) + gate_of_team * H)
                dgates_rows += row_offsets * (4 * H)
                x = fetch(
                    dgates_rows,
                    next_mask,
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
                    GATES,
                )
                recurrent = multiply(weights, x, zero, DOT, PRECISION, CHAINS)

    tl.store(dc0 + state, dc, mask=mask)
    if RESET:
        tl.store(dc_reset + state, dc_reset_tile, mask=mask)
