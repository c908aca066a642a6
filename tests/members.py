"""The link of kernels and reference for launches of several members: a layer's directions, or a stack of layers."""

import torch

from fused_lstm import reference
from fused_lstm.kernels import backward as backward_module
from fused_lstm.kernels import forward as forward_module
from fused_lstm.kernels.dropout import dropout
from fused_lstm.kernels.layout import NO_STACK, Stack
from fused_lstm.sequence import Sequence

from .layouts import layout_of

FORMS = ("directions", "layers", "layers with dropout")


def check(plan, members, form, T, B, H, seed=0, forward=forward_module, backward=backward_module, within=None):
    """Both passes of two directions, or of three layers, against each one's reference; float64, exact to rounding."""
    layout, lead = layout_of(form, T, B)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    stacked = members != "directions"
    M, D = (3, 1) if stacked else (2, 2)
    x, weight_hh, h0, c0 = randn(*lead, D * 4 * H), randn(M, 4 * H, H), randn(M, B, H), randn(M, B, H)
    dy, dhn, dcn, dc_steps = randn(*lead, D * H), randn(M, B, H), randn(M, B, H), randn(*lead, D * H)
    c_reset, stack, own, all_of = None, NO_STACK, [layout] * M, layout
    if layout.starts is not None:
        c_reset = randn(M, B, H)
    if stacked:
        dropping = (torch.tensor([seed]), torch.tensor([0.75]).double()) if "dropout" in members else ()
        stack, dc_steps = Stack(randn(M - 1, 4 * H, H), randn(M - 1, 4 * H), *dropping), None
    elif layout.offsets is None:
        own = [sequence.layout for sequence in Sequence.padded(layout, False, T).per_direction(2)]
        if layout.starts is not None:
            all_of = layout._replace(starts=torch.stack([one.starts for one in own]))
    options = {"layout": all_of, "c_reset": c_reset, "stack": stack, "plan": plan}

    def both():
        y, hn, cn, c, gates = forward.forward(x, weight_hh, h0, c0, **options)
        dgates, *of_states, _ = backward.backward(dy, dhn, dcn, weight_hh, c0, c, gates, dc_steps=dc_steps, **options)
        return y, hn, cn, c, gates, dgates, *of_states

    y, hn, cn, c, gates, dgates, dc0, dc_reset = both() if within is None else within(both)

    def part(tensor, m):
        return tensor[m] if stacked else tensor.chunk(2, -1)[m]

    def dropped(y, m):
        return y if stack.seed is None else dropout(y.contiguous(), stack.seed, stack.keep, m, B, layout)

    def options_of(m):
        of_reset = None if c_reset is None else c_reset[m]
        return {"layout": own[m], "c_reset": of_reset, "reverse": not stacked and m == 1}

    pairs, above, taken = [], dy, x
    for m in range(M):
        taken = taken if stacked else x.chunk(2, -1)[m]
        theirs = reference.forward(taken, weight_hh[m], h0[m], c0[m], **options_of(m))[:4]
        pairs += zip((part(y, m), hn[m], cn[m], part(c, m)), theirs, strict=True)
        if stacked and m < M - 1:
            taken = dropped(theirs[0], m) @ stack.weight_ih[m].T + stack.bias[m]
    for m in reversed(range(M)):
        above = above if stacked else part(dy, m)
        saved = c0[m], part(c, m), part(gates, m)
        of_cells = {"dc_steps": None if dc_steps is None else part(dc_steps, m)}
        theirs = reference.backward(above, dhn[m], dcn[m], weight_hh[m], *saved, **options_of(m), **of_cells)[:3]
        pairs += zip((part(dgates, m), dc0[m], None if dc_reset is None else dc_reset[m]), theirs, strict=True)
        if stacked and m > 0:
            above = dropped(theirs[0] @ stack.weight_ih[m - 1], m - 1)
    for ours, theirs in pairs:
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
