"""One step at a time: streaming through LSTM, and LSTMCell as nn.LSTMCell."""

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm import LSTM, LSTMCell, functional
from fused_lstm.kernels.environment import interpreted

from .parity import assert_close, assert_parity

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
I, H = 5, 20  # noqa: E741


def states(*sizes, like):
    return tuple(torch.randn(sizes, dtype=torch.float64).to(like) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, H, options", [(1, 1, {}), (17, 20, {"num_layers": 2}), (3, 70, {"bias": False}), (0, 4, {})]
)
def test_one_step_of_inference(B, H, options, dtype, device):
    module = LSTM(I, H, **options, dtype=dtype, device=device)
    x = torch.randn(1, B, I, dtype=torch.float64).to(device, dtype)
    with torch.no_grad():
        assert_parity(module, x, states(module.num_layers, B, H, like=x), backward=False)


# Layers, directions, features of a projection, hidden units, batch rows, input features.
STACKS = [(1, 1, 7, 20, 2, 5), (2, 1, 0, 150, 2, 700), (2, 2, 0, 1, 1, 1), (2, 2, 5, 20, 17, 40), (3, 1, 16, 64, 8, 64)]
STACKS += [(4, 1, 0, 33, 9, 7), (2, 1, 0, 20, 65, 5), (40, 1, 0, 8, 3, 8), (2, 1, 0, 20, 0, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", STACKS, ids=str)
def test_one_step_of_a_stack(sizes, dtype, device):
    """As nn.LSTM, and so call after call, each of which takes the other half of the exchanged memory."""
    L, D, P, H, B, I = sizes  # noqa: E741
    module = LSTM(I, H, L, bias=L != 3, bidirectional=D == 2, proj_size=P, dtype=dtype, device=device)
    with torch.no_grad():
        for _ in range(2 if H == 150 else 3):
            x, c0 = (torch.randn(size, dtype=torch.float64).to(device, dtype) for size in ((1, B, I), (L * D, B, H)))
            h0 = torch.randn(L * D, B, P or H, dtype=torch.float64).to(c0)
            assert_parity(module, x, (h0, c0), backward=False)


def test_misaligned_weights(device):
    """The views of one flat parameter, as sharding libraries make them, that 16-byte loads cannot take."""
    module, x = LSTM(8, 16, 2, device=device), torch.randn(1, 3, 8, device=device)
    flat = torch.cat([torch.zeros(1, device=device), *(weight.detach().flatten() for weight in module.parameters())])
    views, at = [], 1
    for weight in module.parameters():
        views.append(flat[at : at + weight.numel()].view(weight.shape))
        at += weight.numel()
    hx = states(2, 3, 16, like=x)
    with torch.no_grad():
        ours, theirs = (functional.lstm(x, hx, weights, num_layers=2) for weights in (views, [*module.parameters()]))
    torch.testing.assert_close(ours[:3], theirs[:3])


def test_streaming_is_the_whole_sequence(device):
    module = LSTM(I, H, num_layers=2, batch_first=True, device=device)
    x = torch.randn(3, 7, I, device=device)
    hx, outputs = states(2, 3, H, like=x), []
    with torch.no_grad():
        y, hidden = module(x, hx)
        for begin, end in ((0, 1), (1, 2), (2, 4), (4, 5), (5, 7)):
            part, hx = module(x[:, begin:end], hx)
            outputs.append(part)
    torch.testing.assert_close(torch.cat(outputs, 1), y)
    torch.testing.assert_close(hx, hidden)


# LSTMCell


def call(cell, x, hx=None):
    """Outputs and gradients of a cell, by name."""
    leaves = [t.detach().requires_grad_() for t in (x, *(hx or ()))]
    h, c = cell(leaves[0], tuple(leaves[1:]) or None)
    parameters = dict(cell.named_parameters())
    loss = (h.double() * torch.arange(h.numel()).view(h.shape)).sum() + c.double().square().sum()
    grads = torch.autograd.grad(loss, [*leaves, *parameters.values()])
    return {"h": h, "c": c} | dict(zip(["dx", "dh0", "dc0"][: len(leaves)] + list(parameters), grads, strict=True))


def cells(dtype, device="cpu", **options):
    """Ours, and nn.LSTMCell with the same weights in dtype and in float64."""
    ours = LSTMCell(I, H, **options, dtype=dtype, device=device)
    theirs = nn.LSTMCell(I, H, **options, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    gold = nn.LSTMCell(I, H, **options, dtype=torch.float64)
    gold.load_state_dict(ours.state_dict())
    return ours, theirs, gold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B", [None, 1, 17])
def test_cell_equals_nn_lstm_cell(B, bias, dtype, device):
    ours, theirs, gold = cells(dtype, device, bias=bias)
    batch = () if B is None else (B,)
    x = torch.randn(*batch, I, dtype=torch.float64).to(dtype)
    hx = states(*batch, H, like=x)
    results = call(ours, x.to(device), tuple(s.to(device) for s in hx))
    others = [call(theirs, x, hx), call(gold, x.double(), tuple(s.double() for s in hx))]
    assert results.keys() == others[1].keys()
    for name, value in results.items():
        other = None if dtype == torch.float64 else others[0][name]
        assert_close(name, value.cpu(), other, others[1][name].detach(), dtype)
    with torch.no_grad():
        for name, value in zip("hc", ours(x.to(device), tuple(s.to(device) for s in hx)), strict=True):
            other = None if dtype == torch.float64 else others[0][name]
            assert_close(name, value.cpu(), other, others[1][name].detach(), dtype)


def test_cell_is_nn_lstm_cell():
    torch.manual_seed(3)
    ours = LSTMCell(I, H)
    torch.manual_seed(3)
    theirs = nn.LSTMCell(I, H)
    assert isinstance(ours, nn.LSTMCell) and repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    x = torch.randn(3, I)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[:0]), theirs(x[:0]))


zeros = torch.zeros
REFUSED = {
    "features": (zeros(3, 6),),
    "features, unbatched": (zeros(6),),
    "3-D input": (zeros(2, 3, I),),
    "rows of h": (zeros(3, I), (zeros(2, H), zeros(3, H))),
    "rows of c": (zeros(3, I), (zeros(3, H), zeros(2, H))),
    "one row": (zeros(3, I), (zeros(1, H), zeros(1, H))),
    "width of h": (zeros(3, I), (zeros(3, 6), zeros(3, H))),
    "width of c": (zeros(3, I), (zeros(3, H), zeros(3, 6))),
    "1-D hx": (zeros(3, I), (zeros(H), zeros(H))),
    "2-D hx, unbatched": (zeros(I), (zeros(1, H), zeros(1, H))),
    "3-D hx": (zeros(3, I), (zeros(1, 3, H), zeros(3, H))),
    "hx of one tensor": (zeros(3, I), zeros(2, 3, H)),
    "hx of 1": (zeros(3, I), (zeros(3, H),)),
    "hx of 3": (zeros(3, I), (zeros(3, H),) * 3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_cell_refuses_with_the_texts_of_nn_lstm_cell(case):
    with pytest.raises(Exception) as theirs:
        nn.LSTMCell(I, H)(*REFUSED[case])
    with pytest.raises(type(theirs.value)) as ours:
        LSTMCell(I, H)(*REFUSED[case])
    assert str(ours.value).partition("\n")[0] == str(theirs.value).partition("\n")[0]


@pytest.mark.parametrize("kind", ["x", "h"])
def test_cell_refuses_mixed_dtypes(kind):
    x, hx = zeros(3, I), [zeros(3, H), zeros(3, H)]
    with pytest.raises(RuntimeError, match="same dtype"):
        LSTMCell(I, H)(x.double() if kind == "x" else x, tuple(s.double() for s in hx) if kind == "h" else tuple(hx))


def test_swap_turns_cells_too():
    model = nn.ModuleDict({"cell": nn.LSTMCell(I, H), "lstm": nn.LSTM(I, H)})
    assert fused_lstm.swap(model) == 2 and type(model["cell"]) is LSTMCell
    assert fused_lstm.swap(model, back=True) == 2 and type(model["cell"]) is nn.LSTMCell


def test_the_plan_of_a_cell():
    mode = LSTMCell(I, H).plan(zeros(1, I)).mode
    assert mode == ("one step" if interpreted() else "torch")
