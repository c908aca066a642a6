"""Properties over all that nn.LSTM's signature allows and refuses, on cases that Hypothesis draws.

Each property has a short run, the same every time, and a slow twin with new cases each time.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fused_lstm import LSTM

from .parity import assert_parity
from .test_contract_construct import raised

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


def short(max_examples: int) -> Any:
    return hypothesis.settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


def long(max_examples: int) -> Any:
    return hypothesis.settings(max_examples=max_examples, deadline=None, print_blob=True, database=None)


@dataclass(frozen=True)
class Case:
    """A module and its input, drawn by size; the numbers come from the seed.

    B: rows, None for unbatched input. lengths: of the sequences of a packed input, in place of T and B.
    """

    options: dict[str, Any]
    dtype: torch.dtype
    T: int
    B: int | None
    lengths: tuple[int, ...] | None
    layouts: tuple[str, str]
    with_hx: bool
    training: bool
    seed: int

    def build(self) -> tuple[LSTM, Tensor | PackedSequence, tuple[Tensor, Tensor] | None]:
        torch.manual_seed(self.seed)
        module = LSTM(**self.options, dtype=self.dtype).train(self.training)
        layout_x, layout_hx = (LAYOUTS[name] for name in self.layouts)
        T, B = self.T, self.B
        if self.lengths is not None:
            T, B = max(self.lengths), len(self.lengths)
        batch = () if B is None else (B,)
        x = torch.randn(T, *batch, module.input_size, dtype=self.dtype)
        if self.lengths is not None:
            in_order = list(self.lengths) == sorted(self.lengths, reverse=True)
            x = pack_padded_sequence(x, torch.tensor(self.lengths), enforce_sorted=in_order)
            x = x._replace(data=layout_x(x.data))
        else:
            x = layout_x(x.transpose(0, 1) if batch and module.batch_first else x)
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)
        rows = len(module.all_weights)
        hx = tuple(layout_hx(torch.randn(rows, *batch, size, dtype=self.dtype)) for size in sizes)
        return module, x, hx if self.with_hx else None


@st.composite
def options(draw: Any) -> dict[str, Any]:
    hidden_size = draw(st.integers(1, 5))
    return {
        "input_size": draw(st.integers(1, 4)),
        "hidden_size": hidden_size,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(0, hidden_size - 1)),
    }


@st.composite
def cases(draw: Any, dtypes: list[torch.dtype] = DTYPES, min_rows: int = 0) -> Case:
    form = draw(st.sampled_from(["batched", "unbatched", "packed"]))
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)) if form == "packed" else None
    layouts = st.sampled_from(list(LAYOUTS))
    return Case(
        draw(options()),
        draw(st.sampled_from(dtypes)),
        draw(st.integers(1, 4)),
        draw(st.integers(min_rows, 3)) if form == "batched" else None,
        None if lengths is None else tuple(lengths),
        (draw(layouts), draw(layouts)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**32 - 1)),
    )


# Legal calls

ignore_dropout = pytest.mark.filterwarnings("ignore:dropout option")


def check_parity(case: Case) -> None:
    # In a tensor of a few elements nn.LSTM's own rounding may happen to cancel, and with it what the rule allows. A
    # fault fails with any numbers; float64's bound leaves nothing to chance.
    draws = 1 if case.dtype == torch.float64 else 3
    for draw in range(draws):
        module, x, hx = replace(case, seed=case.seed + draw).build()
        # The twin copies the hook: so ours and nn.LSTM draw the same dropout masks.
        module.register_forward_pre_hook(seed_dropout)
        try:
            assert_parity(module, x, hx)
        except AssertionError:
            if draw == draws - 1:
                raise
        else:
            return


def seed_dropout(*_: Any) -> None:
    torch.manual_seed(1)


@ignore_dropout
@short(25)
@hypothesis.given(cases())
def test_any_legal_call_equals_nn_lstm(case):
    check_parity(case)


@ignore_dropout
@pytest.mark.slow
@long(600)
@hypothesis.given(cases())
def test_any_legal_call_equals_nn_lstm_at_length(case):
    check_parity(case)


def check_subset(case: Case, data: Any) -> None:
    """Freezing some tensors leaves the other gradients as they are, bit for bit."""
    module, x, hx = case.build()
    packed = isinstance(x, PackedSequence)
    leaves = {"x": (x.data if packed else x).detach()}
    if hx is not None:
        leaves |= {"h0": hx[0].detach(), "c0": hx[1].detach()}
    leaves |= dict(module.named_parameters())
    wanted = {name for name in leaves if data.draw(st.booleans(), label=name)}

    def backward(wanted: set[str]) -> dict[str, Tensor | None]:
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name in wanted)
        seed_dropout()
        given = None if hx is None else (leaves["h0"], leaves["c0"])
        y, (hn, cn) = module(x._replace(data=leaves["x"]) if packed else leaves["x"], given)
        loss = y.data.square().sum() + hn.sin().sum() + cn.cos().sum()
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    everything, some = backward(set(leaves)), backward(wanted)
    assert {name for name, grad in some.items() if grad is not None} == wanted
    for name in wanted:
        assert torch.equal(some[name], everything[name]), name


@ignore_dropout
@short(15)
@hypothesis.given(cases(), st.data())
def test_any_subset_of_gradients(case, data):
    check_subset(case, data)


@ignore_dropout
@pytest.mark.slow
@long(200)
@hypothesis.given(cases(), st.data())
def test_any_subset_of_gradients_at_length(case, data):
    check_subset(case, data)


# Illegal calls

# A few legal values of each argument first, which is also where Hypothesis shrinks to.
ARGUMENTS = {
    "input_size": [4, 1, 0, -1, 4.0, "4", None, True],
    "hidden_size": [5, 1, 0, -1, 5.0, "5", None, True],
    "num_layers": [1, 2, 0, -1, 2.0, "2", None, True],
    "bias": [True, False, 1, 0, None],
    "batch_first": [False, True, 1, 0, None],
    "dropout": [0.0, 0.5, 1, -0.1, 1.1, float("nan"), float("inf"), True, False, "0.5", None],
    "bidirectional": [False, True, 1, 0, None],
    "proj_size": [0, 3, -1, 5, 7, 1.5, "3", None, True],
    "dtype": [None, torch.float64, torch.int64, "float32"],
    "device": [None, "cpu", "meta", "nowhere", 1.5],
}


@st.composite
def arguments(draw: Any) -> dict[str, Any]:
    """One to three arguments of any value, legal ones for the others."""
    names = draw(st.sets(st.sampled_from(list(ARGUMENTS)), min_size=1, max_size=3))
    return {"input_size": 4, "hidden_size": 5} | {
        name: draw(st.sampled_from(ARGUMENTS[name])) for name in sorted(names)
    }


def check_constructor(given: dict[str, Any]) -> None:
    def construct(cls: type[nn.Module]) -> str:
        module = cls(**given)
        return f"{module!r} {[(name, p.shape, p.dtype, p.device) for name, p in module.named_parameters()]}"

    assert raised(lambda: construct(LSTM)) == raised(lambda: construct(nn.LSTM))
    if raised(lambda: construct(LSTM)) is None:
        assert construct(LSTM) == construct(nn.LSTM)


@ignore_dropout
@short(60)
@hypothesis.given(arguments())
def test_constructor_refuses_what_nn_lstm_refuses(given):
    check_constructor(given)


@ignore_dropout
@pytest.mark.slow
@long(600)
@hypothesis.given(arguments())
def test_constructor_refuses_what_nn_lstm_refuses_at_length(given):
    check_constructor(given)


OTHER_DTYPES = [torch.float64, torch.float16, torch.int64, torch.bool]


def resized(draw: Any, t: Tensor) -> Tensor:
    dim, by = draw(st.integers(0, t.dim() - 1)), draw(st.sampled_from([1, -1]))
    shape = list(t.shape)
    shape[dim] = max(0, shape[dim] + by)
    return t.new_zeros(shape)


def redimensioned(draw: Any, t: Tensor) -> Tensor:
    return t[None] if draw(st.booleans()) else t[0]


def recast(draw: Any, t: Tensor) -> Tensor:
    return t.to(draw(st.sampled_from(OTHER_DTYPES)))


def with_features(draw: Any, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], draw(st.integers(0, 5).filter(lambda size: size != x.shape[-1])))


# What may be wrong with x, with a state, and with their number.
OF_X = {"features": with_features, "dimensions": redimensioned, "dtype": recast}
OF_STATE = {"size": resized, "dimensions": redimensioned, "dtype": recast}
COUNTS = [0, 1, 3]


@st.composite
def illegal_calls(draw: Any) -> tuple[Case, Any, Any]:
    """A legal case and the input and states to call it with, of which one or two things are wrong."""
    case = draw(cases([torch.float32], min_rows=1))
    _, x, hx = case.build()
    wrong = draw(st.sets(st.sampled_from(["x", "no steps", "h0", "c0", "count"]), min_size=1, max_size=2))
    packed = isinstance(x, PackedSequence)
    if hx is None:
        wrong &= {"x", "no steps"}
    if packed:
        wrong -= {"no steps"}
    hypothesis.assume(wrong)
    if "no steps" in wrong:
        x = x[:, :0] if case.options["batch_first"] and x.dim() == 3 else x[:0]
    if "x" in wrong:
        change = OF_X[draw(st.sampled_from(list(OF_X)))]
        hypothesis.assume(packed or len(x) or change is not redimensioned)
        x = x._replace(data=change(draw, x.data)) if packed else change(draw, x)
    if hx is not None:
        h0, c0 = (
            OF_STATE[draw(st.sampled_from(list(OF_STATE)))](draw, state) if name in wrong else state
            for name, state in zip(("h0", "c0"), hx, strict=True)
        )
        hx = (h0, c0, c0)[: draw(st.sampled_from(COUNTS))] if "count" in wrong else (h0, c0)
    return case, x, hx


def check_refused(given: tuple[Case, Any, Any]) -> None:
    case, x, hx = given
    module, _, _ = case.build()
    kind = kind_raised(module, x, hx)
    if isinstance(x, PackedSequence):
        # nn.LSTM checks nothing of packed input: it takes some of these, and reads out of bounds at others.
        assert kind in (RuntimeError, ValueError, IndexError)
    elif hx is not None and len(hx) == 3 and x.dim() == 2:
        assert kind in (RuntimeError, ValueError)  # nn.LSTM drops the third state of an unbatched call
    elif hx is not None and any(getattr(state, "dtype", x.dtype) != x.dtype for state in hx):
        # cuDNN refuses a state of another dtype; on the CPU nn.LSTM promotes it in some forms.
        assert kind in (RuntimeError, ValueError) or kind is kind_raised(nn.LSTM(**case.options), x, hx)
    else:
        assert kind is kind_raised(nn.LSTM(**case.options), x, hx)


def kind_raised(module: nn.Module, x: Any, hx: Any) -> type | None:
    error = raised(lambda: module(x, hx))
    return error and error[0]


@ignore_dropout
@short(60)
@hypothesis.given(illegal_calls())
def test_forward_refuses_what_nn_lstm_refuses(given):
    check_refused(given)


@ignore_dropout
@pytest.mark.slow
@long(600)
@hypothesis.given(illegal_calls())
def test_forward_refuses_what_nn_lstm_refuses_at_length(given):
    check_refused(given)
