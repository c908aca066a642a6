"""trace() against two oracles, reference.py and torch's own cell, and against what the kernels save; on both paths."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm
from fused_lstm import LSTM, operators, reference, trace
from fused_lstm.kernels.layout import Layout

from .parity import WIDEST

T, B, I, H = 4, 3, 2, 4  # noqa: E741
OPTIONS = {
    "one layer": {},
    "three layers, no bias": {"num_layers": 3, "bias": False},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "projection, both directions": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "batch first": {"num_layers": 2, "batch_first": True},
}
LENGTHS = torch.tensor([3, 4, 1])
RESET = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()


def module_and_input(options, dtype=torch.float64, device="cpu"):
    """The module in eval mode, x and hx."""
    module = LSTM(I, H, **options, dtype=dtype, device=device).eval()
    x = torch.randn((B, T, I) if module.batch_first else (T, B, I), dtype=dtype, device=device)
    count = module.num_layers * (1 + module.bidirectional)
    hx = tuple(torch.randn(count, B, size, dtype=dtype, device=device) for size in (module.proj_size or H, H))
    return module, x, hx


def cells_of(module):
    """Layer, direction and weights of each cell: weight_ih, weight_hh, the sum of the biases, weight_hr or None."""
    D = 1 + module.bidirectional
    for k, weights in enumerate(module.all_weights):
        weight_ih, weight_hh, *rest = (weight.detach() for weight in weights)
        bias = rest[0] + rest[1] if module.bias else weight_ih.new_zeros(4 * H)
        yield k // D, k % D, (weight_ih, weight_hh, bias, rest[-1] if module.proj_size else None)


def stacked(run, module, x, hx):
    """Calls run(x, h0, c0, weights, reverse) for i, f, g, o, c and h of each cell and puts them in trace's form."""
    x = x.transpose(0, 1) if module.batch_first else x
    outputs = []
    for k, (layer, direction, weights) in enumerate(cells_of(module)):
        if direction == 0 and layer > 0:
            below = outputs[-1 - module.bidirectional :]
            x = torch.cat([of_one[-1] for of_one in below], -1)
        outputs.append(run(x, hx[0][k], hx[1][k], weights, direction == 1))
    shape = (module.num_layers, 1 + module.bidirectional)
    values = [torch.stack(tensors, -2).unflatten(-2, shape) for tensors in zip(*outputs, strict=True)]
    return [value.transpose(0, 1) if module.batch_first else value for value in values]


def by_reference(layout=Layout()):  # noqa: B008
    def run(x, h0, c0, weights, reverse):
        weight_ih, weight_hh, bias, weight_hr = weights
        input_gates = linear(x, weight_ih, bias)
        if weight_hr is not None:
            # The recurrence on the unprojected h, as kernels/README.md has it.
            first = (
                layout.lengths - 1
                if reverse and layout.lengths is not None
                else torch.full((B,), T - 1 if reverse else 0)
            )
            input_gates[first, torch.arange(B)] += h0 @ weight_hh.T
            h0, weight_hh = torch.zeros_like(c0), weight_hh @ weight_hr
        h, _, _, c, gates = reference.forward(input_gates, weight_hh, h0, c0, reverse=reverse, layout=layout)
        return *gates.chunk(4, -1), c, h if weight_hr is None else h @ weight_hr.T

    return run


def by_torch_cell(x, h0, c0, weights, reverse):
    """Steps nn.LSTMCell, which tells no gates, and finds each by a question to it."""
    weight_ih, weight_hh, bias, weight_hr = weights
    widen = H - weight_hh.shape[1]  # under a projection; nn.LSTMCell knows none
    cell, open_cell = nn.LSTMCell(I, H, dtype=x.dtype), nn.LSTMCell(I, H, dtype=x.dtype)
    for each in (cell, open_cell):
        each.weight_ih, each.weight_hh = nn.Parameter(weight_ih.clone()), nn.Parameter(pad(weight_hh, (0, widen)))
        each.bias_ih, each.bias_hh = nn.Parameter(bias.clone()), nn.Parameter(torch.zeros_like(bias))
        each.input_size = weight_ih.shape[1]
    with torch.no_grad():
        for parameter in open_cell.parameters():
            parameter[2 * H : 3 * H] = 0
        open_cell.bias_ih[2 * H : 3 * H] = 100  # g = 1
        h, c, steps = h0, c0, [None] * len(x)
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            wide, zero = pad(h, (0, widen)), torch.zeros_like(c)
            (_, i), (_, ig) = open_cell(x[t], (wide, zero)), cell(x[t], (wide, zero))
            (_, with_f), (o, _) = cell(x[t], (wide, zero + 1)), cell(x[t], (wide, zero + 1e9))  # tanh(c) = 1
            h, c = cell(x[t], (wide, c))
            h = h if weight_hr is None else h @ weight_hr.T
            steps[t] = i, with_f - ig, ig / i, o, c, h
    return tuple(torch.stack(tensors) for tensors in zip(*steps, strict=True))


def assert_traces(ours, theirs, **tolerance):
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("given", [True, False], ids=["hx", "no hx"])
@pytest.mark.parametrize("options", OPTIONS)
def test_torch_cell(options, given):
    module, x, hx = module_and_input(OPTIONS[options])
    states = hx if given else tuple(torch.zeros_like(s) for s in hx)
    ours = trace(module, x, hx if given else None)
    assert_traces(ours, stacked(by_torch_cell, module, x, states), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "lengths"])
@pytest.mark.parametrize("options", OPTIONS)
def test_reference(options, lengths, device):
    module, x, hx = module_and_input(OPTIONS[options], device=device)
    ours = trace(module, x, hx, lengths=lengths)
    gold = module.cpu(), x.cpu(), tuple(s.cpu() for s in hx)
    theirs = stacked(by_reference(Layout(lengths)), *gold)
    assert_traces(fused_lstm.Trace(*(value.cpu() for value in ours)), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, device):
    module, x, hx = module_and_input(OPTIONS["two layers, both directions"], dtype, device)
    ours = trace(module, x, hx)
    assert [value.dtype for value in ours] == [dtype] * 4 + [torch.float32, dtype]
    theirs = stacked(by_reference(), module.cpu().double(), x.cpu().double(), [s.cpu().double() for s in hx])
    eps = 8 * torch.finfo(dtype).eps
    assert_traces(fused_lstm.Trace(*(value.cpu().double() for value in ours)), theirs, rtol=eps, atol=eps)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_numbers_are_those_that_the_kernels_save(options, device, monkeypatch):
    module, x, hx = module_and_input(OPTIONS[options], torch.float32, device)
    saved, launch = [], operators.forward.run
    monkeypatch.setattr(operators.forward, "run", lambda args, **more: saved.append(launch(args, **more)) or saved[-1])
    y, _ = module(x, hx)
    ours, calls = trace(module, x, hx), 0 if module.plan(x).mode == "torch" else module.num_layers
    assert len(saved) == 2 * calls
    # A call with gradients saves c and gates for backward; each call of trace gave the same.
    D = 2 if module.bidirectional else 1
    of_layers = [zip(c.chunk(D, -1), gates.chunk(D, -1), strict=True) for *_, c, gates in saved[:calls]]
    of_directions = [both for of_layer in of_layers for both in of_layer]
    for (layer, direction, _), (c, gates) in zip(cells_of(module), of_directions, strict=calls > 0):
        at = [v[..., layer, direction, :] for v in ours]
        assert torch.equal(torch.cat(at[:4], -1), gates) and torch.equal(at[4], c)
    # Composed of torch operations, as on torch's path, it differs from the call by rounding.
    torch.testing.assert_close(ours.h[..., -1, :, :].flatten(-2), y, rtol=0, atol=0 if calls else 1e-6)


# The forms of the input


@pytest.mark.parametrize("options", ["two layers, both directions", "batch first"])
def test_unbatched(options, device):
    module, x, hx = module_and_input(OPTIONS[options], device=device)
    reset = RESET.to(device)
    whole = trace(module, x, hx, reset=reset.T if module.batch_first else reset)
    dim = 0 if module.batch_first else 1
    ours = trace(module, x.select(dim, 1), tuple(s[:, 1] for s in hx), reset=reset[:, 1])
    assert_traces(ours, [value.select(dim, 1) for value in whole])


@pytest.mark.parametrize("options", ["projection, both directions", "batch first"])
def test_packed(options, device):
    module, x, hx = module_and_input(OPTIONS[options], device=device)
    packed = pack_padded_sequence(x, LENGTHS, module.batch_first, enforce_sorted=False)
    ours = [pad_packed_sequence(value, module.batch_first)[0] for value in trace(module, packed, hx)]
    assert_traces(trace(module, x, hx, lengths=LENGTHS), ours)


@pytest.mark.parametrize("reset_to", ["zero", "hx"])
def test_resets(reset_to, device):
    """A reset begins anew: the steps from it on are those of a sequence of their own."""
    module, x, hx = module_and_input({"num_layers": 2}, device=device)
    ours = trace(module, x, hx, reset=RESET.to(device), reset_to=reset_to)
    alone = trace(module, x[2:, :1], tuple(s[:, :1] for s in hx) if reset_to == "hx" else None)
    assert_traces(ours._make(value[2:, :1] for value in ours), alone)


def test_empty_batch(device):
    module, x, _ = module_and_input({"bidirectional": True}, device=device)
    assert trace(module, x[:, :0]).f.shape == (T, 0, 1, 2, H)


# What else a call does


def test_one_step(device):
    """A call of one step keeps no gates: trace takes the kernels of a sequence, and agrees."""
    module, x, hx = module_and_input({"num_layers": 2}, device=device)
    with torch.no_grad():
        _, (hn, cn) = module(x[:1], hx)
    ours = trace(module, x[:1], hx)
    torch.testing.assert_close((ours.h[0, :, :, 0], ours.c[0, :, :, 0]), (hn.transpose(0, 1), cn.transpose(0, 1)))


def test_dropout_is_that_of_a_call(device):
    module, x, hx = module_and_input({"num_layers": 2, "dropout": 0.5}, WIDEST[device], device)  # not cuDNN's masks
    still, y = trace(module, x, hx), module(x, hx)[0]
    torch.testing.assert_close(still.h[:, :, 1, 0], y)
    module.train()
    torch.manual_seed(1)
    y, _ = module(x, hx)
    torch.manual_seed(1)
    ours = trace(module, x, hx)
    torch.testing.assert_close(ours.h[:, :, 1, 0], y)
    torch.testing.assert_close(ours.i[:, :, 0], still.i[:, :, 0])
    assert (ours.i[:, :, 1] - still.i[:, :, 1]).abs().max() > 0.01


def test_no_gradient_and_no_trace_of_a_trace(device):
    module, x, hx = module_and_input({}, device=device)
    module.register_forward_hook(lambda *args: pytest.fail("a hook ran"))
    ours = trace(module.train(), x.requires_grad_(), hx)
    assert not any(value.requires_grad for value in ours)
    assert module.training and all(parameter.grad is None for parameter in module.parameters())


def test_a_swapped_module(device):
    theirs = nn.LSTM(I, H, dtype=torch.float64, device=device)
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"fused_lstm\.LSTM, got LSTM; fused_lstm\.swap"):
        trace(theirs, x)
    y, _ = theirs(x)
    fused_lstm.swap(theirs)
    torch.testing.assert_close(trace(theirs, x).h[:, :, 0, 0], y)


def test_errors_are_those_of_a_call():
    module, x, hx = module_and_input({})
    with pytest.raises(RuntimeError, match=r"input_size\. Expected 2, got 1"):
        trace(module, x[..., :1])
    with pytest.raises(RuntimeError, match="hidden"):
        trace(module, x, (hx[0][:, :2], hx[1]))
    with pytest.raises(ValueError, match="2D or 3D"):
        trace(module, x[None])
    with pytest.raises(ValueError, match="lengths"):
        trace(module, x, lengths=[1])
