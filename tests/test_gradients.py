"""Gradients against finite differences, over a sequence in chunks, and the second derivative, which must raise.

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

from fused_lstm import LSTM

from .parity import assert_close, run, twin

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
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


# The second derivative is not implemented: as with cuDNN it raises, and is never silently wrong


LOSSES = {
    # The cotangent of y is a constant in the first and depends on the weights in the second.
    "linear": lambda y: y.sum(),
    "square": lambda y: y.square().sum(),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@losses
@pytest.mark.parametrize("wanted", ["x", "weights"])
def test_second_derivative_raises(loss, wanted, device):
    module = LSTM(I, H, device=device)
    x = torch.randn(3, 2, I, device=device, requires_grad=True)
    tensors = [x] if wanted == "x" else list(module.parameters())
    once = torch.autograd.grad(loss(module(x)[0]), tensors)
    grads = torch.autograd.grad(loss(module(x)[0]), tensors, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, grads, strict=True))
    with pytest.raises(RuntimeError):
        sum(g.square().sum() for g in grads).backward()


@losses
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen weights"])
def test_gradient_penalty_raises(loss, frozen, device):
    # The loss itself can be differentiated: a penalty without a graph would be left out without a word.
    module = LSTM(I, H, device=device).requires_grad_(not frozen)
    x = torch.randn(3, 2, I, device=device, requires_grad=True)
    value = loss(module(x)[0])
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError):
        (value + dx.square().sum()).backward()


@losses
def test_hessian_vector_product_raises(loss, device):
    module, x = LSTM(I, H, device=device), torch.randn(3, 2, I, device=device)
    with pytest.raises(RuntimeError):
        torch.autograd.functional.hvp(lambda x: loss(module(x)[0]), x, torch.ones_like(x))


@losses
def test_gradient_of_a_func_gradient_raises(loss, device):
    module, x = LSTM(I, H, device=device), torch.randn(3, 2, I, device=device)
    first = torch.func.grad(lambda x: loss(module(x)[0]))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: first(x).square().sum())(x)
