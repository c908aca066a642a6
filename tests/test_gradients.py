"""Gradients against finite differences, over a sequence in chunks, and derivatives of higher order.

Everything that nn.LSTM itself does under autograd stands in test_contract_autograd.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fused_lstm import LSTM, composed

from .parity import WIDEST, assert_close, assert_parity_of, run, twin

I, H = 2, 3  # noqa: E741
NAMES = ("y", "hn", "cn")
Results = dict[str, Tensor]


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def states(module: nn.Module, *batch: int) -> tuple[Tensor, Tensor]:
    rows = len(module.all_weights)
    return double(rows, *batch, module.proj_size or module.hidden_size), double(rows, *batch, module.hidden_size)


# Finite differences


def assert_gradients(module: LSTM, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor], fast: bool = True) -> None:
    """gradcheck of y, hn and cn with respect to x, h0, c0 and every weight, through the kernels."""
    packed = isinstance(x, PackedSequence)
    data = (x.data if packed else x).detach().requires_grad_()
    assert module.plan(x).mode != "torch"
    names = [name for name, _ in module.named_parameters()]

    def call(data: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, weights, strict=True))
        y, (hn, cn) = functional_call(module, given, (x._replace(data=data) if packed else data, (h0, c0)))
        return y.data if packed else y, hn, cn

    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert gradcheck(call, (data, *hx, *weights), fast_mode=fast)


# Constructor options and the batch dimensions of the input.
CASES = {
    "plain": ({}, (3, 2)),
    "two layers": ({"num_layers": 2}, (2, 2)),
    "both directions": ({"bidirectional": True}, (2, 2)),
    "projection": ({"proj_size": 2}, (3, 2)),
    "no biases": ({"bias": False}, (3, 2)),
    "batch first": ({"batch_first": True}, (2, 3)),
    "unbatched": ({}, (3,)),
}


@pytest.mark.parametrize(("options", "lead"), CASES.values(), ids=CASES)
def test_finite_differences(options, lead):
    module = LSTM(I, H, **options, dtype=torch.float64)
    assert_gradients(module, double(*lead, I), states(module, *([2] if len(lead) == 2 else [])))


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 2}], ids=["both directions", "projection"])
def test_finite_differences_packed(options):
    module = LSTM(I, H, **options, dtype=torch.float64)
    x = pack_padded_sequence(double(2, 2, I), [1, 2], enforce_sorted=False)
    assert_gradients(module, x, states(module, 2))


def test_finite_differences_element_by_element():
    # Fast mode compares one random projection of the Jacobian: here all of it.
    module = LSTM(1, 2, bias=False, proj_size=1, dtype=torch.float64)
    assert_gradients(module, double(2, 1, 1), states(module, 1), fast=False)


# Sums of gradients


def test_gradients_accumulate_over_batches():
    module = LSTM(I, H, num_layers=2, bidirectional=True)
    batches = [torch.randn(4, B, I) for B in (2, 3)]

    def backward(*batches: Tensor) -> list[Tensor]:
        module.zero_grad()
        for x in batches:
            module(x)[0].square().sum().backward()
        return [p.grad for p in module.parameters()]

    first, second = (backward(x) for x in batches)
    assert all(torch.equal(total, a + b) for total, a, b in zip(backward(*batches), first, second, strict=True))


# A long sequence in chunks

STACKS = {
    "two layers": {"num_layers": 2},
    "projection": {"num_layers": 2, "proj_size": 2},
    "batch first": {"batch_first": True},
}
stacks = pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
chunks = pytest.mark.parametrize("sizes", [(1, 3), (1, 1, 1, 1)], ids=["two chunks", "every step"])
Call = Callable[..., tuple[Tensor, Tensor, Tensor]]


def flat(module: nn.Module) -> Call:
    def call(x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (hn, cn) = module(x, (h0, c0))
        return y, hn, cn

    return call


class Chunked(nn.Module):
    """An LSTM that takes its sequence in chunks of the given sizes, with `carry` applied to the states in between."""

    def __init__(
        self,
        lstm: nn.Module,
        sizes: tuple[int, ...],
        carry: Callable[[Tensor], Tensor] = lambda state: state,
        wrap: Callable[[Call], Call] = lambda call: call,
    ) -> None:
        super().__init__()
        self.lstm, self.sizes, self.carry, self.call = lstm, sizes, carry, wrap(flat(lstm))

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        dim, ys, states = int(self.lstm.batch_first), [], hx
        for part in x.split(self.sizes, dim):
            y, *states = self.call(part, *(self.carry(state) for state in states))
            ys.append(y)
        return torch.cat(ys, dim), tuple(states)

    def named_parameters(self, *args, **kwargs):
        return self.lstm.named_parameters(*args, **kwargs)


def assert_same(ours: Results, gold: Results) -> None:
    assert ours.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name], None, gold[name], torch.float64)


def sequence(options: dict) -> tuple[LSTM, Tensor, tuple[Tensor, Tensor]]:
    module = LSTM(I, H, **options, dtype=torch.float64)
    return module, double(*((2, 4) if module.batch_first else (4, 2)), I), states(module, 2)


@chunks
@stacks
def test_chunks_with_the_state_carried_equal_one_run(options, sizes):
    module, x, hx = sequence(options)
    assert_same(run(Chunked(module, sizes), x, hx), run(twin(module), x, hx))


@chunks
@stacks
def test_chunks_with_the_state_detached_cut_the_gradient_only(options, sizes):
    module, x, hx = sequence(options)
    # The leaves are h0 and c0, which the first chunk reads and whose gradients are asked for.
    ours, gold = (
        run(Chunked(lstm, sizes, lambda state: state if state.is_leaf else state.detach()), x, hx)
        for lstm in (module, twin(module))
    )
    assert_same(ours, gold)
    whole = run(twin(module), x, hx)
    assert_same({name: ours[name] for name in NAMES}, {name: whole[name] for name in NAMES})
    assert not torch.allclose(ours["dweight_hh_l0"], whole["dweight_hh_l0"])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointed_chunks_equal_plain_ones(use_reentrant):
    module, x, hx = sequence({"num_layers": 2})

    def backward(wrap: Callable[[Call], Call]) -> list[Tensor]:
        # Not parity.run: reentrant checkpoints allow backward() only.
        module.zero_grad()
        leaves = [t.detach().requires_grad_() for t in (x, *hx)]
        y, (hn, cn) = Chunked(module, (1, 3), wrap=wrap)(leaves[0], leaves[1:])
        (y.square().sum() + hn.sin().sum() + cn.cos().sum()).backward()
        return [t.grad for t in (*leaves, *module.parameters())]

    def wrap(call: Call) -> Call:
        return lambda *args: checkpoint(call, *args, use_reentrant=use_reentrant)

    plain, checkpointed = backward(lambda call: call), backward(wrap)
    # To rounding: without gradients, as within a reentrant checkpoint, a single step takes a kernel of its own.
    torch.testing.assert_close(plain, checkpointed, rtol=1e-12, atol=1e-13)


# Second derivatives and forward mode: composed of torch operations, through the same call


LOSSES = {
    # The cotangent of y is a constant in the first and depends on the weights in the second.
    "linear": lambda y: y.sum(),
    "square": lambda y: y.square().sum(),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
LAYERS = {
    "one layer": {},
    "two layers": {"num_layers": 2, "bidirectional": True},
    "projection": {"bias": False, "proj_size": 2},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def pair(options):
    """Ours and nn.LSTM in float64 with the same weights, and an input."""
    module = LSTM(I, H, **options, dtype=torch.float64)
    return module, twin(module), torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["dense", "packed", "lengths and resets"])
def test_gradgradcheck(form):
    module = LSTM(2, 2, bidirectional=form == "dense", dtype=torch.float64)
    D = 2 if module.bidirectional else 1
    x, *hx = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 2, 2), (D, 2, 2), (D, 2, 2)))
    reset = torch.tensor([[False, True], [True, False]])

    def call(x, h0, c0, *weights):
        parameters = dict(zip(dict(module.named_parameters()), weights, strict=True))
        keywords = {"lengths": [2, 1], "reset": reset} if form == "lengths and resets" else {}
        given = pack_padded_sequence(x, [2, 1]) if form == "packed" else x
        y, (hn, cn) = functional_call(module, parameters, (given, (h0, c0)), keywords)
        return y.data if form == "packed" else y, hn, cn

    weights = [weight.detach().requires_grad_() for weight in module.parameters()]
    assert torch.autograd.gradgradcheck(call, (x, *hx, *weights), fast_mode=True)


@losses
@layers
def test_gradient_penalty(loss, options, device):
    def penalty(module, x):
        value = loss(module(x)[0])
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(value + dx.square().sum(), [x, *module.parameters()])

    module = LSTM(I, H, **options, dtype=WIDEST[device], device=device)
    assert_parity_of(penalty, module, torch.randn(3, 2, I).to(device, WIDEST[device]))


@losses
def test_hessian_vector_product(loss):
    ours, theirs, x = pair({})
    assert_equal(
        *(torch.autograd.functional.hvp(lambda x, m=m: loss(m(x)[0]), x, torch.ones_like(x)) for m in (ours, theirs))
    )


@losses
def test_gradient_of_a_func_gradient(loss):
    def second(module):
        first = torch.func.grad(lambda x: loss(module(x)[0]))
        return torch.func.grad(lambda x: first(x).square().sum())(x)

    ours, theirs, x = pair({})
    x = x.detach()
    assert_equal([second(ours)], [second(theirs)])


@layers
def test_third_derivative(options):
    def third(module):
        dx = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)[0]
        dx = torch.autograd.grad(dx.square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(dx.square().sum(), x)

    ours, theirs, x = pair(options)
    assert_equal(third(ours), third(theirs))


@layers
def test_forward_mode(options):
    """Against the reverse mode: the same number by the other way."""
    module, _, x = pair(options)
    tangent = torch.randn_like(x)
    y, dy = torch.func.jvp(lambda x: module(x)[0], (x.detach(),), (tangent,))
    cotangent = torch.randn_like(y)
    (dx,) = torch.autograd.grad(module(x)[0], x, cotangent)
    torch.testing.assert_close((dy * cotangent).sum(), (dx * tangent).sum(), rtol=1e-9, atol=1e-11)


def test_a_first_derivative_is_the_kernels_whether_or_not_a_second_may_follow(monkeypatch):
    """torch.func.grad always asks for a graph: only who differentiates it pays."""
    module, _, x = pair({})
    monkeypatch.setattr(composed, "recurrences", lambda *args: pytest.fail("composed"))
    value = module(x)[0].sum()
    torch.autograd.grad(value, x, create_graph=True)
    torch.func.grad(lambda x: module(x)[0].sum())(x.detach())
