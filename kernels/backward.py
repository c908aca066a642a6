"""The backward recurrence: the same loop backwards in time, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_backward
from .dropout import drop
from .latency_backward import latency_backward_kernel
from .launch import SIZES, alloc_exchange_buffer, launch, weight_in_registers
from .layout import DENSE, NO_STACK, Layout, Stack
from .matmul import load_weight, recurrent_matmul
from .plan import Plan
from .sync import publish, wait
from .tiles import programs_of


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy,  # (rows, D, OUT) in; rows = T * B, or the rows of the packed sequence; of a stack (rows, H), of its last layer
    dhn,  # (R, B, OUT) in: gradient of each row's last h
    weight_hh,  # (R, 4H, OUT) in: a matrix for each recurrence
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
    weight_hr,  # (R, OUT, H) in: the projection; only if OUT < H
    weight_ih,  # (R - 1, 4H, H) in: of the layers above the first; only if STACK
    seed,  # (1,) in: of the dropout between layers; only if DROP
    keep,  # (1,) in: the share of units that it keeps; only if DROP
    dgates,  # as gates, out: w.r.t. the pre-activations; also the buffer through which programs exchange it
    dc0,  # (R, B, H) out: gradient of c0; in between, where every step is a launch, of the cell before step_end
    products,  # (R, TEAM, B, H) between the programs of a team: each one's part of dh; only if TEAM > 1
    team_flags,  # (R, batch groups, teams) in/out: who has written its part, zero at launch; only if TEAM > 1
    dh_steps,  # (rows, D, OUT) out: the whole gradient of h, which the cells take; only if OUT < H
    flags,  # (R, batch groups, T) in/out: step flags, zero at launch; only if GRID
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
    OUT: tl.constexpr,  # features of h: H, or fewer behind a projection, which GRID has not
    GRID: tl.constexpr,  # programs hand dgates to each other; otherwise one launch a step
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
    DIRECTIONS: tl.constexpr,  # D; of two the second ran from the last step to the first
    REVERSE: tl.constexpr,  # a single direction ran so, and this pass runs from the first
    LENGTHS: tl.constexpr,  # each batch row has its own length
    PACKED: tl.constexpr,  # rows of a PackedSequence: the steps have ever fewer; with LENGTHS
    RESET: tl.constexpr,  # rows are reset within the sequence
    STACK: tl.constexpr,  # the recurrences are layers, not directions
    DROP: tl.constexpr,  # dropout between the layers
    DC_STEPS: tl.constexpr,  # the cells of all steps have a gradient of their own; not if STACK
    PROJECT: tl.constexpr,  # this launch makes dh_steps, if OUT < H
    CELL: tl.constexpr,  # ... or goes through the projection and the cells
    DOT: tl.constexpr,  # dtype of the matrix operands
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    BLOCK_B: tl.constexpr,  # batch rows of a program
    BLOCK_H: tl.constexpr,  # hidden units of a program
    BLOCK_P: tl.constexpr,  # features of dh_steps of a program, if PROJECT
    TEAM: tl.constexpr,  # programs that share the products of all their units, a gate for each: 4; otherwise 1
    KEPT: tl.constexpr,  # chunks of W_hh that stay on chip; the others are loaded at every step; 0: all stay
    BLOCK_K: tl.constexpr,  # units of one gate that one product reduces over
):
    ACC: tl.constexpr = dc0.dtype.element_ty
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K  # of one gate
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = row_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
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
        # The last layer takes dy, and has the products of the others with zeros for dgates.
        depth = tl.num_programs(2) - 1 - tl.program_id(2)
        row_offsets = recurrence * total_rows + batch_offsets
    weight_hh += recurrence * (4 * H * OUT)
    group = recurrence * tl.cdiv(B, BLOCK_B) + row_begin // BLOCK_B + tl.program_id(1)
    if GRID:
        step_flags = flags + group.to(tl.int64) * T
        if STACK:
            flags_above = step_flags + tl.cdiv(B, BLOCK_B) * T

    # The chunks of W_hh^T that this program multiplies: those of all gates for its own units, or of one gate for the
    # units of its whole team. So many of them stay on chip for all steps.
    team = tl.program_id(0) // TEAM
    chunk_begin = tl.program_id(0) % TEAM * CHUNKS
    team_units = team * TEAM * BLOCK_H + tl.arange(0, TEAM * BLOCK_H)
    team_mask = (team_units < H)[:, None] & real_rows[None, :]
    OWN: tl.constexpr = 4 // TEAM * CHUNKS
    RESIDENT: tl.constexpr = (KEPT if KEPT > 0 else OWN) if GRID else 0
    weights = ()
    for k in tl.static_range(RESIDENT):
        chunk = load_weight(weight_hh, team_units, chunk_begin + k, H, H, True, BLOCK_K, PRECISION)
        weights = weights + (chunk,)
    if PROJECT:
        features = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    elif OUT < H:
        PROJ_CHUNKS: tl.constexpr = (OUT + BLOCK_K - 1) // BLOCK_K
        weight_hr += recurrence * (OUT * H)
    if STACK:
        weight_ih += tl.minimum(recurrence, tl.num_programs(2) - 2) * (4 * H * H)
        weights_above = ()
        for k in tl.static_range(RESIDENT):
            chunk = load_weight(weight_ih, team_units, chunk_begin + k, H, H, True, BLOCK_K, PRECISION)
            weights_above = weights_above + (chunk,)
        step_begin = tl.maximum(step_begin - depth, 0)
        step_end = tl.minimum(step_end - depth, T)

    if LENGTHS:
        length = tl.load(lengths + rows, mask=real_rows, other=0)
        last = tl.max(length) - 1
        step_end = tl.minimum(step_end, last + 1)
    else:
        last = T - 1
    dc = tl.load(dcn + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if not GRID:
        dc += tl.load(dc0 + state, mask=mask & (step_begin > 0), other=0.0)
    if RESET:
        dc_reset_tile = tl.load(dc_reset + state, mask=mask, other=0.0)

    for step in range(step_begin, step_end):
        # t_next comes after t in the direction's own order and was done in the previous turn; t_prev comes next here.
        t = tl.where(backwards, step, last - step)
        t_next = tl.where(backwards, t - 1, t + 1)
        t_prev = tl.where(backwards, t + 1, t - 1)
        has_next = real_rows & (step > 0)
        has_prev = real_rows & (step < last)
        if LENGTHS:
            active_rows = real_rows & (t < length)
            active = mask & active_rows[None, :]
            has_next = has_next & (t_next < length)
            has_prev = has_prev & (t_prev < length)
        if PACKED:
            step_offset = tl.load(offsets + t)
            next_step_offset = tl.load(offsets + t_next, mask=step > 0, other=0)
            prev_step_offset = tl.load(offsets + t_prev, mask=step < last, other=0)
        else:
            step_offset = t.to(tl.int64) * step_stride
            next_step_offset = t_next.to(tl.int64) * step_stride
            prev_step_offset = t_prev.to(tl.int64) * step_stride
        row_offset = step_offset * DIRECTIONS + row_offsets
        c_rows = tl.where(has_prev, c + (prev_step_offset * DIRECTIONS + row_offsets) * H, c0 + states * H)
        next_mask = active_rows & has_next
        if RESET:
            start_rows = starts + batch_offsets if STACK else starts + recurrence * total_rows + batch_offsets
            start = tl.load(start_rows + step_offset, mask=active_rows, other=0) != 0
            c_rows = tl.where(start, c_reset + states * H, c_rows)
            next_mask = next_mask & (tl.load(start_rows + next_step_offset, mask=has_next, other=0) == 0)

        dgates_rows = dgates + (next_step_offset * DIRECTIONS + row_offsets) * (4 * H)
        if PROJECT:
            feature = row_offset[None, :] * OUT + features[:, None]
            features_of = (features < OUT)[:, None] & active_rows[None, :]
            dh = tl.load(dy + feature, mask=features_of, other=0.0).to(ACC)
            at_end = tl.load(
                dhn + states[None, :] * OUT + features[:, None], mask=features_of & (~has_next)[None, :], other=0.0
            )
            args = weights, weight_hh, features, dgates_rows, next_mask, 0
            dh += recurrent_matmul(*args, H, OUT, True, ACC, OWN, BLOCK_K, DOT, PRECISION)
            dh += at_end.to(ACC)
            tl.store(dh_steps + feature, dh.to(dh_steps.dtype.element_ty), mask=features_of)

        if CELL:
            # All that does not wait for dgates of t_next is loaded before the flag is awaited.
            gate = row_offset[None, :] * (4 * H) + units[:, None]
            hidden = row_offset[None, :] * H + units[:, None]
            i = tl.load(gates + gate, mask=active, other=0.0)
            f = tl.load(gates + gate + H, mask=active, other=0.0)
            g = tl.load(gates + gate + 2 * H, mask=active, other=0.0)
            o = tl.load(gates + gate + 3 * H, mask=active, other=0.0)
            c_t = tl.load(c + hidden, mask=active, other=0.0)
            c_prev = tl.load(c_rows[None, :] + units[:, None], mask=active, other=0.0)
            if STACK:
                dy_t = tl.load(dy + hidden - recurrence * total_rows * H, mask=active & (depth == 0), other=0.0)
            elif OUT == H:
                dy_t = tl.load(dy + hidden, mask=active, other=0.0)
            if OUT == H:
                dhn_t = tl.load(dhn + state, mask=active & (~has_next)[None, :], other=0.0)
            if DC_STEPS:
                dc += tl.load(dc_steps + hidden, mask=active, other=0.0).to(ACC)

            if OUT < H:
                args = (), weight_hr, units, dh_steps + row_offset * OUT, active_rows, 0
                dh = recurrent_matmul(*args, OUT, H, True, ACC, PROJ_CHUNKS, BLOCK_K, DOT, PRECISION)
            else:
                if STACK:
                    # The layer above is ahead: its part of the sum is made while the own dgates are on the way.
                    if GRID:
                        if depth > 0:
                            wait(flags_above + step, tl.num_programs(0), step + 1, timeout_info, MAX_SPINS)
                    above = dgates + (row_offset + total_rows) * (4 * H)
                    fed = active_rows & (depth > 0)
                    args = weights_above, weight_ih, team_units, above, fed, chunk_begin
                    dh_above = recurrent_matmul(*args, H, H, True, ACC, OWN, BLOCK_K, DOT, PRECISION)
                    if DROP:
                        dh_above = drop(dh_above, seed, keep, recurrence, t, rows[None, :] * H + team_units[:, None])
                if GRID:
                    if step > 0:
                        wait(step_flags + step - 1, tl.num_programs(0), step, timeout_info, MAX_SPINS)
                args = weights, weight_hh, team_units, dgates_rows, next_mask, chunk_begin
                dh = recurrent_matmul(*args, H, H, True, ACC, OWN, BLOCK_K, DOT, PRECISION)
                if STACK:
                    dh += dh_above
            if TEAM > 1:
                # Everyone in the team writes its gate's part for all units, and sums the four parts of its own units.
                # The next step overwrites them: by then the team has counted this one's dgates in, so has read them.
                part, own = B.to(tl.int64) * H, rows[None, :] * H
                tl.store(
                    products + (recurrence * TEAM + chunk_begin // CHUNKS) * part + own + team_units[:, None],
                    dh,
                    mask=team_mask,
                )
                team_flag = team_flags + group * (tl.num_programs(0) // TEAM) + team
                publish(team_flag)
                wait(team_flag, TEAM * (step + 1), step + 1, timeout_info, MAX_SPINS)
                dh = tl.zeros((BLOCK_H, BLOCK_B), ACC)
                for gate_of_team in tl.static_range(TEAM):
                    of_gate = products + (recurrence * TEAM + gate_of_team) * part
                    dh += tl.load(of_gate + own + units[:, None], mask=mask, other=0.0)
            if OUT == H:
                dh += dy_t.to(ACC) + dhn_t.to(ACC)  # (5)

            di, df, dg, do, dc_prev = cell_backward(i.to(ACC), f.to(ACC), g.to(ACC), o.to(ACC), c_prev, c_t, dh, dc)
            if RESET:
                dc_reset_tile += tl.where(start[None, :], dc_prev, 0.0)
                dc_prev = tl.where(start[None, :], 0.0, dc_prev)
            dc = tl.where(active, dc_prev, dc)
            di = di.to(dgates.dtype.element_ty)
            df = df.to(dgates.dtype.element_ty)
            dg = dg.to(dgates.dtype.element_ty)
            do = do.to(dgates.dtype.element_ty)
            tl.store(dgates + gate, di, mask=active)
            tl.store(dgates + gate + H, df, mask=active)
            tl.store(dgates + gate + 2 * H, dg, mask=active)
            tl.store(dgates + gate + 3 * H, do, mask=active)
            if GRID:
                publish(step_flags + step)

    if CELL:
        tl.store(dc0 + state, dc, mask=mask)
        if RESET:
            tl.store(dc_reset + state, dc_reset_tile, mask=mask)


def backward(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    c: Tensor,
    gates: Tensor,
    *,
    plan: Plan,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
    stack: Stack = NO_STACK,
    weight_hr: Tensor | None = None,
    dc_steps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs the recurrences of one layer's directions, or of a stack of layers, backwards.

    Args:
        dy: as forward()'s y, contiguous; of a stack that of its last layer.
        dhn, dcn: as h0 and c0, gradients of each row's last h and c.
        weight_hh: as given to forward().
        c0: (R, B, H) in the accumulator's dtype.
        c, gates: as saved by forward().
        plan, reverse, layout, c_reset, stack, weight_hr: as given to forward().
        dc_steps: as c, the gradient of the cells of all steps; None: they have none. Not of a stack.

    Returns:
        dgates: as gates, the gradient w.r.t. the pre-activations; zero past a row's length.
        dc0: as c0.
        dc_reset: the same of c_reset; None without resets.
        dh_steps: as dy, the gradient of h with what comes from the steps after; None without a projection.
    """
    B, H = c0.shape[-2:]
    dgates = alloc_exchange_buffer(gates, gates.shape, plan.backward, layout)
    dc0 = c0.new_empty(c0.shape)
    dc_reset = None if c_reset is None else torch.zeros_like(c0)
    team, poll = plan.backward.team, plan.backward.poll
    products = team_flags = None
    if team > 1 and poll:
        products = c0.new_zeros((*c0.shape[:-2], team, 2, B, H), dtype=torch.int64)
    elif team > 1:
        products = c0.new_empty((*c0.shape[:-2], team, B, H))
        programs, groups = programs_of(plan.backward, H, B)
        team_flags = c0.new_zeros((*c0.shape[:-2], groups, programs // team), dtype=torch.int32)
    dh_steps = None if weight_hr is None else alloc_exchange_buffer(dy, dy.shape, plan.backward, layout)
    if B > 0:
        weight_ih, _, *dropout = stack
        args = dy, dhn, weight_hh, c0, c, gates, dc_steps, dcn, c_reset, dc_reset, *layout.tensors
        if weight_in_registers(plan, plan.backward):
            kernel, tensors = latency_backward_kernel, (*args, weight_ih, *dropout, dgates, dc0, products)
        else:
            of_team = products, team_flags
            kernel, tensors = backward_kernel, (*args, weight_hr, weight_ih, *dropout, dgates, dc0, *of_team, dh_steps)
        launch(
            kernel,
            tensors,
            plan,
            plan.backward,
            layout,
            c0,
            dhn.shape[-1],
            ("PROJECT", "CELL"),
            reverse,
            **stack.flags,
            DC_STEPS=dc_steps is not None,
        )
    return dgates, dc0, dc_reset, dh_steps
