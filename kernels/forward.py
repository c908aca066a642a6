"""The forward recurrence: one kernel for the whole sequence, and its launcher.

A launch has one or more recurrences: the directions of a layer, or the layers of a stack, each of which takes what the
layer below has left a step ago.
"""

import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_forward, split_gates
from .dropout import drop
from .latency_forward import latency_forward_kernel
from .launch import SIZES, alloc_exchange_buffer, launch, weight_in_registers
from .layout import DENSE, NO_STACK, Layout, Stack, accumulator
from .matmul import load_weight, recurrent_matmul
from .plan import Plan
from .sync import publish, wait


@triton.jit
def gate_rows(H: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows of a weight (4H, ...) for this program's units, a unit's four gates side by side; 4H past the last unit:
    (4 * BLOCK_H,)."""
    index = tl.arange(0, 4 * BLOCK_H)
    units = tl.program_id(0) * BLOCK_H + index // 4
    return tl.where(units < H, index % 4 * H + units, 4 * H)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    input_gates,  # (rows, D, 4H) in: x W_ih^T + b; rows = T * B, or the rows of the packed sequence; D = 1 in a stack
    weight_hh,  # (R, 4H, OUT) in: a matrix for each recurrence
    h0,  # (R, B, OUT) in
    c0,  # (R, B, H) in
    c_reset,  # (R, B, H) in: the cell from which a reset row goes on, its h being 0; only if RESET
    lengths,  # (B,) in: steps of each batch row; only if LENGTHS
    offsets,  # (T,) in: first row of each step; only if PACKED
    starts,  # (D, rows) in: the steps before which a row is reset; only if RESET
    order,  # (B,) in: the batch rows as they are dealt to programs; only if LENGTHS without PACKED
    weight_hr,  # (R, OUT, H) in: the projection; only if OUT < H
    weight_ih,  # (R - 1, 4H, H) in: of the layers above the first; only if STACK
    bias,  # (R - 1, 4H) in: of the same; only if STACK
    seed,  # (1,) in: of the dropout between layers; only if DROP
    keep,  # (1,) in: the share of units that it keeps; only if DROP
    y,  # (rows, D, OUT), of a stack (R, rows, H) out: h of every step; also the buffer by which programs exchange it
    dropped,  # (R - 1, rows, H) out: y with dropout, for the layer above; only if DROP
    c,  # (rows, D, H), of a stack (R, rows, H) out: c of every step; only if SAVE
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H) out: activated gates; only if SAVE
    hn,  # (R, B, OUT) out: each row's last h
    cn,  # (R, B, H) out: each row's last cell; in between, where every step is a launch, the one after step_end
    unprojected,  # (R, B, H) between the halves of a step: its o tanh c; only if OUT < H
    flags,  # (R, batch groups, T) in/out: step flags, zero at launch; only if GRID
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
    OUT: tl.constexpr,  # features of h: H, or fewer behind a projection, which GRID has not
    GRID: tl.constexpr,  # programs hand h to each other; otherwise one launch a step
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
    DIRECTIONS: tl.constexpr,  # D; of two the second runs from the last step to the first
    REVERSE: tl.constexpr,  # a single direction runs so
    LENGTHS: tl.constexpr,  # each batch row has its own length
    PACKED: tl.constexpr,  # rows of a PackedSequence: the steps have ever fewer; with LENGTHS
    RESET: tl.constexpr,  # rows are reset within the sequence
    STACK: tl.constexpr,  # the recurrences are layers, not directions
    DROP: tl.constexpr,  # dropout between the layers
    SAVE: tl.constexpr,  # keep c and gates for backward
    CELL: tl.constexpr,  # this launch has the cells
    PROJECT: tl.constexpr,  # ... or the projection of what they gave, if OUT < H
    DOT: tl.constexpr,  # dtype of the matrix operands
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    BLOCK_B: tl.constexpr,  # batch rows of a program
    BLOCK_H: tl.constexpr,  # hidden units of a program
    BLOCK_P: tl.constexpr,  # features that a program projects to, if PROJECT
    KEPT: tl.constexpr,  # chunks of W_hh that stay on chip; the others are loaded at every step; 0: all stay
    BLOCK_K: tl.constexpr,  # units of h that one product reduces over
):
    ACC: tl.constexpr = cn.dtype.element_ty
    CHUNKS: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = row_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    batch_group = row_begin // BLOCK_B + tl.program_id(1)
    real_rows = rows < B
    mask = (units < H)[:, None] & real_rows[None, :]
    active_rows = real_rows
    active = mask
    rows = rows.to(tl.int64)
    if LENGTHS and not PACKED:
        rows = tl.load(order + rows, mask=real_rows, other=0)
    states = recurrence * B + rows  # the recurrence's rows in a (R, B, H) tensor
    state = states[None, :] * H + units[:, None]

    # Where this recurrence's rows lie among those of all: step t's at row_offsets, from the step's first on.
    batch_offsets = rows * row_stride
    row_offsets = batch_offsets * DIRECTIONS + recurrence
    backwards = recurrence > 0 if DIRECTIONS > 1 else REVERSE
    if STACK:
        # The first layer takes input_gates, and has the products of the others with zeros for an input.
        above = recurrence > 0
        below = tl.maximum(recurrence - 1, 0)
        row_offsets = recurrence * total_rows + batch_offsets
    weight_hh += recurrence * (4 * H * OUT)
    if GRID:
        step_flags = flags + (recurrence * tl.cdiv(B, BLOCK_B) + batch_group).to(tl.int64) * T
        if STACK:
            flags_below = flags + (below * tl.cdiv(B, BLOCK_B) + batch_group) * T

    RESIDENT: tl.constexpr = (KEPT if KEPT > 0 else CHUNKS) if GRID else 0
    weight_rows = gate_rows(H, BLOCK_H)
    weights = ()
    for k in tl.static_range(RESIDENT):
        weights = weights + (load_weight(weight_hh, weight_rows, k, OUT, 4 * H, False, BLOCK_K, PRECISION),)
    if STACK:
        weight_ih += below * (4 * H * H)
        bias += below * (4 * H)
        weights_below = ()
        for k in tl.static_range(RESIDENT):
            chunk = load_weight(weight_ih, weight_rows, k, H, 4 * H, False, BLOCK_K, PRECISION)
            weights_below = weights_below + (chunk,)
        of_unit = (units < H) & above
        bias_i = tl.load(bias + units, mask=of_unit, other=0.0).to(ACC)[:, None]
        bias_f = tl.load(bias + H + units, mask=of_unit, other=0.0).to(ACC)[:, None]
        bias_g = tl.load(bias + 2 * H + units, mask=of_unit, other=0.0).to(ACC)[:, None]
        bias_o = tl.load(bias + 3 * H + units, mask=of_unit, other=0.0).to(ACC)[:, None]
        step_begin = tl.maximum(step_begin - recurrence.to(tl.int32), 0)
        step_end = tl.minimum(step_end - recurrence.to(tl.int32), T)

    if PROJECT:
        PROJ_CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
        features = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        weight_hr += recurrence * (OUT * H)

    if LENGTHS:
        length = tl.load(lengths + rows, mask=real_rows, other=0)
        last = tl.max(length) - 1
        step_end = tl.minimum(step_end, last + 1)
    else:
        last = T - 1
    c_tile = tl.load(c0 + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if not GRID:
        c_tile += tl.load(cn + state, mask=mask & (step_begin > 0), other=0.0)
    if RESET:
        c_reset_tile = tl.load(c_reset + state, mask=mask, other=0.0)

    for step in range(step_begin, step_end):
        # Where the step's rows lie, and where the previous step of this direction left h (h0 for a row's first).
        t = tl.where(backwards, last - step, step)
        t_prev = tl.where(backwards, t + 1, t - 1)
        has_prev = step > 0
        if LENGTHS:
            active_rows = real_rows & (t < length)
            active = mask & active_rows[None, :]
            has_prev = has_prev & (t_prev < length)
        if PACKED:
            step_offset = tl.load(offsets + t)
            prev_step_offset = tl.load(offsets + t_prev, mask=step > 0, other=0)
        else:
            step_offset = t.to(tl.int64) * step_stride
            prev_step_offset = t_prev.to(tl.int64) * step_stride
        row_offset = step_offset * DIRECTIONS + row_offsets
        h_rows = tl.where(has_prev, y + (prev_step_offset * DIRECTIONS + row_offsets) * OUT, h0 + states * OUT)
        prev_mask = active_rows
        if RESET:
            start_rows = step_offset + batch_offsets if STACK else recurrence * total_rows + step_offset + batch_offsets
            start = tl.load(starts + start_rows, mask=active_rows, other=0) != 0
            prev_mask = active_rows & ~start
            c_tile = tl.where(start[None, :], c_reset_tile, c_tile)

        if CELL:
            # All that does not wait for h is loaded before the flag is awaited.
            gate = row_offset[None, :] * (4 * H) + units[:, None]
            has_input = active
            if STACK:
                has_input = active & (recurrence == 0)
            pre_i = tl.load(input_gates + gate, mask=has_input, other=0.0)
            pre_f = tl.load(input_gates + gate + H, mask=has_input, other=0.0)
            pre_g = tl.load(input_gates + gate + 2 * H, mask=has_input, other=0.0)
            pre_o = tl.load(input_gates + gate + 3 * H, mask=has_input, other=0.0)

            if STACK:  # (1)
                # The layer below is ahead: its part of the sum is made while this layer's own h is on the way.
                if GRID:
                    if above:
                        wait(flags_below + step, tl.num_programs(0), step + 1, timeout_info, MAX_SPINS)
                taken_rows = active_rows & above
                x_rows = (dropped if DROP else y) + (row_offset - total_rows) * H
                args = weights_below, weight_ih, weight_rows, x_rows, taken_rows, 0
                of_below = recurrent_matmul(*args, H, 4 * H, False, ACC, CHUNKS, BLOCK_K, DOT, PRECISION)
            if GRID:
                if step > 0:
                    wait(step_flags + step - 1, tl.num_programs(0), step, timeout_info, MAX_SPINS)
            args = weights, weight_hh, weight_rows, h_rows, prev_mask, 0
            recurrent = recurrent_matmul(*args, OUT, 4 * H, False, ACC, CHUNKS, BLOCK_K, DOT, PRECISION)
            if STACK:
                recurrent += of_below
            rec_i, rec_f, rec_g, rec_o = split_gates(recurrent, BLOCK_H, BLOCK_B)

            rec_i += pre_i.to(ACC)
            rec_f += pre_f.to(ACC)
            rec_g += pre_g.to(ACC)
            rec_o += pre_o.to(ACC)
            if STACK:
                rec_i += bias_i
                rec_f += bias_f
                rec_g += bias_g
                rec_o += bias_o
            i, f, g, o, c_next, h = cell_forward(rec_i, rec_f, rec_g, rec_o, c_tile)
            c_tile = tl.where(active, c_next, c_tile)
            h = h.to(y.dtype.element_ty)

            hidden = row_offset[None, :] * H + units[:, None]
            if OUT < H:
                tl.store(unprojected + state, h, mask=active)
            else:
                tl.store(y + hidden, h, mask=active)
            if DROP:
                x = drop(h, seed, keep, recurrence, t, rows[None, :] * H + units[:, None])
                tl.store(dropped + hidden, x, mask=active & (recurrence < tl.num_programs(2) - 1))
            if GRID:
                publish(step_flags + step)
            if SAVE:
                tl.store(c + hidden, c_next, mask=active)
                tl.store(gates + gate, i, mask=active)
                tl.store(gates + gate + H, f, mask=active)
                tl.store(gates + gate + 2 * H, g, mask=active)
                tl.store(gates + gate + 3 * H, o, mask=active)

        if PROJECT:
            args = (), weight_hr, features, unprojected + states * H, active_rows, 0
            h = recurrent_matmul(*args, H, OUT, False, ACC, PROJ_CHUNKS, BLOCK_K, DOT, PRECISION)
            feature = row_offset[None, :] * OUT + features[:, None]
            tl.store(y + feature, h.to(y.dtype.element_ty), mask=(features < OUT)[:, None] & active_rows[None, :])

    if CELL:
        tl.store(cn + state, c_tile, mask=mask)
    if OUT == H or PROJECT:
        # From this program's part of y, which may be of other threads than these.
        tl.debug_barrier()
        own = features if PROJECT else units
        steps = T
        if LENGTHS:
            steps = length
        end = tl.where(backwards, 0, steps - 1)
        step_offset = tl.load(offsets + end, mask=real_rows, other=0) if PACKED else end.to(tl.int64) * step_stride
        h_rows = tl.where(steps > 0, y + (step_offset * DIRECTIONS + row_offsets) * OUT, h0 + states * OUT)
        own_mask = (own < OUT)[:, None] & real_rows[None, :]
        h = tl.load(h_rows[None, :] + own[:, None], mask=own_mask, other=0.0)
        tl.store(hn + states[None, :] * OUT + own[:, None], h, mask=own_mask)


def forward(
    input_gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    plan: Plan,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
    stack: Stack = NO_STACK,
    weight_hr: Tensor | None = None,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs the recurrences of one layer's directions, or of a stack of layers.

    Args:
        input_gates: (T, B, D*4H), (B, T, D*4H) if the layout says so, or (rows, D*4H) of a packed sequence, contiguous:
            x W_ih^T + b, of the first layer of a stack.
        weight_hh: (R, 4H, H); (4H, H) of a single one, as the states below are then (B, H).
        h0, c0: (R, B, H), contiguous, h0 of the dtype of input_gates.
        plan: mode and tiles.
        reverse: of a single direction, run from the last step to the first. Of two the second does.
        layout: where the sequences lie.
        c_reset: (R, B, H) in the accumulator's dtype, with layout.starts: the cell from which a reset row goes on. Its
            h is 0: the product of another one belongs to input_gates.
        stack: what leads from one recurrence to the next, which then are layers.
        weight_hr: (R, P, H), a projection of h; h0 and y then have P features, and weight_hh is (R, 4H, P). The tiles
            must have features for it, and the recurrences cannot be layers.
        save: also return what backward needs.

    Returns:
        y: as input_gates with D*H features (D*P), h of every step, zero past a row's length; of a stack (L, T, B, H).
        hn: as h0, each row's last h.
        cn: as c0 in the accumulator's dtype (float32; float64 for float64), each row's last cell.
        c: as input_gates with D*H features, of a stack as y, in the accumulator's dtype, and gates, as input_gates,
        activated, of a stack as y with 4H features; None without save.
    """
    B, out = h0.shape[-2:]
    H = c0.shape[-1]
    shape = (*(h0.shape[:1] if stack.flags["STACK"] else ()), *input_gates.shape[:-1])
    width = input_gates.shape[-1] // 4  # of all directions
    y = alloc_exchange_buffer(input_gates, (*shape, width // H * out), plan.forward, layout)
    dropped = alloc_exchange_buffer(y, y[1:].shape, plan.forward, DENSE) if stack.flags["DROP"] else None
    unprojected = None if weight_hr is None else y.new_empty(c0.shape)
    new = input_gates.new_zeros if layout.padded else input_gates.new_empty
    c = new((*shape, width), dtype=accumulator(y.dtype)) if save else None
    gates = input_gates.new_empty((*shape, input_gates.shape[-1])) if save else None
    hn, cn = h0.new_empty(h0.shape), c0.new_empty(c0.shape, dtype=accumulator(c0.dtype))
    if B > 0:
        if plan.forward.poll and h0.data_ptr() % 16 > 0:
            h0 = h0.clone()  # which a polling kernel loads 16 bytes at a time
        args = input_gates, weight_hh, h0, c0, c_reset, *layout.tensors
        if weight_in_registers(plan, plan.forward):
            kernel, tensors = latency_forward_kernel, (*args, *stack, y, dropped, c, gates, hn, cn)
        else:
            kernel, tensors = forward_kernel, (*args, weight_hr, *stack, y, dropped, c, gates, hn, cn, unprojected)
        launch(
            kernel,
            tensors,
            plan,
            plan.forward,
            layout,
            cn,
            out,
            ("CELL", "PROJECT"),
            reverse,
            **stack.flags,
            SAVE=save,
        )
    return y, hn, cn, c, gates
