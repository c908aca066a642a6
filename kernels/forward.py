"""The forward recurrence: one kernel for the whole sequence, and its launcher."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_forward, dot, split_gates
from .launch import DENSE, Layout, accumulator, launch
from .plan import Plan
from .sync import publish, wait


@triton.jit
def load_weight(weight, k, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunk k of this program's rows of a weight (4H, K), a unit's four gates side by side: (4 * BLOCK_H, BLOCK_K)."""
    gate_rows = tl.arange(0, 4 * BLOCK_H)
    units = tl.program_id(0) * BLOCK_H + gate_rows // 4
    rows = ((gate_rows % 4) * H + units).to(tl.int64)
    columns = k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (units < H)[:, None] & (columns < K)[None, :]
    return tl.load(weight + rows[:, None] * K + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(rows, active_rows, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunk k of rows of K columns, such as h_{t-1}, whose pointers are given: (BLOCK_K, batch rows)."""
    columns = k * BLOCK_K + tl.arange(0, BLOCK_K)
    return tl.load(rows[None, :] + columns[:, None], mask=(columns < K)[:, None] & active_rows[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "B", "row_begin", "step_begin", "step_end"])
def forward_kernel(
    input_gates,  # (rows, 4H) in: x W_ih^T + b; rows = T * B, or the rows of the packed sequence
    weight_hh,  # (4H, H) in
    h0,  # (B, H) in
    c_state,  # (B, H) in: the cell before step_begin; out: the cell after step_end
    c_reset,  # (B, H) in: the cell from which a reset row goes on, its h being 0; only if RESET
    lengths,  # (B,) in: steps of each batch row; only if LENGTHS
    offsets,  # (T,) in: first row of each step; only if PACKED
    starts,  # (rows,) in: the steps before which a row is reset; only if RESET
    y,  # (rows, H) out: h of every step; also the buffer through which programs exchange it
    c,  # (rows, H) out: c of every step; only if SAVE
    gates,  # (rows, 4H) out: activated gates; only if SAVE
    flags,  # (batch groups, T) in/out: step flags, zero at launch; only if GRID
    report,  # (4,) out: who waited in vain; only if TURNS
    T,
    B,
    row_begin,  # first batch row of this launch, a multiple of BLOCK_B
    step_begin,  # steps [step_begin, step_end) in the direction's own order
    step_end,
    H: tl.constexpr,
    LOCAL: tl.constexpr,  # one program holds all units and exchanges nothing
    GRID: tl.constexpr,  # programs hand h to each other through flags; neither: one launch a step
    TURNS: tl.constexpr,  # bound of a wait, 0 for none
    REVERSE: tl.constexpr,  # the direction runs from the last step to the first
    LENGTHS: tl.constexpr,  # each batch row has its own length
    PACKED: tl.constexpr,  # rows of a PackedSequence: the steps have ever fewer; with LENGTHS
    RESET: tl.constexpr,  # rows are reset within the sequence
    SAVE: tl.constexpr,  # keep c and gates for backward
    DOT: tl.constexpr,  # dtype of the matrix operands
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    BLOCK_B: tl.constexpr,  # batch rows of a program
    BLOCK_H: tl.constexpr,  # hidden units of a program
    KEPT: tl.constexpr,  # chunks of W_hh that stay on chip; the others are loaded at every step; 0: all stay
    BLOCK_K: tl.constexpr,  # units of h that one product reduces over
):
    ACC: tl.constexpr = c_state.dtype.element_ty
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = row_begin + tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    batch_group = row_begin // BLOCK_B + tl.program_id(1)
    real_rows = rows < B
    mask = (units < H)[:, None] & real_rows[None, :]
    active_rows = real_rows
    active = mask
    rows = rows.to(tl.int64)
    state = rows[None, :] * H + units[:, None]  # this program's tile in a (B, H) tensor

    HELD: tl.constexpr = (KEPT if KEPT > 0 else CHUNKS) if LOCAL or GRID else 0
    weights = ()
    for k in tl.static_range(HELD):
        weights = weights + (load_weight(weight_hh, k, H, H, BLOCK_H, BLOCK_K),)

    if LENGTHS:
        length = tl.load(lengths + rows, mask=real_rows, other=0)
        last = tl.max(length) - 1
        step_end = tl.minimum(step_end, last + 1)
    else:
        last = T - 1
    c_tile = tl.load(c_state + state, mask=mask, other=0.0)
    if LOCAL:
        h_tile = tl.load(h0 + state, mask=mask, other=0.0)
    if RESET:
        c_reset_tile = tl.load(c_reset + state, mask=mask, other=0.0)

    for step in range(step_begin, step_end):
        # Where the step's rows lie, and where the previous step of this direction left h (h0 for a row's first).
        t = last - step if REVERSE else step
        t_prev = t + 1 if REVERSE else t - 1
        has_prev = step > 0
        if LENGTHS:
            active_rows = real_rows & (t < length)
            active = mask & active_rows[None, :]
            has_prev = has_prev & (t_prev < length)
        if PACKED:
            row = tl.load(offsets + t) + rows
            row_prev = tl.load(offsets + t_prev, mask=step > 0, other=0) + rows
        else:
            row = t.to(tl.int64) * B + rows
            row_prev = t_prev.to(tl.int64) * B + rows
        h_rows = tl.where(has_prev, y + row_prev * H, h0 + rows * H)
        linked_rows = active_rows
        if RESET:
            start = tl.load(starts + row, mask=active_rows, other=0) != 0
            linked_rows = active_rows & ~start
            c_tile = tl.where(start[None, :], c_reset_tile, c_tile)
            if LOCAL:
                h_tile = tl.where(start[None, :], 0.0, h_tile)

        # All that does not wait for h is loaded before the flag is awaited.
        gate = row[None, :] * (4 * H) + units[:, None]
        pre_i = tl.load(input_gates + gate, mask=active, other=0.0)
        pre_f = tl.load(input_gates + gate + H, mask=active, other=0.0)
        pre_g = tl.load(input_gates + gate + 2 * H, mask=active, other=0.0)
        pre_o = tl.load(input_gates + gate + 3 * H, mask=active, other=0.0)

        recurrent = tl.zeros((4 * BLOCK_H, BLOCK_B), ACC)  # (1)
        if LOCAL:
            recurrent = dot(weights[0], h_tile, recurrent, DOT, PRECISION)
        else:
            if GRID:
                if step > 0:
                    wait(flags + batch_group.to(tl.int64) * T + step - 1, tl.num_programs(0), step, report, TURNS)
            for k in tl.static_range(HELD):
                h = load_columns(h_rows, linked_rows, k, H, BLOCK_K)
                recurrent = dot(weights[k], h, recurrent, DOT, PRECISION)
            if HELD < CHUNKS:
                for chunk in tl.range(HELD, CHUNKS, num_stages=3):
                    weight = load_weight(weight_hh, chunk, H, H, BLOCK_H, BLOCK_K)
                    h = load_columns(h_rows, linked_rows, chunk, H, BLOCK_K)
                    recurrent = dot(weight, h, recurrent, DOT, PRECISION)
        rec_i, rec_f, rec_g, rec_o = split_gates(recurrent, BLOCK_H, BLOCK_B)

        rec_i += pre_i.to(ACC)
        rec_f += pre_f.to(ACC)
        rec_g += pre_g.to(ACC)
        rec_o += pre_o.to(ACC)
        i, f, g, o, c_next, h = cell_forward(rec_i, rec_f, rec_g, rec_o, c_tile)
        c_tile = tl.where(active, c_next, c_tile)
        h = h.to(y.dtype.element_ty)
        if LOCAL:
            h_tile = tl.where(active, h, h_tile)

        hidden = row[None, :] * H + units[:, None]
        tl.store(y + hidden, h, mask=active)
        if GRID:
            publish(flags + batch_group.to(tl.int64) * T + step)
        if SAVE:
            tl.store(c + hidden, c_next, mask=active)
            tl.store(gates + gate, i, mask=active)
            tl.store(gates + gate + H, f, mask=active)
            tl.store(gates + gate + 2 * H, g, mask=active)
            tl.store(gates + gate + 3 * H, o, mask=active)

    tl.store(c_state + state, c_tile, mask=mask)


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
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs the recurrence of one layer and direction.

    Args:
        input_gates: (T, B, 4H), or (rows, 4H) of a packed sequence: x W_ih^T + b.
        weight_hh: (4H, H).
        h0, c0: (B, H), contiguous, of the dtype of input_gates.
        plan: mode and tiles.
        reverse: run from the last step to the first.
        layout: where the sequences lie.
        c_reset: (B, H) in the accumulator's dtype, with layout.starts: the cell from which a reset row goes on. Its h
            is 0: the product of another one belongs to input_gates.
        save: also return what backward needs.

    Returns:
        y: as input_gates with H features, h of every step; zero past a row's length.
        cn: (B, H) in the accumulator's dtype (float32; float64 for float64), each row's last cell.
        c: as y in the accumulator's dtype, and gates, as input_gates, activated; None without save.
    """
    B, H = h0.shape
    T = input_gates.shape[0] if layout.offsets is None else layout.offsets.shape[0]
    new = input_gates.new_zeros if layout.padded else input_gates.new_empty
    y = new((*input_gates.shape[:-1], H))
    c = new(y.shape, dtype=accumulator(y.dtype)) if save else None
    gates = torch.empty_like(input_gates) if save else None
    cn = c0.to(accumulator(c0.dtype), copy=True)
    if B > 0:
        launch(
            forward_kernel,
            (input_gates, weight_hh, h0, cn, c_reset, *layout, y, c, gates),
            plan,
            plan.forward,
            T,
            B,
            H,
            h0.dtype,
            REVERSE=reverse,
            **layout.flags,
            SAVE=save,
        )
    return y, cn, c, gates
