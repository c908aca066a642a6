"""The backward recurrence: the same loop backwards in time, and its launcher."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_backward
from .dropout import drop
from .gates import cast_gates, load_gates, store_gates
from .latency_backward import latency_backward_kernel
from .launch import SIZES, alloc_exchange_buffer, launch, weight_in_registers
from .layout import DENSE, NO_STACK, Layout, Stack
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .plan import Plan
from .rows import Sizes, locate_neighbours, rows_of_program, without_starts
from .saved import cells_before, cut, load_dh
from .sync import publish, wait_if
from .team import Team, sum_behind_flag
from .throughput_backward import throughput_backward_kernel
from .tiles import programs_of


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence; D: directions, 1 in a stack
    dy,  # (rows, D, OUT), of a stack (rows, H), of its last layer
    dhn,  # (R, B, OUT): gradient of each row's last h
    weight_hh,  # (R, 4H, OUT): a matrix for each recurrence
    c0,  # (R, B, H)
    c,  # (rows, D, H), of a stack (R, rows, H): saved by forward
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H): saved by forward
    dc_steps,  # as c: gradient of c of every step, beside its part in h; None: there is none; never of a stack
    dcn,  # (R, B, H): gradient of each row's last cell
    c_reset,  # (R, B, H): the cell from which a reset row goes on; only with layout.starts
    dc_reset,  # (R, B, H), also an output: its gradient, summed over the resets; as c_reset
    weight_hr,  # (R, OUT, H): the projection; only if OUT < H
    layout,  # a LayoutTensors
    stack,  # a Stack; of its weights the recurrences are layers, and without them directions
    # Outputs
    dgates,  # as gates: w.r.t. the pre-activations; also the buffer through which programs exchange it
    dc0,  # (R, B, H): gradient of c0; in between, where every step is a launch, of the cell before step_end
    dh_steps,  # (rows, D, OUT): the whole gradient of h, which the cells take; only if OUT < H
    # Exchange
    products,  # (R, 4, B, H) between the programs of a team: each one's part of dh; only of a team
    team_flags,  # (R, batch groups, teams): how many have written their part, zero at launch; only of a team
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
    OUT: tl.constexpr,  # features of h: H, or fewer behind a projection, which no grid has
    # Form
    MODE: tl.constexpr,  # "grid": programs hand dgates to each other; "step": one launch a step
    PHASE: tl.constexpr,  # of a step with a projection, "projection" (makes dh_steps) or "cell"; otherwise ""
    DIRECTIONS: tl.constexpr,  # D; of two the second ran from the last step to the first
    REVERSE: tl.constexpr,  # a single direction ran so, and this pass runs from the first
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.backward
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = dc0.dtype.element_ty
    STACK: tl.constexpr = stack.weight_ih is not None
    TEAM: tl.constexpr = TILES.team
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    BLOCK_K: tl.constexpr = TILES.chunk
    OF_ABOVE: tl.constexpr = shape(H, H, BLOCK_K, True, 4 // TEAM)
    RESIDENT: tl.constexpr = (TILES.kept if TILES.kept > 0 else OF_ABOVE.CHUNKS) if MODE == "grid" else 0
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, STACK, DIRECTIONS, REVERSE, BLOCK_B, False)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (units < H)[:, None] & rows.mask[None, :]
    state = rows.states[None, :] * H + units[:, None]
    group = recurrence * tl.cdiv(B, BLOCK_B) + row_begin // BLOCK_B + tl.program_id(1)
    if MODE == "grid":
        step_flags = sync.flags + group.to(tl.int64) * T

    # The chunks of W_hh^T that this program multiplies: those of all gates for its own units, or of one gate for the
    # units of its whole team. So many of them stay on chip for all steps.
    of_team = tl.program_id(0) // TEAM
    first = tl.program_id(0) % TEAM * OF_ABOVE.GATE_CHUNKS
    team_units = of_team * TEAM * BLOCK_H + tl.arange(0, TEAM * BLOCK_H)
    weight = weight_hh + recurrence * (4 * H * OUT)
    if PHASE == "projection":
        BLOCK_P: tl.constexpr = TILES.features
        features = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        OF_OWN: tl.constexpr = shape(H, OUT, BLOCK_K, True, 4)
        own = Weight(weight, features, 0)
    elif PHASE == "cell":
        OF_OWN: tl.constexpr = shape(OUT, H, BLOCK_K, True)
        own = Weight(weight_hr + recurrence * (OUT * H), units, 0)
    else:
        OF_OWN: tl.constexpr = OF_ABOVE
        own = Weight(weight, team_units, first)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    last_layer = True
    if STACK:
        # The last layer takes dy, and has the products of the others with zeros for dgates. The layer above is ahead:
        # its part of a sum is made while the own dgates are on the way.
        depth = tl.num_programs(2) - 1 - tl.program_id(2)
        last_layer = depth == 0
        dy -= recurrence * total_rows * H
        weight = stack.weight_ih + tl.minimum(recurrence, tl.num_programs(2) - 2) * (4 * H * H)
        above = Weight(weight, team_units, first)
        above_chunks = load_chunks(above, RESIDENT, OF_ABOVE, PRECISION)
        if MODE == "grid":
            flags_above = step_flags + tl.cdiv(B, BLOCK_B) * T
        step_begin = tl.maximum(step_begin - depth, 0)
        step_end = tl.minimum(step_end - depth, T)
    team_states = rows.batch[None, :] * H + team_units[:, None]
    if TEAM > 1:
        team_mask = (team_units < H)[:, None] & rows.mask[None, :]
        team_flag = team_flags + group * (tl.num_programs(0) // TEAM) + of_team
        part = B.to(tl.int64) * H
        of_rows, in_team = rows.batch[None, :] * H, team_units[:, None]
        # The gate's number is found again from its chunks: named before them, it has each turn of the loop make the
        # weight's addresses anew.
        own_gate, gate_of_team = recurrence * TEAM, first // OF_ABOVE.GATE_CHUNKS
        team = Team(products, part, own_gate, gate_of_team, of_rows, in_team, team_mask, units[:, None], mask)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    dc = tl.load(dcn + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if MODE != "grid":
        dc += tl.load(dc0 + state, mask=mask & (step_begin > 0), other=0.0)
    if layout.starts is not None:
        dc_reset_tile = tl.load(dc_reset + state, mask=mask, other=0.0)

    for step in range(step_begin, step_end):
        # In the direction's own order `after` comes next, and was done in the turn before this one.
        at, after, before = locate_neighbours(step, layout, rows)
        next_rows = dgates + after.rows * (4 * H)
        next_mask = without_starts(at.mask & after.mask, after, layout)
        c_rows = cells_before(c, c0, c_reset, at, before, layout, rows, H)
        if PHASE == "projection":
            project_gradient(own, next_rows, next_mask, dy, dhn, dh_steps, at, after, rows, OF_OWN, ACC, PRECISION)
        else:
            # All that does not wait for dgates of the step after is loaded before its flag is awaited.
            active = mask if layout.lengths is None else mask & at.mask[None, :]
            gate = at.rows[None, :] * (4 * H) + units[:, None]
            hidden = at.rows[None, :] * H + units[:, None]
            saved = load_gates(gates + gate, active, H)
            c_t = tl.load(c + hidden, mask=active, other=0.0)
            c_prev = tl.load(c_rows[None, :] + units[:, None], mask=active, other=0.0)
            if PHASE == "cell":
                next_rows, next_mask = dh_steps + at.rows * OUT, at.mask
            else:
                dy_t, dhn_t = load_dh(dy + hidden, active & last_layer, dhn + state, active & (~after.mask)[None, :])
            if dc_steps is not None:
                dc += tl.load(dc_steps + hidden, mask=active, other=0.0).to(ACC)
            if STACK:  # (5')
                if MODE == "grid":
                    wait_if(depth > 0, flags_above, step, sync.timeout_info, MAX_SPINS)
                rows_above, fed = dgates + (at.rows + total_rows) * (4 * H), at.mask & (depth > 0)
                dh_above = recurrent_matmul(above, above_chunks, rows_above, fed, OF_ABOVE, ACC, PRECISION)
                if stack.seed is not None:
                    dh_above = drop(dh_above, stack.seed, stack.keep, recurrence, at.t, team_states)
            if MODE == "grid":
                wait_if(step > 0, step_flags, step, sync.timeout_info, MAX_SPINS, 1)
            dh = recurrent_matmul(own, own_chunks, next_rows, next_mask, OF_OWN, ACC, PRECISION)
            if STACK:
                dh += dh_above
            if TEAM > 1:
                dh = sum_behind_flag(team, dh, team_flag, step, sync.timeout_info, TEAM, MAX_SPINS)
            dh = dh if PHASE == "cell" else dh + (dy_t.to(ACC) + dhn_t.to(ACC))  # (5)
            dgates_t, dc_prev = cell_backward(cast_gates(saved, ACC), c_prev, c_t, dh, dc)
            if layout.starts is not None:
                dc_prev, dc_reset_tile = cut(at.start[None, :], dc_prev, dc_reset_tile)
            dc = tl.where(active, dc_prev, dc)
            store_gates(dgates + gate, dgates_t, active, H)
            if MODE == "grid":
                publish(step_flags + step)

    if PHASE != "projection":
        tl.store(dc0 + state, dc, mask=mask)
        if layout.starts is not None:
            tl.store(dc_reset + state, dc_reset_tile, mask=mask)


@triton.jit
def project_gradient(
    weight,
    next_rows,
    next_mask,
    dy,
    dhn,
    dh_steps,
    at,
    after,
    rows,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(5p) of a step, dy' for the features that the program has of the weight."""
    OUT: tl.constexpr = SHAPE.UNITS
    feature = at.rows[None, :] * OUT + weight.units[:, None]
    mask = (weight.units < OUT)[:, None] & at.mask[None, :]
    dh = tl.load(dy + feature, mask=mask, other=0.0).to(ACC)
    at_end = dhn + rows.states[None, :] * OUT + weight.units[:, None]
    at_end = tl.load(at_end, mask=mask & (~after.mask)[None, :], other=0.0)
    dh += recurrent_matmul(weight, (), next_rows, next_mask, SHAPE, ACC, PRECISION)
    dh += at_end.to(ACC)
    tl.store(dh_steps + feature, dh.to(dh_steps.dtype.element_ty), mask=mask)


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
    tiles, lead = plan.backward, c0.shape[:-2]
    dgates = alloc_exchange_buffer(gates, gates.shape, tiles, layout)
    dc0 = torch.empty_like(c0)
    dc_reset = None if c_reset is None else torch.zeros_like(c0)
    dh_steps = None if weight_hr is None else alloc_exchange_buffer(dy, dy.shape, tiles, layout)
    products = team_flags = None
    if tiles.team > 1 and tiles.poll:
        products = c0.new_zeros((*lead, tiles.team, 2, B, H), dtype=torch.int64)
    elif tiles.team > 1:
        products = c0.new_empty((*lead, tiles.team, B, H))
        programs, groups = programs_of(tiles, H, B)
        team_flags = c0.new_zeros((*lead, groups, programs // tiles.team), dtype=torch.int32)
    if B > 0:
        inputs = dy, dhn, weight_hh, c0, c, gates, dc_steps, dcn, c_reset, dc_reset
        kernel: Any = latency_backward_kernel
        if tiles.in_turn:
            dc0.copy_(dcn)
            kernel = throughput_backward_kernel
            args = dy, dhn, weight_hh, c0, c, gates, dc_steps, c_reset, layout.tensors, dgates, dc0, dc_reset
        elif weight_in_registers(plan.mode, tiles):
            args = *inputs, layout.tensors, stack, dgates, dc0, products
        else:
            outputs = dgates, dc0, dh_steps, products, team_flags
            kernel, args = backward_kernel, (*inputs, weight_hr, layout.tensors, stack, *outputs)
        out, stacked = dhn.shape[-1], stack.weight_ih is not None
        launch(kernel, args, plan, layout, c0, out, True, reverse, stacked)
    return dgates, dc0, dc_reset, dh_steps
