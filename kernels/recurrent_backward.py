"""The backward recurrence of any cell: the same loop backwards in time, and its launcher."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .equations import Equations
from .launch import SIZES, alloc_exchange_buffer, launch, weight_in_registers
from .layout import DENSE, Layout, accumulator
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .plan import Plan
from .recurrent_latency_backward import recurrent_latency_backward_kernel
from .rows import Sizes, locate_neighbours, rows_of_program, without_starts
from .slots import add_each, cast_each, load_each, load_slots, select_each, store_each, store_slots, zeros_like_each
from .states import load_after, load_before
from .sync import publish, wait_if


@triton.jit(do_not_specialize=SIZES)
def recurrent_backward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence; D: directions
    dsteps,  # gradients of h and the other states of every step, each (rows, D, H), or None: there is none; h's first
    dends,  # gradients of h and the other states after each row's last step, each (D, B, H)
    weight_hh,  # (D, G*H, H)
    vectors,  # the cell's, each (D, H); None: it has none
    initial,  # h and the other states before the first step, each (D, B, H)
    resets,  # the same, from which a reset row goes on; None without layout.starts
    steps,  # h and the other states of every step, each (rows, D, H)
    kept,  # (rows, D, CELL.kept * H): saved by forward; None: nothing
    layout,  # a LayoutTensors
    # Outputs
    dr,  # (rows, D, G*H): gradient of the recurrent part of the gates; through it programs exchange it
    dx,  # (rows, D, A*H): of the input's part of the A gates that are CELL.apart; None: it is that of r in all
    dinitial,  # gradients of h, beside its recurrent product, and the other states; between launches those so far
    dresets,  # the same of resets, zero at launch; as resets
    dvectors,  # of the vectors, each (D, B, H), zero at launch; as vectors
    sync,  # a Sync
    # Sizes
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not packed
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # of this launch
    row_begin,  # first batch row of this launch, a multiple of the tiles' batch
    step_begin,  # steps [step_begin, step_end) in the order of this pass, from the direction's last to its first
    step_end,
    H: tl.constexpr,
    # Form
    CELL: tl.constexpr,  # Equations
    MODE: tl.constexpr,  # "grid": programs hand dr to each other; "step": one launch a step
    DIRECTIONS: tl.constexpr,  # D; of two the second ran from the last step to the first
    REVERSE: tl.constexpr,  # a single direction ran so, and this pass runs from the first
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.backward
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    ACC: tl.constexpr = tl.float64 if dr.dtype.element_ty == tl.float64 else tl.float32
    G: tl.constexpr = CELL.gates
    KEPT: tl.constexpr = CELL.kept
    VECTORS: tl.constexpr = CELL.vectors
    STATES: tl.constexpr = CELL.states
    APART: tl.constexpr = len(CELL.apart)
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    OF_OWN: tl.constexpr = shape(H, H, TILES.chunk, True, G)
    RESIDENT: tl.constexpr = (TILES.kept if TILES.kept > 0 else OF_OWN.CHUNKS) if MODE == "grid" else 0
    recurrence = 0
    if DIRECTIONS > 1:
        recurrence = (first_recurrence + tl.program_id(2)).to(tl.int64)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    sizes = Sizes(T, B, total_rows, step_stride, row_stride)
    rows = rows_of_program(layout, sizes, recurrence, row_begin, False, DIRECTIONS, REVERSE, BLOCK_B, False)
    mask = (units < H)[:, None] & rows.mask[None, :]
    state = rows.states[None, :] * H + units[:, None]
    if MODE == "grid":
        group = row_begin // BLOCK_B + tl.program_id(1)
        step_flags = sync.flags + (recurrence * tl.cdiv(B, BLOCK_B) + group).to(tl.int64) * T

    own = Weight(weight_hh + recurrence * (G * H * H), units, 0)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    p, dp = (), ()
    if vectors is not None:
        p = load_each(vectors, recurrence * H + units[:, None], (units < H)[:, None], VECTORS, ACC)
        dp = load_each(dvectors, state, mask, VECTORS, ACC)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    # Of h what the equations themselves hand back: dends[0] comes in at each row's last step.
    ds = (tl.zeros(mask.shape, ACC),)
    for k in tl.static_range(1, STATES):
        ds = ds + (tl.load(dends[k] + state, mask=mask & (step_begin == 0), other=0.0).to(ACC),)
    if MODE == "step":
        ds = add_each(ds, load_each(dinitial, state, mask & (step_begin > 0), STATES, ACC))
    if layout.starts is not None:
        dreset = load_each(dresets, state, mask, STATES, ACC)

    for step in range(step_begin, step_end):
        # In the direction's own order `after` comes next, and was done in the turn before this one.
        at, after, before = locate_neighbours(step, layout, rows)
        next_mask = without_starts(at.mask & after.mask, after, layout)
        # All that does not wait for dr of the step after is loaded before its flag is awaited.
        active = mask if layout.lengths is None else mask & at.mask[None, :]
        hidden, of_rows = at.rows[None, :] * H + units[:, None], at.rows[None, :] * H
        values = ()
        if kept is not None:
            values = load_slots(kept + of_rows * KEPT + units[:, None], active, H, KEPT, ACC)
        s = load_before(CELL, steps, initial, resets, at, before, layout, rows, units, active, H)
        s, now = cast_each(s, ACC), cast_each(load_after(CELL, steps, hidden, active), ACC)
        dy = load_each(dsteps, hidden, active, STATES, ACC)
        dh_end = tl.load(dends[0] + state, mask=active & (~after.mask)[None, :], other=0.0).to(ACC)
        if MODE == "grid":
            wait_if(step > 0, step_flags, step, sync.timeout_info, MAX_SPINS, 1)
        next_rows = dr + after.rows * (G * H)
        dh = recurrent_matmul(own, own_chunks, next_rows, next_mask, OF_OWN, ACC, PRECISION)
        d = add_each((dh + dh_end + ds[0],) + ds[1:], dy)
        dx_t, dr_t, ds_t, dp_t = CELL.backward(values, s, now, p, d)
        if layout.starts is not None:
            start = active & at.start[None, :]
            dreset = add_each(dreset, select_each(start, ds_t, zeros_like_each(ds_t)))
            ds_t = select_each(start, zeros_like_each(ds_t), ds_t)
        ds = select_each(active, ds_t, ds)
        if vectors is not None:
            dp = add_each(dp, select_each(active, dp_t, zeros_like_each(dp)))
        store_slots(dr + of_rows * G + units[:, None], dr_t, active, H)
        if MODE == "grid":
            publish(step_flags + step)
        if dx is not None:
            store_slots(dx + of_rows * APART + units[:, None], dx_t, active, H)

    store_each(dinitial, state, ds, mask)
    if layout.starts is not None:
        store_each(dresets, state, dreset, mask)
    if vectors is not None:
        store_each(dvectors, state, dp, mask)


def recurrent_backward(
    cell: Equations,
    dsteps: tuple[Tensor | None, ...],
    dends: tuple[Tensor, ...],
    weight_hh: Tensor,
    vectors: tuple[Tensor, ...],
    initial: tuple[Tensor, ...],
    steps: tuple[Tensor, ...],
    kept: Tensor | None,
    *,
    plan: Plan,
    reverse: bool = False,
    layout: Layout = DENSE,
    resets: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[Tensor, ...]]:
    """Runs the directions of one layer of any cell backwards.

    Args:
        cell, weight_hh, vectors, initial, plan, reverse, layout, resets: as given to recurrent_forward().
        dsteps, dends: as its steps and ends, contiguous; of steps None: there is no gradient; h has one.
        steps, kept: as it has saved them.

    Returns:
        dr: as x, the gradient of the recurrent part of the gates, zero past a row's length.
        dx: the same of the input's part, of the gates that are apart alone, as x with D*A*H features; None: of none.
        dinitial: as initial, in the accumulator's dtype. Of h it lacks what comes through the recurrent product.
        dresets: the same of resets; None without.
        dvectors: each (D, B, H) in the accumulator's dtype, to be summed over the batch rows.
    """
    B, H = initial[0].shape[-2:]
    y, tiles, acc = steps[0], plan.backward, accumulator(steps[0].dtype)
    width = y.shape[-1]  # D*H
    dr = alloc_exchange_buffer(y, (*y.shape[:-1], cell.gates * width), tiles, layout)
    dx = None
    if cell.apart:
        new = y.new_zeros if layout.padded else y.new_empty
        dx = new((*y.shape[:-1], len(cell.apart) * width))
    dinitial = tuple(torch.empty_like(state, dtype=acc) for state in initial)
    dresets = None if resets is None else tuple(torch.zeros_like(state, dtype=acc) for state in initial)
    dvectors = tuple(torch.zeros_like(initial[0], dtype=acc) for _ in vectors)
    if B > 0:
        inputs = dsteps, dends, weight_hh, vectors or None, initial, resets, steps, kept, layout.tensors
        args = *inputs, dr, dx, dinitial, dresets, dvectors or None
        kernel: Any = recurrent_backward_kernel
        if weight_in_registers(plan.mode, tiles):
            kernel = recurrent_latency_backward_kernel
        launch(kernel, args, plan, layout, dinitial[0], H, True, reverse, False, cell)
    return dr, dx, dinitial, dresets, dvectors
