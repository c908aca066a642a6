"""One step of inference: both products of the gates and the cell in one kernel, which writes the new state alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import cell_forward, split_gates
from .forward import gate_rows
from .launch import on_device, specialized
from .matmul import dot, load_columns, load_weight
from .plan import Plan
from .tiles import programs_of


@triton.jit(do_not_specialize=["B"])
def one_step_kernel(
    x,  # (B, I) in
    h0,  # (B, H) in
    c0,  # (B, H) in
    weight_ih,  # (4H, I) in
    weight_hh,  # (4H, H) in
    bias_ih,  # (4H) in; only if BIAS
    bias_hh,  # (4H) in; only if BIAS
    h,  # (B, H) out
    c,  # (B, H) out
    B,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr,
    BIAS: tl.constexpr,
    ACC: tl.constexpr,  # dtype of sums and of the cell within the step
    DOT: tl.constexpr,  # dtype of the matrix operands
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    BLOCK_B: tl.constexpr,  # batch rows of a program
    BLOCK_H: tl.constexpr,  # hidden units of a program
    BLOCK_K: tl.constexpr,  # columns of x or h that one product reduces over
):
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    real_rows = rows < B
    mask = (units < H)[:, None] & real_rows[None, :]
    state = rows[None, :] * H + units[:, None]

    weight_rows = gate_rows(H, BLOCK_H)
    gates = tl.zeros((4 * BLOCK_H, BLOCK_B), ACC)  # (1)
    for k in tl.range((I + BLOCK_K - 1) // BLOCK_K, num_stages=3):
        weight = load_weight(weight_ih, weight_rows, k, I, 4 * H, False, BLOCK_K, PRECISION, True)
        gates = dot(weight, load_columns(x + rows * I, real_rows, k, I, BLOCK_K), gates, DOT, PRECISION, True)
    for k in tl.range((H + BLOCK_K - 1) // BLOCK_K, num_stages=3):
        weight = load_weight(weight_hh, weight_rows, k, H, 4 * H, False, BLOCK_K, PRECISION, True)
        gates = dot(weight, load_columns(h0 + rows * H, real_rows, k, H, BLOCK_K), gates, DOT, PRECISION, True)
    pre_i, pre_f, pre_g, pre_o = split_gates(gates, BLOCK_H, BLOCK_B)
    if BIAS:
        pre_i += load_bias(bias_ih, bias_hh, units, H, ACC)
        pre_f += load_bias(bias_ih + H, bias_hh + H, units, H, ACC)
        pre_g += load_bias(bias_ih + 2 * H, bias_hh + 2 * H, units, H, ACC)
        pre_o += load_bias(bias_ih + 3 * H, bias_hh + 3 * H, units, H, ACC)
    c_prev = tl.load(c0 + state, mask=mask, other=0.0).to(ACC)
    _, _, _, _, c_next, h_next = cell_forward(pre_i, pre_f, pre_g, pre_o, c_prev)
    tl.store(h + state, h_next.to(h.dtype.element_ty), mask=mask)
    tl.store(c + state, c_next.to(c.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias_ih, bias_hh, units, H: tl.constexpr, ACC: tl.constexpr):
    """Both biases of one gate, summed: (units, 1)."""
    mask = units < H
    bias = tl.load(bias_ih + units, mask=mask, other=0.0).to(ACC) + tl.load(bias_hh + units, mask=mask, other=0.0)
    return bias[:, None]


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
    hn, cn = h0.new_empty(h0.shape), c0.new_empty(c0.shape)
    tiles = plan.forward
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    programs = (*programs_of(tiles, H, B), 1)
    with on_device(x.device):
        for layer in range(L if B > 0 else 0):
            below = x if layer == 0 else hn[layer - 1]
            tensors = below, h0[layer], c0[layer], *weights[layer], hn[layer], cn[layer]
            flags = {"I": below.shape[1], "BIAS": weights[layer][-1] is not None, "ACC": acc}
            specialized(one_step_kernel, plan, tiles, H, x.dtype, H, **flags).launch(programs, x.device, tensors, (B,))
    return hn, cn
