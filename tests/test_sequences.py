"""Sequences as people have them: lengths, resets and all states, held by the one rule to oracles built of nn.LSTM.

Loop     calls torch's own LSTM for one step, one layer and one direction at a time, and does the rest with where()
packing  nn.LSTM on a PackedSequence
cutting  nn.LSTM on every stretch between two resets alone
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import _VF, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm
from fused_lstm import LSTM, checks
from fused_lstm.kernels import plan

from .parity import assert_close, run, twin

T, B, I, H = 6, 4, 3, 5  # noqa: E741
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYERS = {
    "one layer": {},
    "three layers": {"num_layers": 3, "bias": False},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projection, both directions": {"bidirectional": True, "proj_size": 2, "batch_first": True},
}
LENGTHS = torch.tensor([4, 0, 6, 1])
RESET = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]]).bool()


class Loop(nn.Module):
    """The oracle: nn.LSTM's weights, one step, layer and direction at a time."""

    def __init__(self, lstm, lengths=None, reset=None, reset_to="zero"):
        super().__init__()
        self.lstm, self.reset, self.to_hx = lstm, reset, reset_to == "hx"
        self.lengths = torch.full((B,), T) if lengths is None else lengths

    def forward(self, x, hx):
        lstm, states = self.lstm, []
        D = 2 if lstm.bidirectional else 1
        x = x.transpose(0, 1) if lstm.batch_first else x
        ends = []
        for layer in range(lstm.num_layers):
            layers = [self.direction(x, hx, layer * D + d, lstm.all_weights[layer * D + d], d == 1) for d in range(D)]
            x, c = (torch.cat(tensors, -1) for tensors in zip(*(both[:2] for both in layers), strict=True))
            states += [x, c]
            ends += [both[2:] for both in layers]
        hn, cn = (torch.stack(tensors) for tensors in zip(*ends, strict=True))
        y = torch.cat([x, *states], -1)
        return y.transpose(0, 1) if lstm.batch_first else y, (hn, cn)

    def direction(self, x, hx, cell, weights, reverse):
        start = [state[cell] for state in hx]
        h, c = start
        y, cells = [None] * T, [None] * T
        for t in reversed(range(T)) if reverse else range(T):
            # The cut before step t; in the other direction the one after it, if the row goes on there.
            cut = torch.zeros(B, dtype=torch.bool)
            if self.reset is not None and not reverse:
                cut = self.reset[t]
            if self.reset is not None and reverse and t + 1 < T:
                cut = self.reset[t + 1] & (t + 1 < self.lengths)
            cut = cut[:, None].to(x.device)
            active = (t < self.lengths)[:, None].to(x.device)
            into = start if self.to_hx else [torch.zeros_like(s) for s in start]
            before = [torch.where(cut, r, s)[None] for r, s in zip(into, (h, c), strict=True)]
            # In training mode, in which alone cuDNN differentiates; without dropout it computes the same.
            y_t, h_t, c_t = _VF.lstm(x[t][None], before, weights, self.lstm.bias, 1, 0.0, True, False, False)
            h, c = torch.where(active, h_t[0], h), torch.where(active, c_t[0], c)
            y[t], cells[t] = y_t[0].where(active, 0), c_t[0].where(active, 0)
        return torch.stack(y), torch.stack(cells), h, c


class WithStates(nn.Module):
    """A module's call with keywords, its states side by side with y as Loop has them."""

    def __init__(self, lstm, **keywords):
        super().__init__()
        self.lstm, self.keywords = lstm, keywords

    def forward(self, x, hx):
        y, hidden, *states = self.lstm(x, hx, **self.keywords)
        for given in states:
            y = torch.cat([y, *(t for both in zip(*given, strict=True) for t in both)], -1)
        return y, hidden


def module_and_input(options, dtype, device):
    module = LSTM(I, H, **options, dtype=dtype, device=device)
    x = torch.randn((B, T, I) if module.batch_first else (T, B, I), dtype=torch.float64).to(device, dtype)
    count = module.num_layers * (2 if module.bidirectional else 1)
    hx = tuple(
        torch.randn(count, B, size, dtype=torch.float64).to(device, dtype) for size in (module.proj_size or H, H)
    )
    return module, x, hx


def assert_oracle(oracle, module, x, hx, **keywords):
    """Holds module(x, hx, **keywords) to oracle(nn.LSTM), by the rule; an oracle without states gives y alone."""
    dtype = x.dtype
    ours = run(WithStates(module, **keywords), x, hx)
    gold = run(oracle(twin(module, torch.float64)), x.cpu().double(), tuple(s.cpu().double() for s in hx))
    theirs = {} if dtype == torch.float64 else run(oracle(twin(module)), x, hx)
    assert ours.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name], theirs.get(name), gold[name], dtype)
    return ours


def given(module, form):
    """The keywords of a form."""
    reset = RESET.T if module.batch_first else RESET
    device = module.weight_ih_l0.device
    keywords = {"lengths": LENGTHS.to(device)} if "lengths" in form else {}
    return keywords | ({"reset": reset.to(device)} if "reset" in form else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(
    "form", ["lengths", "reset", "reset to hx", "lengths and reset", "lengths and reset to hx", ""]
)
def test_every_state_against_a_loop_over_nn_lstm(form, layers, dtype, device):
    module, x, hx = module_and_input(LAYERS[layers], dtype, device)
    keywords = given(module, form) | ({"reset_to": "hx"} if "hx" in form else {})

    def loop(lstm):
        masks = (LENGTHS if "lengths" in form else None, RESET if "reset" in form else None)
        return Loop(lstm, *masks, keywords.get("reset_to", "zero"))

    assert_oracle(loop, module, x, hx, **keywords, return_states=True)


class Packing(nn.Module):
    """nn.LSTM on packed rows; a row without steps keeps its state."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, hx):
        rows = LENGTHS.nonzero()[:, 0]
        x = x.transpose(0, 1) if self.lstm.batch_first else x
        packed = pack_padded_sequence(x[:, rows], LENGTHS[rows], enforce_sorted=False)
        y, hidden = self.lstm(packed, tuple(s[:, rows] for s in hx))
        y, _ = pad_packed_sequence(y, total_length=T)
        y = y.new_zeros(T, B, y.shape[-1]).index_copy(1, rows.to(y.device), y)
        hn, cn = (s.index_copy(1, rows.to(s.device), new) for s, new in zip(hx, hidden, strict=True))
        return y.transpose(0, 1) if self.lstm.batch_first else y, (hn, cn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", LAYERS)
def test_lengths_equal_packing(layers, dtype, device):
    module, x, hx = module_and_input(LAYERS[layers], dtype, device)
    assert_oracle(Packing, module, x, hx, lengths=LENGTHS.tolist())


class Cutting(nn.Module):
    """nn.LSTM on every stretch of every row alone."""

    def __init__(self, lstm, to_hx):
        super().__init__()
        self.lstm, self.to_hx = lstm, to_hx

    def forward(self, x, hx):
        D = 2 if self.lstm.bidirectional else 1
        x = x.transpose(0, 1) if self.lstm.batch_first else x
        rows = [self.row(x[:, b : b + 1], tuple(s[:, b : b + 1] for s in hx), RESET[:, b], D) for b in range(B)]
        y, hn, cn = (torch.cat(tensors, 1) for tensors in zip(*rows, strict=True))
        return y.transpose(0, 1) if self.lstm.batch_first else y, (hn, cn)

    def row(self, x, hx, reset, D):
        cuts = [0, *(t for t in range(1, T) if reset[t]), T]
        forwards = torch.arange(len(hx[0])) % D == 0
        outputs, first, last = [], None, None
        for k, (begin, end) in enumerate(pairwise(cuts)):
            enters = forwards & (k == 0 and not reset[0]) | ~forwards & (k == len(cuts) - 2)
            states = hx
            if not self.to_hx:
                states = tuple(torch.where(enters[:, None, None].to(s.device), s, 0) for s in hx)
            if self.lstm.batch_first:
                y, last = self.lstm(x[begin:end].transpose(0, 1), states)
                y = y.transpose(0, 1)
            else:
                y, last = self.lstm(x[begin:end], states)
            first = first or last
            outputs.append(y)
        ends = [torch.where(forwards[:, None, None].to(a.device), b, a) for a, b in zip(first, last, strict=True)]
        return torch.cat(outputs), *ends


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("reset_to", ["zero", "hx"])
def test_resets_equal_cutting(reset_to, layers, dtype, device):
    module, x, hx = module_and_input(LAYERS[layers], dtype, device)
    assert_oracle(
        lambda lstm: Cutting(lstm, reset_to == "hx"), module, x, hx, **given(module, "reset"), reset_to=reset_to
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_lengths_and_resets(seed, device):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    reset = torch.rand(T, B, generator=generator) < seed / 6
    options, reset_to = list(LAYERS.values())[seed % 2], ("zero", "hx")[seed % 2]
    module, x, hx = module_and_input(options, torch.float32, device)
    keywords = {"lengths": lengths.to(device), "reset": reset.to(device), "reset_to": reset_to, "return_states": True}
    assert_oracle(lambda lstm: Loop(lstm, lengths, reset, reset_to), module, x, hx, **keywords)


def test_no_row_has_a_step(device):
    module, x, hx = module_and_input({"num_layers": 2, "bidirectional": True}, torch.float32, device)
    y, (hn, cn) = module(x, hx, lengths=[0] * B)
    assert not y.any() and torch.equal(hn, hx[0]) and torch.equal(cn, hx[1])


def test_what_padding_holds_does_not_matter(device):
    module, x, hx = module_and_input({"num_layers": 2, "bidirectional": True}, torch.float32, device)
    expected = run(WithStates(module, lengths=LENGTHS), x, hx)
    x[torch.arange(T)[:, None] >= LENGTHS] = 1e6
    for name, value in run(WithStates(module, lengths=LENGTHS), x, hx).items():
        assert torch.equal(value, expected[name]), name


def test_the_gradient_does_not_cross_a_reset(device):
    module, x, hx = module_and_input({}, torch.float32, device)
    x.requires_grad_()
    reset = torch.zeros(T, B, dtype=torch.bool, device=device)
    reset[3, 1] = True
    y, _ = module(x, hx, reset=reset)
    (dx,) = torch.autograd.grad(y[4:].sum(), x)
    assert not dx[:3, 1].any() and dx[:3, 0].any() and dx[3, 1].any()


# The same call in other forms


def test_unbatched_and_empty_input(device):
    module, x, hx = module_and_input({"bidirectional": True}, torch.float32, device)
    reset = RESET.to(device)
    y, (hn, cn), states = module(x, hx, reset=reset, return_states=True)
    alone = module(x[:, 2], tuple(s[:, 2] for s in hx), reset=reset[:, 2], return_states=True)
    torch.testing.assert_close(alone[0], y[:, 2])
    torch.testing.assert_close(alone[1], (hn[:, 2], cn[:, 2]))
    torch.testing.assert_close(alone[2].c[0], states.c[0][:, 2])
    y, (hn, cn), states = module(x[:, :0], lengths=[], reset=reset[:, :0], return_states=True)
    assert y.shape == (T, 0, 2 * H) and hn.shape == cn.shape == (2, 0, H) and states.c[0].shape == (T, 0, 2 * H)


def test_states_of_packed_input(device):
    module, x, hx = module_and_input({"num_layers": 2}, torch.float32, device)
    lengths = LENGTHS.clamp(min=1)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, hidden, states = module(packed, hx, return_states=True)
    y2, hidden2, states2 = module(x, hx, lengths=lengths, return_states=True)
    torch.testing.assert_close(pad_packed_sequence(y)[0], y2)
    torch.testing.assert_close(hidden, hidden2)
    for ours, padded in zip(states.y + states.c, states2.y + states2.c, strict=True):
        torch.testing.assert_close(pad_packed_sequence(ours)[0], padded)


def test_states_without_gradients(device):
    module, x, hx = module_and_input({"num_layers": 2}, torch.float32, device)
    expected = module(x, hx, return_states=True)
    with torch.inference_mode():
        y, (_, cn), states = module(x, hx, return_states=True)
    assert torch.equal(states.y[1], y) and torch.equal(states.c[1][-1], cn[1])
    for a, b in zip(states.y + states.c, expected[2].y + expected[2].c, strict=True):
        torch.testing.assert_close(a, b)


def test_hx_is_broadcast_over_the_batch(device):
    """Learnable initial states (L*D, 1, H): their gradient is the sum over the rows."""
    module, x, hx = module_and_input({"num_layers": 2}, torch.float32, device)
    small = [s[:, :1].clone().requires_grad_() for s in hx]
    wide = [s.detach().expand(-1, B, -1).requires_grad_() for s in small]
    results = [module(x, tuple(states)) for states in (small, wide)]
    torch.testing.assert_close(*results)
    sums = [y.sum() + hn.sum() + cn.square().sum() for y, (hn, cn) in results]
    for a, b in zip(torch.autograd.grad(sums[0], small), torch.autograd.grad(sums[1], wide), strict=True):
        torch.testing.assert_close(a, b.sum(1, keepdim=True))


@pytest.mark.parametrize("missing", [0, 1])
def test_half_of_hx(missing, device):
    module, x, hx = module_and_input({}, torch.float32, device)
    zeros = tuple(torch.zeros_like(s) if k == missing else s for k, s in enumerate(hx))
    half = tuple(None if k == missing else s for k, s in enumerate(hx))
    torch.testing.assert_close(module(x, half), module(x, zeros))
    unbatched = tuple(None if s is None else s[:, 0] for s in half)
    torch.testing.assert_close(module(x[:, 0], unbatched)[1][1], module(x, zeros)[1][1][:, 0])


def test_hx_in_another_memory_format(device):
    module, x, hx = module_and_input({}, torch.float32, device)
    strided = tuple(s.transpose(1, 2).contiguous().transpose(1, 2) for s in hx)
    reset = RESET.to(device)
    assert not strided[1].is_contiguous()
    keywords = {"lengths": LENGTHS, "reset": reset, "reset_to": "hx"}
    for name, value in run(WithStates(module, **keywords), x, strided).items():
        torch.testing.assert_close(value, run(WithStates(module, **keywords), x, hx)[name])


def test_the_functional_form_takes_the_same_keywords(device):
    module, x, hx = module_and_input({"num_layers": 2}, torch.float32, device)
    weights, reset = [weight for layer in module.all_weights for weight in layer], RESET.to(device)
    y, hn, cn, states = fused_lstm.lstm(
        x, hx, weights, num_layers=2, lengths=LENGTHS, reset=reset, reset_to="hx", return_states=True
    )
    expected = module(x, hx, lengths=LENGTHS, reset=reset, reset_to="hx", return_states=True)
    torch.testing.assert_close((y, (hn, cn), states), expected)


# What does not fit


def refuse_lengths(lengths, text):
    return {"lengths": lengths}, text


def test_rows_without_any_step():
    module, x = LSTM(I, H, bidirectional=True), torch.randn(T, B, I, requires_grad=True)
    hx = torch.randn(2, 2, B, H, requires_grad=True)
    y, (hn, cn) = module(x, tuple(hx), lengths=[0] * B)
    assert not y.any() and torch.equal(torch.stack([hn, cn]), hx)
    (y.sum() + hn.sum() + cn.sum()).backward()
    assert (hx.grad == 1).all()
    assert not any(t.grad.any() for t in (x, *module.parameters()))


FORMS = {
    "a list": [4, 0, 6, 1],
    "an array": np.array([4, 0, 6, 1], dtype=np.int32),
    "integers of NumPy": list(np.array([4, 0, 6, 1])),
    "tensors": list(LENGTHS),
    "bytes": LENGTHS.to(torch.uint8),
}


@pytest.mark.parametrize("lengths", FORMS.values(), ids=FORMS)
def test_lengths_in_any_form(lengths):
    module, x = LSTM(I, H), torch.randn(T, B, I)
    torch.testing.assert_close(module(x, lengths=lengths), module(x, lengths=LENGTHS), rtol=0, atol=0)


@pytest.mark.parametrize("reset", [RESET.numpy(), RESET.tolist()], ids=["an array", "a list"])
def test_resets_in_any_form(reset):
    module, x = LSTM(I, H), torch.randn(T, B, I)
    torch.testing.assert_close(module(x, reset=reset), module(x, reset=RESET), rtol=0, atol=0)


REFUSED = {
    "negative": refuse_lengths([1, 2, -1, 3], "from 0 to T = 6, got -1 to 3"),
    "above T": refuse_lengths(torch.tensor([1, 2, 7, 3]), "from 0 to T = 6, got 1 to 7"),
    "too few": refuse_lengths([1, 2], r"shape \(4,\), one for each row, got \(2,\)"),
    "a matrix": refuse_lengths(torch.ones(4, 1, dtype=torch.int64), r"shape \(4,\)"),
    "floating point": refuse_lengths(torch.ones(4), "integers, got torch.float32"),
    "a list of floats": refuse_lengths([1.0, 2.0, 1.0, 1.0], "integers"),
    "bool lengths": refuse_lengths(torch.ones(4, dtype=torch.bool), "integers, got torch.bool"),
    "a mask of another shape": ({"reset": torch.zeros(B, T, dtype=torch.bool)}, r"shape \(6, 4\).*got \(4, 6\)"),
    "an integer mask": ({"reset": torch.zeros(T, B, dtype=torch.int64)}, "bool tensor, got torch.int64"),
    "bools as lengths": refuse_lengths([True, False, True, True], "integers"),
    "an integer list as a mask": ({"reset": [[1] * B] * T}, "bool tensor, got torch.int64"),
    "reset_to": ({"reset": RESET, "reset_to": "one"}, 'must be "zero" or "hx"'),
}


def assert_refused(calls, keywords, text, monkeypatch):
    """Each call of an LSTM and its input raises before anything runs."""
    monkeypatch.setattr(plan, "choose", lambda *args: pytest.fail("ran"))
    for call in calls:
        with pytest.raises(ValueError, match=text):
            call(LSTM(I, H), torch.randn(T, B, I), **keywords)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(case, monkeypatch):
    assert_refused([LSTM.__call__], *REFUSED[case], monkeypatch)


def test_a_list_for_an_unbatched_row_lies_on_the_inputs_device():
    """The meta device has no values: it raises only once the reset has been taken."""
    for lead, reset in (((T, 1), [[True]] * T), ((T,), [True] * T)):
        with pytest.raises(NotImplementedError, match="meta"):
            LSTM(I, H, device="meta")(torch.empty(*lead, I, device="meta"), reset=reset)


def test_lengths_on_a_device_are_looked_at_in_debug_mode_alone(monkeypatch):
    """A look would wait for the device. The meta device, which has no values, raises at one."""
    x, lengths, reset = torch.empty(T, B, I), torch.empty(B, dtype=torch.int64), torch.empty(T, B, dtype=torch.bool)
    given = [tensor.to("meta") for tensor in (x, lengths, reset)]
    rest = False, None, given[1], given[2], "zero", None, "zero"
    lengths, starts, _ = checks.checked(given[0], *rest)
    assert lengths.shape == (B,) and starts.shape == (T, B)
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(RuntimeError, match="meta"):
        checks.checked(given[0], *rest)


def test_packed_input_has_its_lengths_in_itself():
    packed = pack_padded_sequence(torch.randn(T, B, I), [6, 4, 2, 1])
    for keywords in ({"lengths": [1, 1, 1, 1]}, {"reset": RESET}):
        with pytest.raises(ValueError, match="PackedSequence"):
            LSTM(I, H)(packed, **keywords)


def test_unbatched_input_takes_no_lengths():
    with pytest.raises(ValueError, match="batched input"):
        LSTM(I, H)(torch.randn(T, I), lengths=[3])
