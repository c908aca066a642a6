"""quantize(): weights of 8 bits are what they stand for, in every call; and what becomes of modules and checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm import LSTM, QuantizedLSTM, Session, quantize, swap
from fused_lstm.kernels.environment import interpreted
from fused_lstm.quantized import KINDS, SCALE, weight_names
from fused_lstm.weights import widened

from .parity import assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Layers, directions, features of a projection, hidden units, batch rows, input features.
SIZES = [(1, 1, 0, 20, 1, 5), (2, 2, 0, 24, 9, 40), (3, 1, 7, 16, 3, 8)]


def made(kind="int8", sizes=SIZES[0], dtype=torch.float32, **options):
    L, D, P, H, _, features = sizes
    lstm = LSTM(features, H, L, bidirectional=D == 2, proj_size=P, dtype=dtype, **options)
    assert quantize(lstm, kind) == 1
    return lstm


def exact(module):
    """nn.LSTM in float64 with the weights that a quantized one stands for."""
    names = [*weight_names(module), *(name + SCALE for name in weight_names(module))]
    weights = {name: tensor.double() for name, tensor in module.state_dict().items() if name not in names}
    for name in weight_names(module):
        weights[name] = widened(getattr(module, name), getattr(module, name + SCALE).double())
    rest = {"bias": module.bias, "bidirectional": module.bidirectional, "proj_size": module.proj_size}
    gold = nn.LSTM(module.input_size, module.hidden_size, module.num_layers, **rest, dtype=torch.float64)
    gold.load_state_dict(weights)
    return gold


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_nn_lstm_with_the_weights_that_they_stand_for(sizes, kind, dtype, T, device):
    L, D, P, H, B, features = sizes
    module = made(kind, sizes, dtype, bias=L != 3).to(device)
    theirs = copy.deepcopy(module)
    assert swap(theirs, back=True) == 1 and type(theirs) is nn.LSTM
    x = torch.randn(T, B, features, dtype=torch.float64).to(device, dtype)
    hx = torch.randn(L * D, B, P or H).to(x), torch.randn(L * D, B, H).to(x)
    with torch.no_grad():
        if device == "cpu":
            assert module.plan(x).mode == ("torch" if not interpreted() else "one step" if T == 1 else "local")
        y, ends = module(x, hx)
        other, other_ends = theirs(x, hx)
        gold, gold_ends = exact(module.cpu())(x.double().cpu(), (hx[0].double().cpu(), hx[1].double().cpu()))
    for name, *values in zip(("y", "hn", "cn"), (y, *ends), (other, *other_ends), (gold, *gold_ends), strict=True):
        assert_close(name, values[0].cpu(), None if dtype == torch.float64 else values[1].cpu(), values[2].cpu(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_the_nearest(dtype):
    lstm = LSTM(30, 20, dtype=dtype)
    with torch.no_grad():
        lstm.weight_ih_l0[3] = 0
        lstm.weight_hh_l0.mul_(100)
    before = {name: getattr(lstm, name).detach().double() for name in weight_names(lstm)}
    quantize(lstm)
    for name, weight in before.items():
        q, scale = getattr(lstm, name), getattr(lstm, name + SCALE)
        assert q.dtype == torch.int8 and scale.dtype == dtype and q.abs().max() == 127
        error = (scale.double()[:, None] * q.double() - weight).abs()
        # Half a step, and what the largest loses to a scale that was rounded down.
        assert (error <= scale.double()[:, None] * (0.5 + 127 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(kind, tmp_path):
    sizes, x = SIZES[1], torch.randn(2, 9, 40)
    module = made(kind, sizes).eval()
    torch.save(module.state_dict(), tmp_path / "quantized.pt")
    again = made(kind, sizes)
    again.load_state_dict(torch.load(tmp_path / "quantized.pt"))
    lstm = LSTM(40, 24, 2, bidirectional=True)
    of_float = made(kind, sizes)
    of_float.load_state_dict(lstm.state_dict())  # is quantized as it is loaded
    quantize(lstm, kind)
    pairs = [(module, again), (lstm, of_float), (module, copy.deepcopy(module))]
    pairs += [(module, pickle.loads(pickle.dumps(module)))] if kind == "int8" else []  # torch pickles no fp8
    for a, b in pairs:
        assert a.state_dict().keys() == b.state_dict().keys() and a.quantized == b.quantized == kind
        for one, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert one.dtype == other.dtype and torch.equal(one.double(), other.double())
        torch.testing.assert_close(a(x), b(x))


def test_what_does_not_load_says_why():
    with pytest.raises(RuntimeError, match=r"weight_ih_l0 is of torch.float8_e4m3fn, and the module is quantized"):
        made().load_state_dict(made("fp8").state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_ih_l0_scale"):
        LSTM(5, 20).load_state_dict(made().state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_nn_lstm(kind):
    model = nn.ModuleDict({"lstm": LSTM(5, 20, 2, proj_size=3), "head": nn.Linear(3, 1)})
    names = [*model.state_dict()]
    assert quantize(model, kind) == 1 and quantize(model, kind) == 0
    lstm = model["lstm"]
    assert type(lstm) is QuantizedLSTM and f"quantized='{kind}'" in repr(lstm)
    assert not any(parameter.requires_grad for parameter in lstm.parameters())
    stand_for = {name: lstm.wide(name) for name in weight_names(lstm)}
    assert swap(model, back=True) == 1 and type(lstm) is nn.LSTM
    assert [*model.state_dict()] == names and [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(getattr(lstm, name), weight) for name, weight in stand_for.items())
    lstm(torch.randn(3, 2, 5))[0].sum().backward()
    assert lstm.weight_hh_l1.grad is not None
    assert swap(model) == 1 and type(lstm) is LSTM


def test_gradients_reach_the_input_alone():
    module, x = made(), torch.randn(3, 2, 5, requires_grad=True)
    module(x)[0].sum().backward()
    other = copy.deepcopy(module)
    swap(other, back=True)
    (dx,) = torch.autograd.grad(other(x)[0].sum(), x)
    torch.testing.assert_close(x.grad, dx)


def test_another_dtype_and_autocast():
    module, x = made().to(torch.bfloat16), torch.randn(1, 2, 5)
    assert module.weight_hh_l0.dtype == torch.int8 and module.weight_hh_l0_scale.dtype == torch.bfloat16
    with torch.no_grad():
        assert module(x.bfloat16())[0].dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"input dtype .torch.float32. does not match weight"):
            module(x)
    module = made()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x)[0].float(), module.float()(x)[0].float(), atol=0.05, rtol=0)


def test_in_a_graph_a_session_and_with_lengths(device):
    module = made(sizes=SIZES[1]).to(device).eval()
    x = torch.randn(1, 9, 40, device=device)
    with torch.no_grad():
        y, hx = module(x)
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), (y, hx))
        running = Session(module, 9)
        torch.testing.assert_close(running(x[0]), y[0])
        torch.testing.assert_close(running(x[0]), module(x, hx)[0][0])
        lengths = torch.arange(9) % 3
        other = copy.deepcopy(module)
        swap(other, back=True)
        swap(other)
        long = torch.randn(2, 9, 40, device=device)
        torch.testing.assert_close(module(long, lengths=lengths), other(long, lengths=lengths))


class Own(LSTM):
    pass


def test_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="weights are quantized to 'int8' or 'fp8', got 'int4'"):
        quantize(LSTM(5, 20), "int4")
    with pytest.raises(ValueError, match=r"no fused_lstm.LSTM in the model; fused_lstm.swap\(model\) makes them"):
        quantize(nn.LSTM(5, 20))
    model = nn.ModuleList([LSTM(5, 20), Own(5, 20)])
    with pytest.raises(ValueError, match=r"1 is parametrized, or a class of its own: not quantized"):
        quantize(model)
    assert type(model[0]) is LSTM
    with torch.no_grad():
        model[0].weight_hh_l0[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight_hh_l0 of 0 has numbers that are not finite"):
        quantize(model)
    with pytest.raises(ValueError, match=r"0 is quantized to 'int8': call fused_lstm.swap"):
        quantize(nn.Sequential(made()), "fp8")
    with pytest.raises(TypeError, match=r"is made of a fused_lstm.LSTM by fused_lstm.quantize"):
        fused_lstm.QuantizedLSTM(5, 20)
