"""One step of inference: both products of the gates and the cell in one kernel, which writes only the new state."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_forward
from .forward import gate_rows
from .gates import add_gates, cast_gates, load_gates, split_gates
from .launch import arguments_key, on_device, prepared_for, specialized
from .matmul import Weight, dot, load_chunk, load_columns, shape
from .plan import Plan
from .tiles import programs_of


@triton.jit(do_not_specialize=["B"])
def one_step_kernel(
    x,  # (B, I) in
    h0,  # (B, H) in
    c0,  # (B, H) in
    weight_ih,  # (4H, I) in
    weight_hh,  # (4H, H) in
    bias_ih,  # (4H) in; None: there is none
    bias_hh,  # (4H) in; as bias_ih
    h,  # (B, H) out
    c,  # (B, H) out
    B,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.forward
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32  # of sums and cells
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    BLOCK_K: tl.constexpr = TILES.chunk
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    real_rows = rows < B
    mask = (units < H)[:, None] & real_rows[None, :]
    state = rows[None, :] * H + units[:, None]

    weight_rows = gate_rows(H, BLOCK_H)
    OF_X: tl.constexpr = shape(I, 4 * H, BLOCK_K)
    OF_H: tl.constexpr = shape(H, 4 * H, BLOCK_K)
    sums = tl.zeros((4 * BLOCK_H, BLOCK_B), ACC)  # (1)
    sums = add_matmul(sums, Weight(weight_ih, weight_rows, 0), x + rows * I, real_rows, OF_X, PRECISION)
    sums = add_matmul(sums, Weight(weight_hh, weight_rows, 0), h0 + rows * H, real_rows, OF_H, PRECISION)
    pre = split_gates(sums, BLOCK_H, BLOCK_B)
    if bias_ih is not None:
        real_units = (units < H)[:, None]
        bias = cast_gates(load_gates(bias_ih + units[:, None], real_units, H), ACC)
        pre = add_gates(pre, add_gates(bias, load_gates(bias_hh + units[:, None], real_units, H)))
    c_prev = tl.load(c0 + state, mask=mask, other=0.0).to(ACC)
    _, c_next, h_next = cell_forward(pre, c_prev)
    tl.store(h + state, h_next.to(h.dtype.element_ty), mask=mask)
    tl.store(c + state, c_next.to(c.dtype.element_ty), mask=mask)


@triton.jit
def add_matmul(sum, weight, rows, mask, SHAPE: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a Weight times the columns of rows, pointers of which the masked ones count; nothing stays on chip."""
    for k in tl.range(SHAPE.CHUNKS, num_stages=3):
        chunk = load_chunk(weight, k, SHAPE, PRECISION, True)
        sum = dot(chunk, load_columns(rows, mask, k, SHAPE.K, SHAPE.BLOCK_K), sum, PRECISION, True)
    return sum


def one_step(
    x: Tensor, h0: Tensor, c0: Tensor, weights: list[tuple[Tensor | None, ...]], *, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Runs one step through a stack of layers, a launch for each.

    Args:
        x: (B, I), contiguous, as all others, and of one dtype with them.
        h0, c0: (L, B, H).
        weights: of each layer weight_ih (4H, I or H), weight_hh (4H, H), bias_ih and bias_hh (4H) or None.
        plan: its tiles are those of `forward`.

    Returns:
        hn, cn: as h0 and c0; y is hn[-1].
    """
    L, B, H = h0.shape
    hn, cn = torch.empty_like(h0), torch.empty_like(c0)
    tiles = plan.forward
    programs = (*programs_of(tiles, H, B), 1)
    device, prepared = x.device, prepared_for(plan)
    with on_device(device):
        for layer in range(L if B > 0 else 0):
            below = x if layer == 0 else hn[layer - 1]
            args = below, h0[layer], c0[layer], *weights[layer], hn[layer], cn[layer]
            key = id(one_step_kernel), device, H, below.shape[1]
            if key not in prepared:
                prepared[key] = specialized(one_step_kernel, plan, tiles, H, H, I=below.shape[1])
            prepared[key].launch(programs, args, (B,), arguments_key(args, (B,)))
    return hn, cn
