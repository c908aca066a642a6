"""Skipped steps against a loop over nn.LSTM, one step of a layer and direction at a time; on both paths."""

import io

import pytest
import torch
import torch._dynamo.testing
from torch import _VF, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_lstm
from fused_lstm import LSTM, functional, trace

from .parity import assert_close, run, twin
from .test_sequences import LENGTHS, RESET, B, H, I, T, WithStates, assert_oracle, assert_refused, module_and_input

LAYERS = {
    "one layer": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "projection, rows first": {"bidirectional": True, "proj_size": 2, "batch_first": True},
}
# One row begins and ends with skipped steps, one has no others, and two are reset after the last step that runs.
MASK = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]]).bool()
FORMS = ["", "lengths", "reset", "reset to hx", "lengths and reset", "lengths and reset to hx"]
CASES = [(form, mask_to, "one layer") for form in FORMS for mask_to in ("zero", "hold")] + [
    ("reset", "hold", "two layers, both directions"),
    ("lengths and reset", "zero", "two layers, both directions"),
    ("lengths and reset to hx", "hold", "two layers, both directions"),
    ("lengths", "hold", "projection, rows first"),
    ("reset to hx", "zero", "projection, rows first"),
]


class Loop(nn.Module):
    """The oracle: a reset before the step, then where(mask, new state, old state), and y and c are read off it."""

    def __init__(self, lstm, mask, mask_to="zero", lengths=None, reset=None, reset_to="zero"):
        super().__init__()
        self.lstm, self.hold, self.to_hx = lstm, mask_to == "hold", reset_to == "hx"
        length = torch.full(mask.shape[1:], len(mask)) if lengths is None else lengths
        self.inside = torch.arange(len(mask))[:, None] < length
        self.runs = mask & self.inside
        self.cut = torch.zeros_like(mask) if reset is None else reset & self.inside

    def forward(self, x, hx):
        lstm, D = self.lstm, 2 if self.lstm.bidirectional else 1
        x = x.transpose(0, 1) if lstm.batch_first else x
        states, ends = [], []
        for layer in range(lstm.num_layers):
            cells = [self.direction(x, hx, layer * D + d, d == 1) for d in range(D)]
            x, c = (torch.cat(tensors, -1) for tensors in zip(*(cell[:2] for cell in cells), strict=True))
            states += [x, c]
            ends += [cell[2:] for cell in cells]
        y = torch.cat([x, *states], -1)
        return y.transpose(0, 1) if lstm.batch_first else y, tuple(map(torch.stack, zip(*ends, strict=True)))

    def direction(self, x, hx, cell, reverse):
        weights, steps = self.lstm.all_weights[cell], range(len(x))
        start = h, c = hx[0][cell], hx[1][cell]
        to = start if self.to_hx else [torch.zeros_like(s) for s in start]
        y, cells = [None] * len(x), [None] * len(x)
        for t in reversed(steps) if reverse else steps:
            # The cut before step t; in the other direction the one between t + 1 and t.
            cut = self.cut[t] if not reverse else self.cut[t + 1] if t + 1 < len(x) else torch.zeros_like(self.cut[0])
            cut, runs, shown = (
                flags[:, None].to(x.device)
                for flags in (cut & self.inside[t], self.runs[t], self.inside[t] if self.hold else self.runs[t])
            )
            h, c = (torch.where(cut, r, s) for r, s in zip(to, (h, c), strict=True))
            _, h_t, c_t = _VF.lstm(x[t][None], (h[None], c[None]), weights, self.lstm.bias, 1, 0.0, True, False, False)
            h, c = torch.where(runs, h_t[0], h), torch.where(runs, c_t[0], c)
            y[t], cells[t] = h.where(shown, 0), c.where(shown, 0)
        return torch.stack(y), torch.stack(cells), h, c


def keywords_of(form, mask_to="zero", mask=MASK, lengths=LENGTHS, reset=RESET):
    """The keywords, time first."""
    keywords = {"mask": mask, "mask_to": mask_to}
    keywords |= {"lengths": lengths} if "lengths" in form else {}
    keywords |= {"reset": reset} if "reset" in form else {}
    return keywords | ({"reset_to": "hx"} if "hx" in form else {})


def for_module(module, keywords):
    """The same for a call of the module."""
    device, first = module.weight_ih_l0.device, module.batch_first
    moved = {name: value.to(device) for name, value in keywords.items() if isinstance(value, torch.Tensor)}
    return keywords | {name: value.T if first and value.dim() == 2 else value for name, value in moved.items()}


def assert_loop(module, x, hx, keywords):
    return assert_oracle(
        lambda lstm: Loop(lstm, **keywords), module, x, hx, **for_module(module, keywords), return_states=True
    )


@pytest.mark.parametrize("form, mask_to, layers", CASES)
def test_every_state_and_gradient(form, mask_to, layers, device):
    assert_loop(*module_and_input(LAYERS[layers], torch.float32, device), keywords_of(form, mask_to))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, device):
    options = {"bidirectional": True, "bias": False}
    assert_loop(*module_and_input(options, dtype, device), keywords_of("lengths and reset", "hold"))


@pytest.mark.parametrize("seed", range(6))
def test_random_masks(seed, device):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    mask, reset = torch.rand(2, T, B, generator=generator) < torch.tensor([(seed + 1) / 7, 0.3])[:, None, None]
    form, mask_to = ("lengths and reset", "lengths and reset to hx")[seed % 2], ("zero", "hold")[seed // 2 % 2]
    keywords = keywords_of(form, mask_to, mask, lengths, reset)
    assert_loop(*module_and_input({"bidirectional": True}, torch.float32, device), keywords)


@pytest.mark.parametrize("form, mask_to", [("", "zero"), ("lengths and reset", "hold")])
def test_a_mask_that_skips_nothing(form, mask_to, device):
    module, x, hx = module_and_input({"batch_first": True}, torch.float32, device)
    keywords = for_module(module, keywords_of(form, mask_to, torch.ones(T, B, dtype=torch.bool)))
    ours = run(WithStates(module, **keywords, return_states=True), x, hx)
    for name in ("mask", "mask_to"):
        del keywords[name]
    for name, value in run(WithStates(module, **keywords, return_states=True), x, hx).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask_to", ["zero", "hold"])
def test_what_a_skipped_step_holds_does_not_matter(mask_to, device):
    module, x, hx = module_and_input({}, torch.float32, device)
    mask = MASK.to(device)
    expected = run(WithStates(module, mask=mask, mask_to=mask_to), x, hx)
    assert not expected["dx"][~mask].any() and expected["dx"][mask].any(-1).all()
    x[~mask] = 1e6
    for name, value in run(WithStates(module, mask=mask, mask_to=mask_to), x, hx).items():
        assert torch.equal(value, expected[name]), name


@torch.no_grad()
def test_no_step_runs(device):
    module, x, hx = module_and_input({"num_layers": 2, "bidirectional": True}, torch.float32, device)
    mask, reset = torch.zeros(T, B, dtype=torch.bool, device=device), RESET.to(device)
    y, (hn, cn) = module(x, hx, mask=mask)
    assert not y.any() and torch.equal(hn, hx[0]) and torch.equal(cn, hx[1])
    y, (hn, cn), states = module(x, hx, mask=mask, mask_to="hold", return_states=True)
    assert torch.equal(hn, hx[0]) and torch.equal(cn, hx[1])
    assert all(torch.equal(of_step, torch.cat([*hx[0][2:]], -1)) for of_step in y)
    assert all(torch.equal(of_step, torch.cat([*hx[1][:2]], -1)) for of_step in states.c[0])
    y, (hn, cn) = module(x, hx, mask=mask, mask_to="hold", reset=reset)
    # The cut before step 0 is after the last step of the other direction.
    for d, cut in enumerate((reset.any(0), reset[1:].any(0))):
        for end, start in ((hn, hx[0]), (cn, hx[1])):
            assert torch.equal(end[d::2], start[d::2].where(~cut[:, None], 0))
    assert torch.equal(y[-1, :, :H], hn[2]) and torch.equal(y[0, :, H:], hn[3])


@pytest.mark.parametrize("mask_to", ["zero", "hold"])
@pytest.mark.parametrize("runs", [False, True])
def test_one_step(runs, mask_to, device):
    module, x, hx = module_and_input({}, torch.float32, device)
    mask = torch.tensor([[runs, not runs, True, False]])
    keywords = keywords_of("", mask_to, mask)
    assert_loop(module, x[:1], hx, keywords)
    with torch.no_grad():
        ours = WithStates(module, **for_module(module, keywords))(x[:1], hx)
    torch.testing.assert_close(ours, module(x[:1], hx, **for_module(module, keywords)))


# The same call in other forms


@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_unbatched_input(batch_first, device):
    module, x, hx = module_and_input({"bidirectional": True, "batch_first": batch_first}, torch.float32, device)
    keywords = for_module(module, keywords_of("reset", "hold")) | {"return_states": True}
    dim = 0 if batch_first else 1
    y, (hn, cn), states = module(x, hx, **keywords)
    keywords |= {name: keywords[name].select(dim, 2) for name in ("mask", "reset")}
    alone = module(x.select(dim, 2), tuple(s[:, 2] for s in hx), **keywords)
    torch.testing.assert_close(alone[0], y.select(dim, 2))
    torch.testing.assert_close(alone[1], (hn[:, 2], cn[:, 2]))
    torch.testing.assert_close(alone[2].c[0], states.c[0].select(dim, 2))


@pytest.mark.parametrize("mask_to", ["zero", "hold"])
def test_an_empty_batch(mask_to, device):
    module, x, _ = module_and_input({"bidirectional": True}, torch.float32, device)
    mask, reset = MASK[:, :0].to(device), RESET[:, :0].to(device)
    y, (hn, cn), states = module(x[:, :0], mask=mask, mask_to=mask_to, lengths=[], reset=reset, return_states=True)
    assert y.shape == states.c[0].shape == (T, 0, 2 * H) and hn.shape == cn.shape == (2, 0, H)


@torch.no_grad()
def test_no_hx_half_of_it_and_one_for_all_rows(device):
    module, x, hx = module_and_input({}, torch.float32, device)
    keywords = for_module(module, keywords_of("reset to hx", "hold"))
    zeros = tuple(torch.zeros_like(s) for s in hx)
    torch.testing.assert_close(module(x, **keywords), module(x, zeros, **keywords))
    torch.testing.assert_close(module(x, (None, hx[1]), **keywords), module(x, (zeros[0], hx[1]), **keywords))
    small = tuple(s[:, :1] for s in hx)
    wide = tuple(s.expand(-1, B, -1) for s in small)
    torch.testing.assert_close(module(x, small, **keywords), module(x, wide, **keywords))


def test_the_functional_form(device):
    module, x, hx = module_and_input({"num_layers": 2}, torch.float32, device)
    weights = [weight for layer in module.all_weights for weight in layer]
    keywords = for_module(module, keywords_of("lengths and reset to hx", "hold")) | {"return_states": True}
    y, hn, cn, states = fused_lstm.lstm(x, hx, weights, num_layers=2, **keywords)
    torch.testing.assert_close((y, (hn, cn), states), module(x, hx, **keywords))


def test_every_option_reaches_the_call_without_a_mask(monkeypatch):
    options = {"num_layers": 2, "bias": False, "bidirectional": True, "dropout": 0.5, "training": True, "ieee": True}
    options |= {"recompute": 2, "return_states": True, "reset_to": "hx", "record": lambda *args: None}
    module, x, hx = module_and_input({"num_layers": 2, "bias": False, "bidirectional": True}, torch.float32, "cpu")
    weights, calls = [weight for layer in module.all_weights for weight in layer], []
    run = functional.run
    monkeypatch.setattr(functional, "run", lambda call: calls.append(call) or run(call))
    fused_lstm.lstm(x, hx, weights, **options, mask=MASK, lengths=LENGTHS, reset=RESET)
    (inner,) = calls
    record, ieee, to_hx = options.pop("record"), options.pop("ieee"), options.pop("reset_to") == "hx"
    assert inner.options._asdict() == options | {"reset_to_hx": to_hx, "batch_first": False}
    assert inner.ieee == ieee and callable(inner.record) and inner.record is not record
    assert inner.weights is weights and inner.lengths is not None and inner.starts is not None


def test_without_gradients(device):
    module, x, hx = module_and_input({"num_layers": 2, "bidirectional": True}, torch.float32, device)
    keywords = for_module(module, keywords_of("lengths and reset", "hold")) | {"return_states": True}
    expected = module(x, hx, **keywords)
    with torch.inference_mode():
        torch.testing.assert_close(module(x, hx, **keywords), expected)


def test_recompute(device):
    options = {"bidirectional": True, "recompute": 4}
    assert_loop(*module_and_input(options, torch.float32, device), keywords_of("lengths and reset", "hold"))


def gathered(x, mask):
    """The steps of each row that run, at its front, and how many they are."""
    rows = [x[mask[:, b], b] for b in range(mask.shape[1])]
    padded = nn.utils.rnn.pad_sequence(rows)
    return torch.cat([padded, padded.new_zeros(len(x) - len(padded), *x.shape[1:])]), mask.sum(0)


@torch.no_grad()
def test_dropout_is_that_of_the_steps_that_run(device):
    module, x, hx = module_and_input({"num_layers": 2, "dropout": 0.5}, torch.float32, device)
    mask, (front, lengths) = MASK.to(device), gathered(x, MASK)
    for training in (True, False):
        module.train(training)
        torch.manual_seed(1)
        y, hidden = module(front, hx, lengths=lengths)
        torch.manual_seed(1)
        ours, ours_hidden = module(x, hx, mask=mask)
        torch.testing.assert_close(ours_hidden, hidden)
        torch.testing.assert_close(gathered(ours, MASK)[0], y)
    assert not torch.equal(module.train()(x, hx, mask=mask)[0], ours)


def test_autocast(device):
    """The loop's states in autocast's dtype; what is held is in it too."""
    module, x, hx = module_and_input({"bidirectional": True}, torch.bfloat16, device)
    keywords = keywords_of("reset", "hold")
    gold = run(Loop(twin(module, torch.float64), **keywords), x.cpu().double(), [s.cpu().double() for s in hx])
    theirs = run(Loop(twin(module), **keywords), x, hx)
    ours = WithStates(module.float(), **for_module(module, keywords), return_states=True)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y, (hn, cn) = ours(x.float().requires_grad_(), tuple(s.float() for s in hx))
    for name, value in {"y": y, "hn": hn, "cn": cn}.items():
        assert_close(name, value, theirs[name], gold[name], torch.bfloat16)
    y.float().square().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("batch_first, mask_to", [(False, "zero"), (True, "hold")])
def test_trace(batch_first, mask_to, device):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    module, x, hx = module_and_input(options, torch.float64, device)
    keywords = for_module(module, keywords_of("lengths and reset", mask_to))
    ours = trace(module, x, hx, **keywords)
    _, _, states = module(x, hx, **keywords, return_states=True)
    for layer in range(2):
        torch.testing.assert_close(ours.h[..., layer, :, :].flatten(-2), states.y[layer])
        torch.testing.assert_close(ours.c[..., layer, :, :].flatten(-2), states.c[layer])
    # The gates of the steps that run are those of a sequence of them alone.
    keywords = for_module(module, keywords_of("", mask_to))
    ours = [value.transpose(0, 1) if batch_first else value for value in trace(module, x, hx, **keywords)]
    alone = trace(module, x[2, MASK[:, 2]] if batch_first else x[MASK[:, 2], 2], tuple(s[:, 2] for s in hx))
    for value, expected in zip(ours, alone, strict=True):
        torch.testing.assert_close(value[MASK[:, 2], 2], expected)
    assert not any(gate[~MASK].any() for gate in ours[:4])


# In PyTorch 2


@torch.no_grad()
def test_one_graph_serves_every_length_and_batch():
    module = LSTM(I, H)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(module, backend=counter, fullgraph=True, dynamic=True), []
    for steps, rows in [(7, 4), (9, 8)]:  # no size of the module, which a graph would take for the same
        x, (mask, reset) = torch.randn(steps, rows, I), torch.rand(2, steps, rows) < 0.5
        keywords = {"mask": mask, "mask_to": "hold", "reset": reset}
        torch.testing.assert_close(compiled(x, **keywords), module(x, **keywords))
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1] == counts[0], "recompiled"


def test_gradients_in_one_graph():
    module, x, results = LSTM(I, H), torch.randn(T, B, I, requires_grad=True), []
    for call in (torch.compile(module, backend="aot_eager", fullgraph=True), module):
        y, hidden, states = call(x, mask=MASK, mask_to="hold", return_states=True)
        outputs = [y, *hidden, *states.y, *states.c]
        loss = sum((k + 1) * output.sin().sum() for k, output in enumerate(outputs))
        results.append((outputs, torch.autograd.grad(loss, [x, *module.parameters()])))
    torch.testing.assert_close(*results)


def test_export_with_dynamic_sizes():
    module = LSTM(I, H, batch_first=True)
    dims = {k: torch.export.Dim(name, min=2, max=64) for k, name in enumerate("BT")}
    x, mask = torch.randn(3, 4, I), torch.rand(3, 4) < 0.5
    shapes = {"input": dims, "mask": dims, "mask_to": None}
    with torch.no_grad():
        exported = torch.export.export(module, (x,), {"mask": mask, "mask_to": "hold"}, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    x, mask = torch.randn(5, 9, I), torch.rand(5, 9) < 0.5
    keywords = {"mask": mask, "mask_to": "hold"}
    torch.testing.assert_close(torch.export.load(file).module()(x, **keywords), module(x, **keywords))


@pytest.mark.parametrize("mask_to, dims", [("zero", (0, None, 0)), ("hold", (None, 0, 0))])
def test_vmap(mask_to, dims):
    """Of x, mask and reset those whose dim is 0 have a sample in front."""
    module, x = LSTM(I, H).double(), torch.randn(2, T, B, I).double()
    tensors = x, *(torch.rand(2, 2, T, B) < 0.5)

    def of_sample(x, mask, reset):
        def loss(x):
            y, (hn, cn) = module(x, mask=mask, mask_to=mask_to, reset=reset)
            return y.sin().sum() + hn.square().sum() + cn.sum(), (y, hn, cn)

        return torch.func.grad(loss, has_aux=True)(x)

    def sample(k):
        return [tensor[k if dim == 0 else 0] for tensor, dim in zip(tensors, dims, strict=True)]

    together = torch.vmap(of_sample, dims)(*(t if dim == 0 else t[0] for t, dim in zip(tensors, dims, strict=True)))
    for k in range(2):
        one = torch.utils._pytree.tree_map(lambda t, k=k: t[k], together)
        torch.testing.assert_close(one, of_sample(*sample(k)))


# What does not fit

REFUSED = {
    "another shape": ({"mask": MASK.T}, r"mask must have shape \(6, 4\), one for each step and row, got \(4, 6\)"),
    "of the steps alone": ({"mask": MASK[:, 0]}, r"shape \(6, 4\).*got \(6,\)"),
    "integers": ({"mask": MASK.long()}, r"mask must be a bool tensor, got torch\.int64"),
    "a list of integers": ({"mask": MASK.long().tolist()}, r"mask must be a bool tensor, got torch\.int64"),
    "another device": ({"mask": MASK.to("meta")}, "mask must be on cpu as the input, got meta"),
    "mask_to": ({"mask": MASK, "mask_to": "repeat"}, 'mask_to must be "zero" or "hold", got \'repeat\''),
    "mask_to without a mask": ({"mask_to": None}, 'mask_to must be "zero" or "hold", got None'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(case, monkeypatch):
    assert_refused([LSTM.__call__, trace], *REFUSED[case], monkeypatch)


@pytest.mark.parametrize("mask", [MASK.numpy(), MASK.tolist()], ids=["an array", "a list"])
def test_masks_in_any_form(mask):
    module, x = LSTM(I, H), torch.randn(T, B, I)
    torch.testing.assert_close(module(x, mask=mask), module(x, mask=MASK), rtol=0, atol=0)


def test_packed_and_unbatched_input():
    with pytest.raises(ValueError, match="mask takes padded input, not a PackedSequence"):
        LSTM(I, H)(pack_padded_sequence(torch.randn(T, B, I), [6, 4, 2, 1]), mask=MASK)
    with pytest.raises(ValueError, match=r"mask must have shape \(6, 1\)"):
        LSTM(I, H)(torch.randn(T, I), mask=MASK)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 6\)"):
        LSTM(I, H, batch_first=True)(torch.randn(B, T, I), mask=MASK)


def test_no_steps_at_all():
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        LSTM(I, H)(torch.randn(0, B, I), mask=MASK[:0], mask_to="hold", reset=RESET[:0])
