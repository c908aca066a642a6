"""Launches of several recurrences, a layer's directions or a stack of layers, against the reference of each."""

import torch

from fused_lstm import reference
from fused_lstm.kernels import backward as backward_module
from fused_lstm.kernels import forward as forward_module
from fused_lstm.kernels.dropout import dropout
from fused_lstm.kernels.layout import NO_STACK, Stack
from fused_lstm.sequence import Sequence

from .layouts import layout_of

KINDS = ("directions", "layers", "layers with dropout")


def check(plan, kind, layout_name, T, B, H, seed=0, forward=forward_module, backward=backward_module, within=None):
    """Both passes of two directions, or of three layers, against each one's reference; float64, exact to rounding."""
    layout, lead = layout_of(layout_name, T, B)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    stacked = kind != "directions"
    R, D = (3, 1) if stacked else (2, 2)
    x, weight_hh, h0, c0 = randn(*lead, D * 4 * H), randn(R, 4 * H, H), randn(R, B, H), randn(R, B, H)
    dy, dhn, dcn, dc_steps = randn(*lead, D * H), randn(R, B, H), randn(R, B, H), randn(*lead, D * H)
    c_reset, stack, layouts, all_of = None, NO_STACK, [layout] * R, layout
    if layout.starts is not None:
        c_reset = randn(R, B, H)
    if stacked:
        dropping = (torch.tensor([seed]), torch.tensor([0.75]).double()) if "dropout" in kind else ()
        stack, dc_steps = Stack(randn(R - 1, 4 * H, H), randn(R - 1, 4 * H), *dropping), None
    elif layout.offsets is None:
        layouts = [sequence.layout for sequence in Sequence.padded(layout, False, T).per_direction(2)]
        if layout.starts is not None:
            all_of = layout._replace(starts=torch.stack([one.starts for one in layouts]))
    options = {"layout": all_of, "c_reset": c_reset, "stack": stack, "plan": plan}

    def both():
        y, hn, cn, c, gates = forward.forward(x, weight_hh, h0, c0, **options)
        dgates, *of_states, _ = backward.backward(dy, dhn, dcn, weight_hh, c0, c, gates, dc_steps=dc_steps, **options)
        return y, hn, cn, c, gates, dgates, *of_states

    y, hn, cn, c, gates, dgates, dc0, dc_reset = both() if within is None else within(both)

    def part(tensor, r):
        return tensor[r] if stacked else tensor.chunk(2, -1)[r]

    def dropped(y, r):
        return y if stack.seed is None else dropout(y.contiguous(), stack.seed, stack.keep, r, B, layout)

    def options_of(r):
        of_reset = None if c_reset is None else c_reset[r]
        return {"layout": layouts[r], "c_reset": of_reset, "reverse": not stacked and r == 1}

    pairs, above, inputs = [], dy, x
    for r in range(R):
        inputs = inputs if stacked else x.chunk(2, -1)[r]
        theirs = reference.forward(inputs, weight_hh[r], h0[r], c0[r], **options_of(r))[:4]
        pairs += zip((part(y, r), hn[r], cn[r], part(c, r)), theirs, strict=True)
        if stacked and r < R - 1:
            inputs = dropped(theirs[0], r) @ stack.weight_ih[r].T + stack.bias[r]
    for r in reversed(range(R)):
        above = above if stacked else part(dy, r)
        saved = c0[r], part(c, r), part(gates, r)
        of_cells = {"dc_steps": None if dc_steps is None else part(dc_steps, r)}
        theirs = reference.backward(above, dhn[r], dcn[r], weight_hh[r], *saved, **options_of(r), **of_cells)[:3]
        pairs += zip((part(dgates, r), dc0[r], None if dc_reset is None else dc_reset[r]), theirs, strict=True)
        if stacked and r > 0:
            above = dropped(theirs[0] @ stack.weight_ih[r - 1], r - 1)
    for ours, theirs in pairs:
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
