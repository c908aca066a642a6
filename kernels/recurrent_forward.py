"""The forward recurrence of any cell: one kernel for the whole sequence, and its launcher.

The loop of forward.py for a cell that is given as two device functions (equations.py), without what nn.LSTM alone has:
stacks in one launch and projections.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .equations import Equations
from .launch import SIZES, alloc_exchange_buffer, launch, weight_in_registers
from .layout import DENSE, Layout, accumulator, words
from .matmul import Weight, load_chunks, recurrent_matmul, shape
from .plan import Plan
from .recurrent_latency_forward import recurrent_latency_forward_kernel
from .rows import Sizes, locate, rows_of_program, time_before, time_of, with_starts
from .slots import add_each, load_each, load_slots, select_each, slot_rows, split_slots, store_each, store_slots
from .sync import publish, wait_if


@triton.jit(do_not_specialize=SIZES)
def recurrent_forward_kernel(
    # Inputs. rows: T * B, or the rows of the packed sequence; D: directions
    x,  # (rows, D, G*H): the input's part of the gates
    weight_hh,  # (D, G*H, H)
    bias_hh,  # (D, G*H): of the recurrent part; None: it has none, or x has it
    vectors,  # the cell's, each (D, H); None: it has none
    initial,  # h and the other states before the first step, each (D, B, H)
    resets,  # the same, from which a reset row goes on; None without layout.starts
    layout,  # a LayoutTensors
    # Outputs
    steps,  # h and the other states of every step, each (rows, D, H), or None; through h's programs exchange it
    kept,  # (rows, D, CELL.kept * H): what backward takes beside the states; None: nothing is kept
    ends,  # h and the other states after each row's last step, each (D, B, H); between launches those so far
    sync,  # a Sync
    # Sizes
    T,
    B,
    total_rows,  # of a (rows, ...) tensor
    step_stride,  # rows of it from a step to the next, if not packed
    row_stride,  # rows of it from a batch row to the next
    first_recurrence,  # of this launch
    row_begin,  # first batch row of this launch, a multiple of the tiles' batch
    step_begin,  # steps [step_begin, step_end) in the direction's own order
    step_end,
    H: tl.constexpr,
    # Form
    CELL: tl.constexpr,  # Equations
    MODE: tl.constexpr,  # "grid": programs hand h to each other; "step": one launch a step
    DIRECTIONS: tl.constexpr,  # D; of two the second runs from the last step to the first
    REVERSE: tl.constexpr,  # a single direction runs so
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.forward
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    y = steps[0]
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    G: tl.constexpr = CELL.gates
    STATES: tl.constexpr = CELL.states
    KEPT: tl.constexpr = CELL.kept
    VECTORS: tl.constexpr = CELL.vectors
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    OF_OWN: tl.constexpr = shape(H, G * H, TILES.chunk)
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

    own = Weight(weight_hh + recurrence * (G * H * H), slot_rows(H, BLOCK_H, G), 0)
    own_chunks = load_chunks(own, RESIDENT, OF_OWN, PRECISION)
    real_units = (units < H)[:, None]
    p = ()
    if vectors is not None:
        p = load_each(vectors, recurrence * H + units[:, None], real_units, VECTORS, ACC)
    if bias_hh is not None:
        bias = load_slots(bias_hh + recurrence * (G * H) + units[:, None], real_units, H, G, ACC)
    if layout.lengths is not None:
        step_end = tl.minimum(step_end, rows.last + 1)
    states = load_each(initial, state, mask & (step_begin == 0), STATES, ACC)
    if MODE == "step":
        states = add_each(states, load_each(ends, state, mask & (step_begin > 0), STATES, ACC))
    if layout.starts is not None:
        reset_to = load_each(resets, state, mask, STATES, ACC)

    for step in range(step_begin, step_end):
        # Where the step's rows lie, and where the step before in this direction left h: in h0 for a row's first.
        at = with_starts(locate(time_of(step, rows), layout, rows, rows.mask, True), layout, rows)
        before = locate(time_before(at.t, rows), layout, rows, step > 0, step > 0)
        tensor, row = tl.where(before.mask, y, initial[0]), tl.where(before.mask, before.rows, rows.states)
        if layout.starts is not None:
            tensor, row = tl.where(at.start, resets[0], tensor), tl.where(at.start, rows.states, row)
            states = select_each(at.start[None, :], reset_to, states)
        # All that does not wait for h is loaded before its flag is awaited.
        active = mask if layout.lengths is None else mask & at.mask[None, :]
        of_input = load_slots(x + at.rows[None, :] * (G * H) + units[:, None], active, H, G, ACC)
        if MODE == "grid":
            wait_if(step > 0, step_flags, step, sync.timeout_info, MAX_SPINS, 1)
        product = recurrent_matmul(own, own_chunks, tensor + row * H, at.mask, OF_OWN, ACC, PRECISION)
        recurrent = split_slots(product, G, BLOCK_H, BLOCK_B)
        if bias_hh is not None:
            recurrent = add_each(recurrent, bias)
        h, others, values = CELL.forward(of_input, recurrent, states, p)
        h = h.to(y.dtype.element_ty)
        hidden = at.rows[None, :] * H + units[:, None]
        tl.store(y + hidden, h, mask=active)
        if MODE == "grid":
            publish(step_flags + step)
        after = (h.to(ACC),) + others
        states = select_each(active, after, states)
        if kept is not None:
            store_slots(kept + at.rows[None, :] * (KEPT * H) + units[:, None], values, active, H)
        for k in tl.static_range(1, STATES):
            if steps[k] is not None:
                tl.store(steps[k] + hidden, after[k], mask=active)

    store_each(ends, state, states, mask)


def pollable(states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same states, of which h lies at whole 16 bytes and is nowhere the SENTINEL."""
    h, *others = states
    return h.masked_fill(words(h) == -1, math.nan), *others


def recurrent_forward(
    cell: Equations,
    x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    vectors: tuple[Tensor, ...],
    initial: tuple[Tensor, ...],
    *,
    plan: Plan,
    reverse: bool = False,
    layout: Layout = DENSE,
    resets: tuple[Tensor, ...] | None = None,
    save: bool = True,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
    """Runs the directions of one layer of any cell.

    Args:
        x: (T, B, D*G*H), (B, T, D*G*H) if the layout says so, or (rows, D*G*H) of a packed sequence, contiguous: the
            input's part of the gates.
        weight_hh: (D, G*H, H), and bias_hh (D, G*H), of the recurrent part; None: x has it.
        vectors: each (D, H).
        initial: h, in the dtype of x, and the other states, each (D, B, H), contiguous.
        plan: mode and tiles.
        reverse: of a single direction, run from the last step to the first. Of two the second does.
        layout: where the sequences lie.
        resets: as initial, with layout.starts: the states from which a reset row goes on.
        save: also return what backward needs.

    Returns:
        steps: of h and the other states what they are after every step, as x with D*H features, zero past a row's
            length; h in the dtype of x, the others in the accumulator's; without save h alone.
        ends: the same after each row's last step, as initial.
        kept: as x with D*cell.kept*H features, in the dtype of x; None without save, or where there is nothing.
    """
    B, H = initial[0].shape[-2:]
    tiles, acc = plan.forward, accumulator(x.dtype)
    lead, width = x.shape[:-1], x.shape[-1] // cell.gates  # D*H
    y = alloc_exchange_buffer(x, (*lead, width), tiles, layout)
    others: tuple[Tensor | None, ...] = (None,) * (cell.states - 1)
    kept = None
    if save:
        new = x.new_zeros if layout.padded else x.new_empty
        others = tuple(new((*lead, width), dtype=acc) for _ in others)
        kept = x.new_empty((*lead, cell.kept * width)) if cell.kept else None
    ends = tuple(torch.empty_like(state, dtype=acc if k else None) for k, state in enumerate(initial))
    if B > 0:
        kernel: Any = recurrent_forward_kernel
        if weight_in_registers(plan.mode, tiles):
            kernel = recurrent_latency_forward_kernel
            if tiles.poll and (layout.lengths is not None or initial[0].data_ptr() % 16):
                initial = pollable(initial)
            if tiles.poll and resets is not None:
                resets = pollable(resets)
        args = x, weight_hh, bias_hh, vectors or None, initial, resets, layout.tensors, (y, *others), kept, ends
        launch(kernel, args, plan, layout, initial[0], H, False, reverse, False, cell)
    return (y, *others) if save else (y,), ends, kept  # type: ignore[return-value]
