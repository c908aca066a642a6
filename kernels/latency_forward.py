"""The forward recurrence with W_hh in registers: of few rows, h polled, or of few units in one program.

One kernel for the whole sequence. It has the loop of forward.py turned by half a step, the product of the next step
last: the compiler leaves a weight in registers across a loop only if a product before the loop has used it. Tiles are
(batch rows, units).
"""

import triton
import triton.language as tl

from .cell import cell_forward
from .dropout import drop
from .gates import add_gates, cast_gates, four, load_gates, scale_gates, select_gates, store_gates
from .launch import SIZES
from .matmul import operand
from .narrow import hold_words, multiply_held, narrow_type
from .operands import load_operand, multiply, sum_gates
from .polling import behind_stores, fetch, form, multiply_polled, write_zeros
from .rows import Sizes, last_h, locate_clamped, rows_of_program, with_starts, without_starts


@triton.jit
def load_gate_rows(weight, BLOCK_H: tl.constexpr, CHUNKS: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """The rows of a weight (4H, H) for this program's units, gate by gate, as operands: of each chunk (SPLIT,
    4 * BLOCK_H, a part)."""
    H: tl.constexpr = FORM.K
    index = tl.arange(0, 4 * BLOCK_H)
    units = tl.program_id(0) * BLOCK_H + index % BLOCK_H
    rows = weight + (index // BLOCK_H * H + units).to(tl.int64) * H
    operands = ()
    for k in tl.static_range(CHUNKS):
        if weight.dtype.element_ty.primitive_bitwidth == 8:
            operands = operands + (hold_words(rows, units < H, k, FORM, TYPE),)
        else:
            operands = operands + (load_operand(rows, units < H, 1, k, FORM),)
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
def part_gates(x, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The product with load_whole() to the four gates (ROWS, UNITS): i, f, g, o."""
    return four(tl.permute(tl.reshape(x, (2, 2, UNITS, ROWS)), (3, 2, 0, 1)))


@triton.jit(do_not_specialize=SIZES)
def latency_forward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence; D: directions, 1 in a stack
    input_gates,  # (rows, D, 4H): x W_ih^T + b
    weight_hh,  # (R, 4H, H): a matrix for each recurrence
    h0,  # (R, B, H)
    c0,  # (R, B, H)
    c_reset,  # (R, B, H): the cell from which a reset row goes on, its h being 0; only with layout.starts
    scale,  # (R, 4H): of a weight_hh of 8 bits, which no stack has, what a 1 in each of its rows stands for
    layout,  # a LayoutTensors
    stack,  # a Stack; of its weights the recurrences are layers, and without them directions
    # Outputs
    y,  # (rows, D, H), of a stack (R, rows, H): h of every step, SENTINEL at launch; by it programs exchange h
    dropped,  # (R - 1, rows, H): y with dropout, for the layer above, SENTINEL at launch; only with stack.seed
    c,  # (rows, D, H), of a stack (R, rows, H): c of every step; None: nothing is kept for backward
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H): activated gates; as c
    hn,  # (R, B, H): each row's last h
    cn,  # (R, B, H): each row's last cell; in between, where every step is a launch, the one after step_end
    sync,  # a Sync
    # Sizes
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not packed
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # of this launch
    row_begin,  # first batch row of this launch, a multiple of the tiles' batch
    step_begin,  # steps [step_begin, step_end) in the direction's own order; layer r of a stack is r steps behind
    step_end,
    H: tl.constexpr,
    # Form
    MODE: tl.constexpr,  # "local": one program holds all units; "grid": programs hand h to each other; "step"
    DIRECTIONS: tl.constexpr,  # D; of two the second runs from the last step to the first
    REVERSE: tl.constexpr,  # a single direction runs so
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.forward
    PAIRS: tl.constexpr,  # of words()
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = cn.dtype.element_ty
    TYPE: tl.constexpr = y.dtype.element_ty
    STACK: tl.constexpr = stack.weight_ih is not None
    NARROW: tl.constexpr = narrow_type(weight_hh.dtype.element_ty)
    # h is no larger than 1, and of 8 bits float16 is made in half as many instructions as bfloat16.
    HALF: tl.constexpr = tl.float16 if TYPE.primitive_bitwidth == 16 else TYPE
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    SPLIT: tl.constexpr = TILES.split
    CHUNK: tl.constexpr = SPLIT * (512 // TYPE.primitive_bitwidth)  # columns that one product sums
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    LATE: tl.constexpr = layout.lengths is not None and (DIRECTIONS > 1 or REVERSE) and MODE != "local"
    FORM: tl.constexpr = form(H, 1, TILES, TYPE.primitive_bitwidth, PAIRS, PRECISION, MAX_SPINS)
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, STACK, DIRECTIONS, REVERSE, BLOCK_B, True)
    mask = rows.mask[:, None] & (units < H)[None, :]
    state = rows.states[:, None] * H + units[None, :]

    weight = weight_hh + recurrence * (4 * H * H)
    if MODE == "local":
        weights = (load_whole(weight, H, BLOCK_H, SPLIT, PRECISION),)
    else:
        weights = load_gate_rows(weight, BLOCK_H, CHUNKS, FORM, TYPE)
    scales = None
    if NARROW != "":
        scales = load_gates(scale + recurrence * (4 * H) + units[None, :], (units < H)[None, :], H)
        scales = cast_gates(scales, ACC)
    first_layer = True
    if STACK:
        first_layer = recurrence == 0
        above = recurrence > 0
        below = tl.maximum(recurrence - 1, 0)
        y_below = y if dropped is None else dropped
        offsets_below = rows.offsets - total_rows
        weights_below = load_gate_rows(stack.weight_ih + below * (4 * H * H), BLOCK_H, CHUNKS, FORM, TYPE)
        bias = stack.bias + below * (4 * H) + units[None, :]
        bias = load_gates(bias, ((units < H) & above)[None, :], H)
        step_begin = tl.maximum(step_begin - recurrence.to(tl.int32), 0)
        step_end = tl.minimum(step_end - recurrence.to(tl.int32), T)
    if sync.zeros is not None:
        write_zeros(sync.zeros, H, CHUNK)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    c_tile = tl.load(c0 + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if MODE == "step":
        c_tile += tl.load(cn + state, mask=mask & (step_begin > 0), other=0.0)
    if layout.starts is not None:
        c_reset_tile = tl.load(c_reset + state, mask=mask, other=0.0)

    # The first step's product, with h0 or with what the launch before has left. Fetched as in the loop: the compiler
    # then has the weight in only one layout.
    running = rows.mask & (step_begin < step_end)
    at = locate_clamped(step_begin, layout, rows, running)
    after = locate_clamped(step_begin + 1, layout, rows, running)
    if MODE == "local":
        h_tile = tl.load(h0 + state, mask=mask, other=0.0)
        x = (for_all_parts(h_tile, SPLIT, PRECISION),)
    else:
        h_rows = h0 + rows.states * H
        if MODE == "step":
            before = locate_clamped(step_begin - 1, layout, rows, at.mask & (step_begin > 0))
            h_rows = tl.where(before.mask, y + before.rows * H, h_rows)
        x = fetch(h_rows, None, step_begin, sync, FORM, "load")
    zero = tl.zeros((SPLIT, 4 * BLOCK_H // SPLIT if MODE == "local" else 4 * BLOCK_H, BLOCK_B), ACC)
    recurrent = multiply_held(weights, x, zero, step_begin, NARROW, FORM, TYPE)
    at, after = with_starts(at, layout, rows), with_starts(after, layout, rows)
    if layout.starts is not None:
        recurrent = tl.where(at.start[None, None, :], 0.0, recurrent)
    if LATE:
        # Of rows that begin later this is the product of their first step.
        first_product = scale_gates(sum_gates(recurrent, SPLIT, BLOCK_H, BLOCK_B), scales)
        late_rows = rows.mask != rows.mask
    if STACK:
        x_rows = y_below + at.first * H + offsets_below * H
        recurrent = multiply_polled(weights_below, x_rows, at.mask & above, step_begin + 1, recurrent, sync, FORM)
    active = mask & at.mask[:, None]
    gate = at.rows[:, None] * (4 * H) + units[None, :]
    from_input = load_gates(input_gates + gate, active & first_layer, H)

    for step in range(step_begin, step_end):
        pre = scale_gates((part_gates if MODE == "local" else sum_gates)(recurrent, SPLIT, BLOCK_H, BLOCK_B), scales)
        if STACK:
            pre = add_gates(pre, bias)
        at_input = cast_gates(from_input, ACC)
        if LATE:  # rows that begin here have read zeros: they take the product of h0
            at_input = add_gates(at_input, select_gates(late_rows[:, None], first_product))
        if layout.starts is not None:
            c_tile = tl.where(at.start[:, None], c_reset_tile, c_tile)
        activated, c_next, h = cell_forward(add_gates(pre, at_input), c_tile)
        c_tile = tl.where(active, c_next, c_tile)
        h = h.to(TYPE)
        hidden = (at.first * DIRECTIONS + rows.offsets)[:, None] * H + units[None, :]
        tl.store(y + hidden, h, mask=active)
        if dropped is not None:
            h_dropped = drop(h, stack.seed, stack.keep, recurrence, at.t, rows.batch[:, None] * H + units[None, :])
            tl.store(dropped + hidden, h_dropped, mask=active & (recurrence < tl.num_programs(2) - 1))
        # What the next step takes and need not wait for; after the last step it is loaded again, and not used.
        prev_mask = without_starts(at.mask & after.mask, after, layout)
        active_after = mask & after.mask[:, None]
        gate_after = (after.first * DIRECTIONS + rows.offsets)[:, None] * (4 * H) + units[None, :]
        if MODE != "step":
            from_input = load_gates(input_gates + gate_after, active_after & first_layer, H)
        if c is not None:
            tl.store(c + hidden, c_next, mask=active)
            store_gates(gates + gate, activated, active, H)
        if MODE == "local":
            h_tile = tl.where(active, h, h_tile)
            if layout.starts is not None:
                h_tile = tl.where(after.start[:, None], 0.0, h_tile)
            recurrent = multiply(weights, (for_all_parts(h_tile, SPLIT, PRECISION),), zero, PRECISION)
        if MODE == "grid":
            recurrent = zero
            if STACK:
                # The layer below is ahead: its part of the sum is made while this layer's own h is on the way.
                x_rows = behind_stores(y_below + after.first * H) + offsets_below * H
                recurrent = multiply_polled(weights_below, x_rows, after.mask & above, step + 2, recurrent, sync, FORM)
            h_rows = behind_stores(y + at.first * (DIRECTIONS * H)) + rows.offsets * H
            x = fetch(h_rows, prev_mask, step + 1, sync, FORM, "await")
            recurrent = multiply_held(weights, x, recurrent, step, NARROW, FORM, HALF)
        if LATE:
            late_rows = without_starts(after.mask & ~at.mask, after, layout)
        at, active, gate = after, active_after, gate_after
        # A step ahead, because addresses that wait for these loads would make everyone wait.
        after = with_starts(locate_clamped(step + 2, layout, rows, running), layout, rows)

    tl.store(cn + state, c_tile, mask=mask)
    # From this program's part of y, which may be of other threads than these.
    tl.debug_barrier()
    h = tl.load(last_h(y, h0, layout, rows, H)[:, None] + units[None, :], mask=mask, other=0.0)
    tl.store(hn + state, h, mask=mask)
