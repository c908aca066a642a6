"""A route is decided once for each form of call, and never from another's."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench.measure import precision
from fused_lstm import LSTM, LSTMCell, functional
from fused_lstm.paths import RUN
from fused_lstm.route import known_route

from .test_parity import I

T, B, H = 4, 3, 8


def decided(call, times=1):
    """How many routes calls have decided."""
    before = known_route.cache_info().misses
    for _ in range(times):
        call()
    return known_route.cache_info().misses - before


def within(context, call):
    def run():
        with context():
            call()

    return run


MODULE, X = LSTM(I, H, num_layers=2, dropout=0.5), torch.randn(T, B, I)
ROWS_FIRST = LSTM(I, H, batch_first=True)
# Calls that differ in one thing that a route depends on.
CALLS = {
    "plain": lambda: MODULE(X),
    "without gradients": within(torch.no_grad, lambda: MODULE(X)),
    "one step": within(torch.no_grad, lambda: LSTM(I, H)(X[:1])),
    "other rows": lambda: MODULE(X[:, :2]),
    "other units": lambda: LSTM(I, 2 * H, num_layers=2, dropout=0.5)(X),
    "other layers": lambda: LSTM(I, H, num_layers=3, dropout=0.5)(X),
    "no dropout": lambda: LSTM(I, H, num_layers=2)(X),
    "both directions": lambda: LSTM(I, H, bidirectional=True)(X),
    "a projection": lambda: LSTM(I, H, proj_size=2)(X),
    "no bias": lambda: LSTM(I, H, bias=False)(X),
    "float64": lambda: LSTM(I, H).double()(X.double()),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16), lambda: MODULE(X)),
    "TF32": within(lambda: precision("tf32"), lambda: MODULE(X)),
    "rows first": lambda: ROWS_FIRST(X.transpose(0, 1).contiguous()),
    "rows first, time in front": lambda: ROWS_FIRST(X.transpose(0, 1)),
    "lengths": lambda: MODULE(X, lengths=[4, 2, 0]),
    "resets": lambda: MODULE(X, lengths=[4, 2, 0], reset=X[..., 0] > 0, reset_to="hx"),
    "states": lambda: MODULE(X, return_states=True),
    "recompute": lambda: LSTM(I, H, recompute=2)(X),
    "recompute, one step each": lambda: LSTM(I, H, recompute=1)(X),
    "recompute by memory": lambda: LSTM(I, H, recompute=True)(X),
}


@pytest.fixture
def undone(monkeypatch):
    """Calls end where their route is known."""
    monkeypatch.setattr(functional, "RUN", dict.fromkeys(RUN, lambda call, route: (call.input, call.h0, call.c0, None)))


def test_each_form_is_decided_once(undone):
    for name, call in CALLS.items():
        assert decided(call) == 1, name
    for name, call in CALLS.items():
        assert decided(call, 2) == 0, name


def test_another_t_or_other_values_have_the_same_route(undone):
    MODULE(X)
    assert decided(lambda: MODULE(torch.randn(9, B, I))) == 0
    MODULE(X, lengths=[4, 2, 0])
    assert decided(lambda: MODULE(X, lengths=torch.tensor([1, 1, 1]))) == 0


UNCACHED = {
    "compiled": lambda: torch.compile(MODULE, fullgraph=True, dynamic=True, backend="eager")(X),
    "vmap": within(torch.no_grad, lambda: torch.vmap(LSTM(I, H))(X[None])),
    "grad": lambda: torch.func.grad(lambda x: LSTM(I, H)(x)[0].sum())(X),
    "jvp": lambda: torch.func.jvp(lambda x: LSTM(I, H)(x)[0], (X,), (X,)),
}


@pytest.mark.parametrize("form", UNCACHED)
def test_what_is_traced_or_transformed_leaves_no_route(form):
    info = known_route.cache_info()
    UNCACHED[form]()
    assert known_route.cache_info() == info


def test_fake_tensors_take_the_same_route():
    """With sizes that are known, which is all that a route asks of a tensor."""
    y, _ = MODULE(X)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, _ = MODULE(torch.randn(T, B, I))
    assert fake.shape == y.shape


def test_a_cell_has_a_route_of_its_own_switch(undone):
    cell = LSTMCell(I, H)
    for train in (False, True):
        with torch.set_grad_enabled(train):
            assert decided(lambda: cell(X[0])) == 1 and decided(lambda: cell(X[0]), 2) == 0


def test_a_tensor_with_a_minus_sign_to_come_goes_through_the_dispatcher():
    """It is laid over the memory by the dispatcher, which a direct call goes round."""
    module, h0 = LSTM(I, H), torch.randn(1, B, H)
    negative = torch._neg_view(-h0)
    assert negative.is_neg() and torch.equal(negative, h0)
    other = copy.deepcopy(module)
    other.weight_hh_l0 = torch.nn.Parameter(torch._neg_view(-module.weight_hh_l0.detach()))
    assert other.weight_hh_l0.is_neg() and torch.equal(other.weight_hh_l0, module.weight_hh_l0)
    for train in (False, True):
        with torch.set_grad_enabled(train):
            for x in (X, X[:1]):
                torch.testing.assert_close(module(x, (negative, h0)), module(x, (h0, h0)))
                torch.testing.assert_close(other(x, (h0, h0)), module(x, (h0, h0)))
