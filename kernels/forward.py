"""The forward recurrence: one kernel for the whole sequence, and its launcher.

A launch has one or more recurrences: the directions of a layer, or the layers of a stack, each of which takes what the
layer below has left a step ago.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_forward
from .dropout import drop
from .gates import add_gates, cast_gates, load_gates, split_gates, store_gates
from .latency_forward import latency_forward_kernel
from .launch import SIZES, alloc_exchange_buffer, launch, weight_in_registers
from .layout import DENSE, NO_STACK, Layout, Stack, accumulator
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .plan import Plan
from .rows import Sizes, last_h, locate, rows_of_program, time_before, time_of, with_starts, without_starts
from .sync import publish, wait_if
from .throughput_forward import throughput_forward_kernel


@triton.jit
def gate_rows(H: tl.constexpr, BLOCK_H: tl.constexpr):
    """The rows of a weight (4H, ...) for this program's units, a unit's four gates side by side; 4H past the last unit:
    (4 * BLOCK_H,)."""
    index = tl.arange(0, 4 * BLOCK_H)
    units = tl.program_id(0) * BLOCK_H + index // 4
    return tl.where(units < H, index % 4 * H + units, 4 * H)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence; D: directions, 1 in a stack
    input_gates,  # (rows, D, 4H): x W_ih^T + b
    weight_hh,  # (R, 4H, OUT): a matrix for each recurrence
    h0,  # (R, B, OUT)
    c0,  # (R, B, H)
    c_reset,  # (R, B, H): the cell from which a reset row goes on, its h being 0; only with layout.starts
    weight_hr,  # (R, OUT, H): the projection; only if OUT < H
    layout,  # a LayoutTensors
    stack,  # a Stack; of its weights the recurrences are layers, and without them directions
    # Outputs
    y,  # (rows, D, OUT), of a stack (R, rows, H): h of every step; also the buffer by which programs exchange it
    dropped,  # (R - 1, rows, H): y with dropout, for the layer above; only with stack.seed
    c,  # (rows, D, H), of a stack (R, rows, H): c of every step; None: nothing is kept for backward
    gates,  # (rows, D, 4H), of a stack (R, rows, 4H): activated gates; as c
    hn,  # (R, B, OUT): each row's last h
    cn,  # (R, B, H): each row's last cell; in between, where every step is a launch, the one after step_end
    unprojected,  # (R, B, H) between the launches of a step: its o tanh c; only if OUT < H
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
    OUT: tl.constexpr,  # features of h: H, or fewer behind a projection, which no grid has
    # Form
    MODE: tl.constexpr,  # "grid": programs hand h to each other; "step": one launch a step
    PHASE: tl.constexpr,  # of a step with a projection, "cell" or "projection"; otherwise ""
    DIRECTIONS: tl.constexpr,  # D; of two the second runs from the last step to the first
    REVERSE: tl.constexpr,  # a single direction runs so
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.forward
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = cn.dtype.element_ty
    STACK: tl.constexpr = stack.weight_ih is not None
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    BLOCK_K: tl.constexpr = TILES.chunk
    OF_OWN: tl.constexpr = shape(OUT, 4 * H, BLOCK_K)
    OF_BELOW: tl.constexpr = shape(H, 4 * H, BLOCK_K)
    RESIDENT: tl.constexpr = (TILES.kept if TILES.kept > 0 else OF_OWN.CHUNKS) if MODE == "grid" else 0
    recurrence = 0
    if DIRECTIONS > 1 or STACK:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, STACK, DIRECTIONS, REVERSE, BLOCK_B, False)
    mask = (units < H)[:, None] & rows.mask[None, :]
    state = rows.states[None, :] * H + units[:, None]
    group = row_begin // BLOCK_B + tl.program_id(1)
    if MODE == "grid":
        step_flags = sync.flags + (recurrence * tl.cdiv(B, BLOCK_B) + group).to(tl.int64) * T

    weight_rows = gate_rows(H, BLOCK_H)
    own = Weight(weight_hh + recurrence * (4 * H * OUT), weight_rows, 0)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    if STACK:
        # The first layer takes input_gates, and has the products of the others with zeros for an input.
        above = recurrence > 0
        below = tl.maximum(recurrence - 1, 0)
        below_weight = Weight(stack.weight_ih + below * (4 * H * H), weight_rows, 0)
        below_chunks = load_chunks(below_weight, RESIDENT, OF_BELOW, PRECISION)
        bias = stack.bias + below * (4 * H) + units[:, None]
        bias = cast_gates(load_gates(bias, ((units < H) & above)[:, None], H), ACC)
        if MODE == "grid":
            flags_below = sync.flags + (below * tl.cdiv(B, BLOCK_B) + group) * T
        step_begin = tl.maximum(step_begin - recurrence.to(tl.int32), 0)
        step_end = tl.minimum(step_end - recurrence.to(tl.int32), T)
    features = units
    if PHASE == "projection":
        BLOCK_P: tl.constexpr = TILES.features
        features = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        OF_HR: tl.constexpr = shape(H, OUT, BLOCK_K)
        hr = Weight(weight_hr + recurrence * (OUT * H), features, 0)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    c_tile = tl.load(c0 + state, mask=mask & (step_begin == 0), other=0.0).to(ACC)
    if MODE != "grid":
        c_tile += tl.load(cn + state, mask=mask & (step_begin > 0), other=0.0)
    if layout.starts is not None:
        c_reset_tile = tl.load(c_reset + state, mask=mask, other=0.0)

    for step in range(step_begin, step_end):
        # Where the step's rows lie, and where the step before in this direction left h: in h0 for a row's first.
        at = with_starts(locate(time_of(step, rows), layout, rows, rows.mask, True), layout, rows)
        before = locate(time_before(at.t, rows), layout, rows, step > 0, step > 0)
        h_rows = tl.where(before.mask, y + before.rows * OUT, h0 + rows.states * OUT)
        prev_mask = without_starts(at.mask, at, layout)
        if layout.starts is not None:
            c_tile = tl.where(at.start[None, :], c_reset_tile, c_tile)
        if PHASE == "projection":
            project(hr, unprojected + rows.states * H, y, at, OF_HR, ACC, PRECISION)
        else:
            # All that does not wait for h is loaded before its flag is awaited.
            active = mask if layout.lengths is None else mask & at.mask[None, :]
            gate = at.rows[None, :] * (4 * H) + units[:, None]
            from_input = load_gates(input_gates + gate, active & (recurrence == 0) if STACK else active, H)
            if STACK:  # (1')
                # The layer below is ahead: its part of the sum is made while this layer's own h is on the way.
                if MODE == "grid":
                    wait_if(above, flags_below, step, sync.timeout_info, MAX_SPINS)
                x_rows = (y if dropped is None else dropped) + (at.rows - total_rows) * H
                part = recurrent_matmul(below_weight, below_chunks, x_rows, at.mask & above, OF_BELOW, ACC, PRECISION)
            if MODE == "grid":
                wait_if(step > 0, step_flags, step, sync.timeout_info, MAX_SPINS, 1)
            recurrent = recurrent_matmul(own, own_chunks, h_rows, prev_mask, OF_OWN, ACC, PRECISION)  # (1)
            if STACK:
                recurrent += part
            pre = add_gates(split_gates(recurrent, BLOCK_H, BLOCK_B), from_input)
            if STACK:
                pre = add_gates(pre, bias)
            activated, c_next, h = cell_forward(pre, c_tile)
            c_tile = tl.where(active, c_next, c_tile)
            h = h.to(y.dtype.element_ty)
            hidden = at.rows[None, :] * H + units[:, None]
            tl.store(y + hidden if OUT == H else unprojected + state, h, mask=active)
            if dropped is not None:
                h_dropped = drop(h, stack.seed, stack.keep, recurrence, at.t, rows.batch[None, :] * H + units[:, None])
                tl.store(dropped + hidden, h_dropped, mask=active & (recurrence < tl.num_programs(2) - 1))
            if MODE == "grid":
                publish(step_flags + step)
            if c is not None:
                tl.store(c + hidden, c_next, mask=active)
                store_gates(gates + gate, activated, active, H)

    if PHASE != "projection":
        tl.store(cn + state, c_tile, mask=mask)
    if PHASE != "cell":
        # From this program's part of y, which may be of other threads than these.
        tl.debug_barrier()
        feature_mask = (features < OUT)[:, None] & rows.mask[None, :]
        h = tl.load(last_h(y, h0, layout, rows, OUT)[None, :] + features[:, None], mask=feature_mask, other=0.0)
        tl.store(hn + rows.states[None, :] * OUT + features[:, None], h, mask=feature_mask)


@triton.jit
def project(weight, rows, y, at, SHAPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """(4p) of a step, for the features that the program has of the weight. rows: pointers to what is projected."""
    h = recurrent_matmul(weight, (), rows, at.mask, SHAPE, ACC, PRECISION)
    feature = at.rows[None, :] * SHAPE.UNITS + weight.units[:, None]
    tl.store(y + feature, h.to(y.dtype.element_ty), mask=(weight.units < SHAPE.UNITS)[:, None] & at.mask[None, :])


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
    scale: Tensor | None = None,
    stack: Stack = NO_STACK,
    weight_hr: Tensor | None = None,
    save: bool = True,
    over_input: bool = False,
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
        scale: (R, 4H), of a weight_hh of 8 bits, int8 or float8_e4m3fn, under a plan with `weights`: a row of it is its
            scale times its numbers.
        stack: what leads from one recurrence to the next, which then are layers.
        weight_hr: (R, P, H), a projection of h; h0 and y then have P features, and weight_hh is (R, 4H, P). The tiles
            must have features for it, and the recurrences cannot be layers.
        save: also return what backward needs.
        over_input: the gates may be written over input_gates: the kernels of large batches then do.

    Returns:
        y: as input_gates with D*H features (D*P), h of every step, zero past a row's length; of a stack (L, T, B, H).
        hn: as h0, each row's last h.
        cn: as c0 in the accumulator's dtype (float32; float64 for float64), each row's last cell.
        c: as input_gates with D*H features, of a stack as y, in the accumulator's dtype, and gates, as input_gates,
        activated, of a stack as y with 4H features; None without save.
    """
    B, out = h0.shape[-2:]
    H, tiles = c0.shape[-1], plan.forward
    stacked = stack.weight_ih is not None
    lead, width = input_gates.shape[:-1], input_gates.shape[-1] // 4  # of all directions
    if stacked:
        lead = *h0.shape[:1], *lead
    y = alloc_exchange_buffer(input_gates, (*lead, width // H * out), tiles, layout)
    dropped = None if stack.seed is None else alloc_exchange_buffer(y, y[1:].shape, tiles, DENSE)
    c = gates = None
    acc = accumulator(y.dtype)
    if save:
        new = input_gates.new_zeros if layout.padded else input_gates.new_empty
        c = new((*lead, width), dtype=acc)
        gates = input_gates if over_input and tiles.in_turn else input_gates.new_empty((*lead, 4 * width))
    hn, cn = torch.empty_like(h0), torch.empty_like(c0, dtype=acc)
    if B > 0:
        if tiles.poll and h0.data_ptr() % 16 > 0:
            h0 = h0.clone()  # which a polling kernel loads 16 bytes at a time
        if scale is not None and weight_hh.data_ptr() % 8 > 0:
            weight_hh = weight_hh.clone()  # of which a thread loads 8 bytes at a time
        inputs, outputs = (input_gates, weight_hh, h0, c0, c_reset), (y, dropped, c, gates, hn, cn)
        kernel: Any = latency_forward_kernel
        if tiles.in_turn:
            hn.copy_(h0)
            cn.copy_(c0)
            kernel = throughput_forward_kernel
            args = input_gates, weight_hh, h0, c_reset, layout.tensors, y, c, gates, hn, cn
        elif weight_in_registers(plan.mode, tiles):
            args = *inputs, scale, layout.tensors, stack, *outputs
        else:
            unprojected = None if weight_hr is None else y.new_empty(c0.shape)
            kernel, args = forward_kernel, (*inputs, weight_hr, layout.tensors, stack, *outputs, unprojected)
        launch(kernel, args, plan, layout, cn, out, False, reverse, stacked)
    return y, hn, cn, c, gates
