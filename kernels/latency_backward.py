"""The backward recurrence with W_hh in registers: of few rows, dgates polled, or of few units in one program.

One kernel for the whole sequence. It has the loop of backward.py turned by half a step, as latency_forward.py that of
forward.py. Tiles are (batch rows, units).
"""

import triton
import triton.language as tl

from .cell import cell_backward
from .dropout import drop
from .gates import cast_gates, load_gates, select_gates, store_gates
from .launch import SIZES
from .matmul import operand
from .operands import load_operand, multiply, sum_last, sum_parts
from .polling import behind_stores, fetch, form, multiply_polled, write_zeros
from .rows import Sizes, locate_clamped, rows_of_program, with_mask, with_starts, without_starts
from .saved import cells_before, cut, load_dh
from .team import Team, sum_polled


@triton.jit
def load_gate_columns(weight, columns, gate, CHUNKS: tl.constexpr, FORM: tl.constexpr):
    """Of FORM.GATES gates, the given one first, the rows of a weight (4H, H), transposed, as operands: of each chunk
    (SPLIT, columns, a part)."""
    H: tl.constexpr = FORM.K
    operands = ()
    for k in tl.static_range(FORM.GATES * CHUNKS):
        rows = weight + (gate + k // CHUNKS) * (H * H) + columns
        operands = operands + (load_operand(rows, columns < H, H, k % CHUNKS, FORM),)
    return operands


@triton.jit
def load_whole_transposed(weight, H: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
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
def gates_in_parts(gates, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Gates (batch rows, units) as an operand for load_whole_transposed(): (SPLIT, batch rows, units)."""
    i, f, g, o = gates
    ROWS: tl.constexpr = i.shape[0]
    UNITS: tl.constexpr = i.shape[1]
    x = operand(tl.join(tl.join(i, g), tl.join(f, o)), PRECISION)
    x = tl.permute(tl.reshape(x, (ROWS, 4, UNITS)), (1, 0, 2))
    if SPLIT > 4:
        x = tl.reshape(tl.broadcast_to(x[None, :, :, :], (SPLIT // 4, 4, ROWS, UNITS)), (SPLIT, ROWS, UNITS))
    return x


@triton.jit
def sum_quarters(x, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The product with load_whole_transposed() to its sum: (ROWS, UNITS)."""
    x = tl.permute(tl.reshape(x, (SPLIT // 4, 4, 4 * UNITS // SPLIT, ROWS)), (3, 0, 2, 1))
    return sum_last(tl.reshape(x, (ROWS, UNITS, 4)), (ROWS, UNITS), 4)


@triton.jit
def sum_and_drop(
    recurrent, of_above, stack, recurrence, t, states, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr
):
    """The sums of a stack's both products, of which dropout masks that of the layer above: (ROWS, UNITS)."""
    if stack.seed is None:
        return sum_parts(recurrent + of_above, SPLIT, UNITS, ROWS)
    else:
        dh = sum_parts(of_above, SPLIT, UNITS, ROWS)
        dh = drop(dh, stack.seed, stack.keep, recurrence, t, states)
        return dh + sum_parts(recurrent, SPLIT, UNITS, ROWS)


@triton.jit(do_not_specialize=SIZES)
def latency_backward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence; D: directions, 1 in a stack
    dy,  # (rows, D, H), of a stack (rows, H), of its last layer
    dhn,  # (R, B, H): gradient of each row's last h
    weight_hh,  # (R, 4H, H): a matrix for each recurrence
    c0,  # (R, B, H)
    c,  # (rows, D, H), of a stack (R, rows, H): saved by forward
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H): saved by forward
    dc_steps,  # as c: gradient of c of every step, beside its part in h; None: there is none; never of a stack
    dcn,  # (R, B, H): gradient of each row's last cell
    c_reset,  # (R, B, H): the cell from which a reset row goes on; only with layout.starts
    dc_reset,  # (R, B, H), also an output: its gradient, summed over the resets; as c_reset
    layout,  # a LayoutTensors
    stack,  # a Stack; of its weights the recurrences are layers, and without them directions
    # Outputs
    dgates,  # as gates: w.r.t. the pre-activations, SENTINEL at launch; by it programs exchange them
    dc0,  # (R, B, H): gradient of c0; in between, where every step is a launch, of the cell before step_end
    # Exchange
    products,  # (R, 4, 2, B, H) int64 between the programs of a team, zero at launch; only of a team
    sync,  # a Sync
    # Sizes
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not packed
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # of this launch
    row_begin,  # first batch row of this launch, a multiple of the tiles' batch
    step_begin,  # steps [step_begin, step_end) in the order of this pass, from the direction's last to its first; a
    step_end,  # layer of a stack is as many steps behind as layers are above it
    H: tl.constexpr,
    # Form
    MODE: tl.constexpr,  # "local": one program holds all units; "grid": programs hand dgates to each other; "step"
    DIRECTIONS: tl.constexpr,  # D; of two the second ran from the last step to the first
    REVERSE: tl.constexpr,  # a single direction ran so, and this pass runs from the first
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.backward
    PAIRS: tl.constexpr,  # of words()
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = dc0.dtype.element_ty
    TYPE: tl.constexpr = dgates.dtype.element_ty
    STACK: tl.constexpr = stack.weight_ih is not None
    TEAM: tl.constexpr = TILES.team
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    SPLIT: tl.constexpr = TILES.split
    CHUNK: tl.constexpr = SPLIT * (512 // TYPE.primitive_bitwidth)  # columns of a gate that one product sums
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    UNITS: tl.constexpr = TEAM * BLOCK_H  # of a team
    UNCUT: tl.constexpr = layout.lengths is None and layout.starts is None  # c_{t-1} of a step is c_t of the next
    # Of few units a warp has too few sums of its own to fill the time from one matrix instruction to the next.
    CHAINS: tl.constexpr = 1 if MODE == "local" else 4 if UNITS == 16 else 2 if UNITS == 32 else 1
    FORM: tl.constexpr = form(H, 4 // TEAM, TILES, TYPE.primitive_bitwidth, PAIRS, PRECISION, MAX_SPINS)
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, STACK, DIRECTIONS, REVERSE, BLOCK_B, True)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = rows.mask[:, None] & (units < H)[None, :]
    state = rows.states[:, None] * H + units[None, :]

    # The rows of W_hh^T that this program multiplies: of all gates for its own units, or of one for its whole team's.
    gate_of_team = tl.program_id(0) % TEAM
    team_units = tl.program_id(0) // TEAM * UNITS + tl.arange(0, UNITS)
    team_states = rows.batch[:, None] * H + team_units[None, :]
    weight = weight_hh + recurrence * (4 * H * H)
    if MODE == "local":
        weights = (load_whole_transposed(weight, H, BLOCK_H, SPLIT, PRECISION),)
    else:
        weights = load_gate_columns(weight, team_units, gate_of_team, CHUNKS, FORM)
    last_layer = True
    if STACK:
        # The layer above is ahead: its part of a sum is made while this layer's own dgates are on the way.
        depth = tl.num_programs(2) - 1 - tl.program_id(2)
        last_layer, fed = depth == 0, depth > 0
        dy -= recurrence * total_rows * H
        offsets_above = rows.offsets + total_rows
        weight = stack.weight_ih + tl.minimum(recurrence, tl.num_programs(2) - 2) * (4 * H * H)
        weights_above = load_gate_columns(weight, team_units, gate_of_team, CHUNKS, FORM)
        step_begin = tl.maximum(step_begin - depth, 0)
        step_end = tl.minimum(step_end - depth, T)
    if TEAM > 1:
        team_mask = rows.mask[:, None] & (team_units < H)[None, :]
        of_rows, in_team = rows.batch[:, None] * H, team_units[None, :]
        own_units = tl.minimum(units, H - 1)[None, :]
        part = B.to(tl.int64) * H
        products += recurrence * (2 * TEAM) * part
        team = Team(products, 2 * part, 0, gate_of_team, of_rows, in_team, team_mask, own_units, mask)
    if sync.zeros is not None:
        write_zeros(sync.zeros, 4 * H, CHUNK)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    dc = tl.load(dcn + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if MODE == "step":
        dc += tl.load(dc0 + state, mask=mask & (step_begin > 0), other=0.0)
    if layout.starts is not None:
        dc_reset_tile = tl.load(dc_reset + state, mask=mask, other=0.0)

    # The first step, and what it takes: of dgates none, or those that the launch before has left.
    running = rows.mask & (step_begin < step_end)
    at = locate_clamped(rows.last - step_begin, layout, rows, running)
    before = locate_clamped(rows.last - step_begin - 1, layout, rows, step_begin < rows.last)
    next_mask, first_after = at.mask & (step_begin > 0), at.first
    if MODE == "step":
        after = locate_clamped(rows.last - step_begin + 1, layout, rows, next_mask)
        next_mask, first_after = after.mask, after.first
    ending = at.mask & ~next_mask
    at = with_starts(at, layout, rows)
    c_rows = cells_before(c, c0, c_reset, at, before, layout, rows, H)
    if layout.starts is not None:
        cut_rows = tl.load(layout.starts + rows.start_offsets + first_after, mask=next_mask, other=0) != 0
    active = mask & at.mask[:, None]
    gate = at.rows[:, None] * (4 * H) + units[None, :]
    # Loaded as in the loop: the compiler then has the weight in only one layout.
    if MODE == "local":
        of_next = load_gates(dgates + gate, mask & (step_begin > 0), H)
        x = (gates_in_parts(of_next, SPLIT, PRECISION),)
    else:
        HOW: tl.constexpr = "zero" if MODE == "grid" else "load"
        next_rows = dgates + (first_after * DIRECTIONS + rows.offsets) * (4 * H) + gate_of_team * H
        x = fetch(next_rows, next_mask, step_begin, sync, FORM, HOW)
    zero = tl.zeros((SPLIT, 4 * BLOCK_H // SPLIT if MODE == "local" else UNITS, BLOCK_B), ACC)
    recurrent = multiply(weights, x, zero, PRECISION, CHAINS)
    if layout.starts is not None:
        # Behind the product: Triton lays out its operands by the narrowest element that their addresses depend on.
        recurrent = tl.where(cut_rows[None, None, :], 0.0, recurrent)
    if STACK:
        rows_above = dgates + (at.first + offsets_above) * (4 * H) + gate_of_team * H
        of_above = multiply_polled(weights_above, rows_above, at.mask & fed, step_begin + 1, zero, sync, FORM, CHAINS)
    hidden = at.rows[:, None] * H + units[None, :]
    saved = load_gates(gates + gate, active, H)
    c_t = tl.load(c + hidden, mask=active, other=0.0)
    c_prev = tl.load(c_rows[:, None] + units[None, :], mask=active, other=0.0)
    dy_t, dhn_t = load_dh(dy + hidden, active & last_layer, dhn + state, active & ending[:, None])
    dh_t = dy_t.to(ACC) + dhn_t.to(ACC)
    if dc_steps is not None:
        dc_t = tl.load(dc_steps + hidden, mask=active, other=0.0)

    for step in range(step_begin, step_end):
        if STACK:
            dh = sum_and_drop(recurrent, of_above, stack, recurrence, at.t, team_states, SPLIT, UNITS, BLOCK_B)
        else:
            dh = (sum_quarters if MODE == "local" else sum_parts)(recurrent, SPLIT, UNITS, BLOCK_B)
        if TEAM > 1:
            dh = sum_polled(team, dh, products + step % 2 * part, step, sync.timeout_info, TEAM, MAX_SPINS)
        dh += dh_t  # (5)
        if dc_steps is not None:
            dc += dc_t.to(ACC)
        dgates_t, dc_prev = cell_backward(cast_gates(saved, ACC), c_prev, c_t, dh, dc)
        if layout.starts is not None:
            dc_prev, dc_reset_tile = cut(at.start[:, None], dc_prev, dc_reset_tile)
        dc = tl.where(active, dc_prev, dc)
        dgates_t = cast_gates(dgates_t, TYPE)
        store_gates(dgates + gate, dgates_t, active, H)
        if MODE == "local":
            dgates_t = select_gates(active if layout.starts is None else active & ~at.start[:, None], dgates_t)
        if MODE != "step":
            # What the next turn takes and need not wait for; after the last one it is loaded again, and not used.
            after, at = at, with_starts(with_mask(before, layout, rows, running), layout, rows)
            next_mask = without_starts(after.mask & at.mask, after, layout)
            before = locate_clamped(rows.last - step - 2, layout, rows, step + 1 < rows.last)
            c_rows = cells_before(c, c0, c_reset, at, before, layout, rows, H)
            active = mask & at.mask[:, None]
            gate = (at.first * DIRECTIONS + rows.offsets)[:, None] * (4 * H) + units[None, :]
            hidden = (at.first * DIRECTIONS + rows.offsets)[:, None] * H + units[None, :]
            saved = load_gates(gates + gate, active, H)
            c_t = c_prev if UNCUT else tl.load(c + hidden, mask=active, other=0.0)
            c_prev = tl.load(c_rows[:, None] + units[None, :], mask=active, other=0.0)
            dh_t = tl.load(dy + hidden, mask=active & last_layer, other=0.0).to(ACC)
            if layout.lengths is not None:
                dh_t += tl.load(dhn + state, mask=active & ~after.mask[:, None], other=0.0).to(ACC)
            if dc_steps is not None:
                dc_t = tl.load(dc_steps + hidden, mask=active, other=0.0)
            if MODE == "local":
                recurrent = multiply(weights, (gates_in_parts(dgates_t, SPLIT, PRECISION),), zero, PRECISION, CHAINS)
            if STACK:
                above = behind_stores(dgates + at.first * (4 * H) + gate_of_team * H) + offsets_above * (4 * H)
                of_above = multiply_polled(weights_above, above, at.mask & fed, step + 2, zero, sync, FORM, CHAINS)
            if MODE == "grid":
                of_next_step = behind_stores(dgates + after.first * (DIRECTIONS * 4 * H) + gate_of_team * H)
                of_next_step += rows.offsets * (4 * H)
                recurrent = multiply_polled(weights, of_next_step, next_mask, step + 1, zero, sync, FORM, CHAINS)

    tl.store(dc0 + state, dc, mask=mask)
    if layout.starts is not None:
        tl.store(dc_reset + state, dc_reset_tile, mask=mask)
