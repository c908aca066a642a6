"""The reference's links: to the equations (its backward is the derivative of its forward) and to nn.LSTM."""

import pytest
import torch

from fused_lstm import reference

from .layouts import NAMES, layout_of
from .parity import assert_close

B, H = 3, 4


class Reference(torch.autograd.Function):
    """The recurrence as a function of input_gates, c0 and c_reset; its other inputs have no gradient here."""

    @staticmethod
    def forward(ctx, input_gates, weight_hh, h0, c0, c_reset, options):
        y, hn, cn, c, gates = reference.forward(input_gates, weight_hh, h0, c0, c_reset=c_reset, **options)
        ctx.save_for_backward(weight_hh, c0, c_reset, c, gates)
        ctx.options = options
        return y, hn, cn, c.clone()

    @staticmethod
    def backward(ctx, dy, dhn, dcn, dc_steps):
        weight_hh, c0, c_reset, c, gates = ctx.saved_tensors
        more = {"c_reset": c_reset, "dc_steps": dc_steps}
        grads = reference.backward(dy, dhn, dcn, weight_hh, c0, c, gates, **more, **ctx.options)
        return grads[0], None, None, grads[1], grads[2], None


@pytest.mark.parametrize("out", [H, 3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", NAMES)
def test_backward_is_the_derivative_of_forward(reverse, form, out):
    layout, lead = layout_of(form, 4, B)
    shapes = [(*lead, 4 * H), (4 * H, out), (B, out), (B, H), (B, H), (out, H)]
    input_gates, weight_hh, h0, c0, c_reset, weight_hr = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    c_reset = None if layout.starts is None else c_reset.requires_grad_()
    differentiable = (input_gates.requires_grad_(), weight_hh, h0, c0.requires_grad_(), c_reset)
    options = {"reverse": reverse, "layout": layout} | ({} if out == H else {"weight_hr": weight_hr})
    assert torch.autograd.gradcheck(Reference.apply, (*differentiable, options))


@pytest.mark.parametrize("reverse", [False, True])
def test_forward_equals_nn_lstm(reverse):
    theirs = torch.nn.LSTM(5, H, bidirectional=True, dtype=torch.float64)
    suffix = "_reverse" if reverse else ""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(theirs, name + suffix).detach() for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    )
    x, hx = torch.randn(6, B, 5, dtype=torch.float64), torch.randn(2, 2, B, H, dtype=torch.float64)
    with torch.no_grad():
        y, (hn, cn) = theirs(x, (hx[0], hx[1]))
    input_gates = x @ weight_ih.T + bias_ih + bias_hh
    ours = reference.forward(input_gates, weight_hh, hx[0, reverse * 1], hx[1, reverse * 1], reverse=reverse)
    side = slice(H, None) if reverse else slice(H)
    assert_close("y", ours[0], None, y[..., side], torch.float64)
    assert_close("hn", ours[1], None, hn[reverse * 1], torch.float64)
    assert_close("cn", ours[2], None, cn[reverse * 1], torch.float64)
