"""Recurrent against a loop over its cell's function and against torch's own layers, and at home in PyTorch."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.library import opcheck
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_lstm import LSTM, Recurrent, cell, cells, trace
from fused_lstm.kernels.environment import WHY_NO_TRITON

from .parity import assert_close
from .test_cells import LIBRARY, two_states, vectors

T, B, I, H = 4, 3, 2, 5  # noqa: E741


@cell(gates="abc", state="c a", params="w", feedback="ca")
def feeding(x, r, s, p):
    """Of its states c and a, in another order than that of the gates."""
    a, b = torch.sigmoid(x.a + r.a), torch.tanh(x.b + p.w * r.b)
    c = a * s.c + (1 - a) * b
    return torch.tanh(c + r.c) - s.a * x.c, c, a


CELLS = LIBRARY | {"two states": two_states, "vectors": vectors, "feeding": feeding}


class Loop(nn.Module):
    """The oracle: a row, layer, direction and step at a time, with the weights of a layer by their names."""

    def __init__(self, layer, lengths=None, reset=None, reset_to="zero"):
        super().__init__()
        self.layer, self.lengths, self.reset, self.to_hx = layer, lengths, reset, reset_to == "hx"

    def step(self, suffix, x, s):
        of, w = self.layer.cell, {n[: -len(suffix)]: p for n, p in self.layer.named_parameters() if n.endswith(suffix)}
        G, F, H = len(of.gates), len(of.feedback), self.layer.hidden_size
        x = w["weight_ih"] @ x + w.get("bias_ih", 0)
        r = dict(zip(of.gates, (w["weight_hh"] @ s[0] + w.get("bias_hh", 0)).chunk(G), strict=True))
        before = of.S(*s)
        for to, by in product(range(F), repeat=2):
            block = w["weight_fh"][to * H : (to + 1) * H, by * H : (by + 1) * H]
            r[of.feedback[to]] = r[of.feedback[to]] + block @ getattr(before, of.feedback[by])
        after = of(of.X(*x.chunk(G)), of.R(**r), before, of.P(*(w[name] for name in of.params)))
        return [after] if isinstance(after, torch.Tensor) else list(after)

    def row(self, suffix, x, s, cuts):
        """The states of all steps of a row, (T, states, H), and the last; cuts: before which steps they are reset."""
        start = s if self.to_hx else [torch.zeros_like(state) for state in s]
        of_steps = [torch.stack(s)[None][:0]]
        for of_input, cut in zip(x, cuts, strict=True):
            s = self.step(suffix, of_input, start if cut else s)
            of_steps.append(torch.stack(s)[None])
        return torch.cat(of_steps), torch.stack(s)

    def forward(self, x, hx):
        """y, each last state, and for each layer its states of all steps."""
        results, ends, D, (T, B, _) = [], [], 1 + self.layer.bidirectional, x.shape
        for k, d in product(range(self.layer.num_layers), range(D)):
            several = []
            for b in range(B):
                n = T if self.lengths is None else int(self.lengths[b])
                cuts, steps = [False] * (n + 1), x[:n, b]
                cuts[:n] = cuts[:n] if self.reset is None else self.reset[:n, b].tolist()
                if d == 1:  # what is cut before a step in one direction is cut after it in the other
                    steps, cuts = steps.flip(0), cuts[:0:-1]
                start = [state[k * D + d, b] for state in hx]
                of_row, end = self.row(f"_l{k}" + "_reverse" * d, steps, start, cuts[:n])
                several.append((pad(of_row.flip(0) if d else of_row, (*[0] * 5, T - n)), end))
            results.append(torch.stack([of_row for of_row, _ in several], 1))
            ends.append(torch.stack([end for _, end in several]))
            if d == D - 1:
                results[-D:] = torch.cat(results[-D:], -1).unbind(2)
                x = results[-len(hx)]
        return x, *torch.stack(ends).unbind(2), *results


def call(layer, x, hx, *, packed=False, **keywords):
    """A layer's call as Loop gives its results; packed: of rows of these lengths."""
    hx = tuple(hx) if layer.cell.states else hx[0]
    x = x.transpose(0, 1) if layer.batch_first else x
    if packed:
        x = pack_padded_sequence(x, keywords.pop("lengths"), layer.batch_first, enforce_sorted=packed == "sorted")
    y, ends, states = layer(x, hx, **keywords, return_states=True)
    steps = [y, *(tensor for of_layer in zip(*states, strict=True) for tensor in of_layer)]
    if packed:
        steps = [pad_packed_sequence(tensor, total_length=T)[0] for tensor in steps]
    elif layer.batch_first:
        steps = [tensor.transpose(0, 1) for tensor in steps]
    return steps[0], *(ends if layer.cell.states else [ends]), *steps[1:]


def results(function, layer, x, hx):
    """Every output of function(x, hx), and every gradient, by name."""
    x, *hx = (tensor.detach().requires_grad_() for tensor in (x, *hx))
    names = layer.cell.S._fields
    inputs = {"x": x} | dict(zip((f"{name}0" for name in names), hx, strict=True)) | dict(layer.named_parameters())
    outputs = function(x, hx)
    found = {f"output {k}": output.detach() for k, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(7)
    by = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), by, materialize_grads=True)
    return found | {f"d{name}": gradient for name, gradient in zip(inputs, grads, strict=True)}


def assert_loop(layer, x, hx, **keywords):
    """Holds every output and gradient of a layer to the rule."""
    masks = {name: value for name, value in keywords.items() if name != "packed"}
    if layer.batch_first and "reset" in keywords:
        keywords["reset"] = keywords["reset"].T
    ours = results(lambda x, hx: call(layer, x, hx, **keywords), layer, x, hx)
    wide, theirs = copy.deepcopy(layer).double(), {}
    gold = results(Loop(wide, **masks), wide, x.double(), [s.double() for s in hx])
    if x.dtype != torch.float64:
        theirs = results(Loop(layer, **masks), layer, x, hx)
    assert ours.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name], theirs.get(name), gold[name], x.dtype)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def layer_and_input(of, dtype=torch.float64, H=H, B=B, **options):
    layer = Recurrent(of, I, H, **options, dtype=dtype)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    x, *hx = (torch.randn(size, dtype=torch.float64) for size in ((T, B, I), *[(rows, B, H)] * len(of.S._fields)))
    if of is cells.slstm:
        hx[2] = (hx[2] > 0) * (1 + hx[2])  # its normaliser is zero, or at least 1
    return layer, x.to(dtype), [state.to(dtype) for state in hx]


def cuts_of(B):
    lengths = (torch.arange(B) * 2 + 3) % (T + 1)
    return lengths, (torch.arange(T)[:, None] * 3 + torch.arange(B) * 5) % 4 == 0


LENGTHS, RESET = cuts_of(B)
FORMS = {
    "dense": ({"batch_first": True}, {}),
    "lengths": ({"bias": False}, {"lengths": LENGTHS}),
    "sorted": ({}, {"lengths": torch.tensor([4, 3, 1]), "packed": "sorted"}),
    "unsorted": ({}, {"lengths": torch.tensor([2, 4, 1]), "packed": "unsorted"}),
    "reset": ({"batch_first": True, "bias": False}, {"reset": RESET}),
    "lengths and reset to hx": ({}, {"lengths": LENGTHS, "reset": RESET, "reset_to": "hx"}),
}
BOTH = {"num_layers": 2, "bidirectional": True}


CASES = list(product(("gru", "two states", "feeding"), FORMS))  # all forms, and one of each other cell
CASES += zip([name for name in CELLS if name not in dict(CASES)], list(FORMS) * 2, strict=False)


@pytest.mark.parametrize("name, form", CASES)
def test_every_state_and_gradient(name, form):
    options, keywords = FORMS[form]
    assert_loop(*layer_and_input(CELLS[name], H=2, **BOTH, **options), **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CELLS)
def test_dtypes(name, dtype):
    assert_loop(*layer_and_input(CELLS[name], dtype, bidirectional=True), lengths=LENGTHS, reset=RESET)


@pytest.mark.parametrize("B", [1, 3, 17])
@pytest.mark.parametrize("H", [1, 20])
@pytest.mark.parametrize("name", ["gru", "feeding"])
def test_sizes(name, H, B):
    lengths, reset = cuts_of(B)
    assert_loop(*layer_and_input(CELLS[name], H=H, B=B), lengths=lengths, reset=reset, reset_to="hx")


# Against torch's own layers

OWN = {"gru": nn.GRU, "rnn_tanh": nn.RNN, "lstm": nn.LSTM}
OPTIONS = {"plain": {}, "both": {**BOTH, "batch_first": True}, "no biases": {"bias": False}}
CALLS = {
    "dense": lambda x: x,
    "packed": lambda x: pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False),
    "unbatched": lambda x: x[:, 0],
}


@pytest.mark.parametrize("options, form", [("no biases", "dense"), *product(("plain", "both"), CALLS)])
@pytest.mark.parametrize("name", OWN)
def test_torch_s_own_layers(name, options, form):
    made = []
    for cls, first in ((Recurrent, [CELLS[name]]), (OWN[name], [])):
        torch.manual_seed(3)
        made.append(cls(*first, I, H, **OPTIONS[options], dtype=torch.float64))
    ours, theirs = made
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    for a, b in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for weight in a.parameters():
                weight.uniform_(-1, 1)
        b.load_state_dict(a.state_dict())
    x = CALLS[form](torch.randn(T, B, I, dtype=torch.float64))
    rows = {"dense": [T if ours.batch_first else B], "packed": [B], "unbatched": []}
    size = len(ours.all_weights), *rows[form], H
    hx = tuple(torch.randn(size, dtype=torch.float64) for _ in CELLS[name].S._fields)
    for given in (None, hx if len(hx) > 1 else hx[0]):
        found = []
        for layer in made:
            y, ends = layer(x, given)
            loss = (y.data if form == "packed" else y).sin().sum() + sum(end.cos().sum() for end in ends)
            found.append((y, ends, torch.autograd.grad(loss, list(layer.parameters()))))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


MASK = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
KEYWORDS = {
    "lengths": {"lengths": LENGTHS},
    "reset": {"reset": RESET},
    "reset to hx": {"reset": RESET, "reset_to": "hx", "lengths": LENGTHS},
    "mask": {"mask": MASK},
    "mask to hold": {"mask": MASK, "mask_to": "hold", "lengths": LENGTHS, "reset": RESET},
}


@pytest.mark.parametrize("form", KEYWORDS)
def test_it_is_our_lstm(form):
    ours, x, hx = layer_and_input(cells.lstm, **BOTH)
    theirs = LSTM(I, H, **BOTH, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    expected = theirs(x, tuple(hx), **KEYWORDS[form], return_states=True)
    same(ours(x, tuple(hx), **KEYWORDS[form], return_states=True), expected)


@pytest.mark.parametrize("mask_to", ["zero", "hold"])
def test_a_mask_is_the_plain_call_of_the_steps_that_run(mask_to):
    layer, x, hx = layer_and_input(two_states)
    y, ends, states = layer(x, tuple(hx), mask=MASK, mask_to=mask_to, return_states=True)
    for b in range(B):
        alone = layer(x[MASK[:, b], b], tuple(s[:, b] for s in hx), return_states=True)
        same(tuple(end[:, b] for end in ends), alone[1])
        for found, expected, start in zip((y, *states), (alone[0], *alone[2]), (hx[0], *hx), strict=False):
            found, expected = (of[0] if isinstance(of, tuple) else of for of in (found, expected))
            held = [start[0, b] if mask_to == "hold" else torch.zeros_like(start[0, b]), *expected]
            for t in range(T):
                ran = int(MASK[: t + 1, b].sum())
                same(found[t, b], held[ran if MASK[t, b] or mask_to == "hold" else 0])


# Derivatives


def own(of, bidirectional):
    """A small layer and inputs, all of which want gradients; and what takes them all."""
    layer = Recurrent(of, 1, 2, bidirectional=bidirectional, dtype=torch.float64)
    rows, names = len(layer.all_weights), [name for name, _ in layer.named_parameters()]
    sizes = (2, 2, 1), *[(rows, 2, 2)] * len(of.S._fields)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    inputs += [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def flat(x, *others):
        hx, weights = others[: len(sizes) - 1], dict(zip(names, others[len(sizes) - 1 :], strict=True))
        y, ends = functional_call(layer, weights, (x, hx if of.states else hx[0]), {"lengths": torch.tensor([2, 1])})
        return y, *(ends if of.states else [ends])

    return flat, inputs


@pytest.mark.parametrize("name, bidirectional", [("two states", False), ("vectors", False), ("feeding", True)])
def test_finite_differences(name, bidirectional):
    flat, inputs = own(CELLS[name], bidirectional)
    assert gradcheck(flat, inputs, fast_mode=True)
    assert gradgradcheck(flat, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["two states", "vectors", "feeding", "gru"])
def test_transforms(name):
    """Forward mode, mapped samples and gradients of each sample, against the loop."""
    layer, x, hx = layer_and_input(CELLS[name])
    loop, samples = Loop(layer), torch.randn(2, T, B, I, dtype=torch.float64)
    tangents = [torch.randn_like(x), *map(torch.randn_like, hx)]
    of_ours, of_loop = (
        jvp(lambda x, *hx, f=f: f(x, hx), (x, *hx), tuple(tangents)) for f in (lambda x, hx: call(layer, x, hx), loop)
    )
    torch.testing.assert_close(of_ours, of_loop)
    mapped = vmap(lambda x: call(layer, x, hx))(samples)
    for k in range(2):
        torch.testing.assert_close(tuple(of[k] for of in mapped), loop(samples[k], hx))

    def loss(weights, x):
        y, ends = functional_call(layer, weights, (x, tuple(hx) if layer.cell.states else hx[0]))
        return y.sin().sum() + ends[0].square().sum()

    weights = {name: p.detach() for name, p in layer.named_parameters()}
    of_samples = vmap(grad(loss), (None, 0))(weights, samples)
    for k in range(2):
        y, h, *_ = loop(samples[k], hx)
        grads = torch.autograd.grad(y.sin().sum() + h.square().sum(), list(layer.parameters()))
        torch.testing.assert_close([of_samples[name][k] for name in weights], list(grads))


# Forms of a call


def test_no_hx_a_part_of_it_and_one_for_all_rows():
    layer, x, (h, c, _) = layer_and_input(two_states, **BOTH)
    zeros = torch.zeros_like(h)
    same(layer(x), layer(x, (zeros,) * 3))
    same(layer(x, (None, c, None)), layer(x, (zeros, c, zeros)))
    same(layer(x, [h[:, :1], c, None]), layer(x, (h[:, :1].expand_as(h), c, zeros)))
    same(layer(x[:, 0], (None, c[:, 0], None))[0], layer(x, (zeros, c, zeros))[0][:, 0])
    gru, small = Recurrent(cells.gru, I, H, dtype=torch.float64), h[:1, :1].clone().requires_grad_()
    same(gru(x, small), gru(x, small.expand(-1, B, -1)))
    wide = small.detach().expand(-1, B, -1).requires_grad_()
    sums = [torch.autograd.grad(gru(x, hx)[0].sum(), hx)[0] for hx in (small, wide)]
    same(sums[0], sums[1].sum(1, keepdim=True))


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input(batch_first):
    layer, x, hx = layer_and_input(two_states, **BOTH, batch_first=batch_first)
    keywords = {"reset": RESET, "mask": MASK, "mask_to": "hold", "return_states": True}
    alone = layer(x[:, 1], tuple(s[:, 1] for s in hx), **keywords | {"reset": RESET[:, 1], "mask": MASK[:, 1]})
    if batch_first:
        x, keywords = x.transpose(0, 1), keywords | {"reset": RESET.T, "mask": MASK.T}
    y, ends, states = layer(x, tuple(hx), **keywords)
    dim = 0 if batch_first else 1
    same(alone[:2], (y.select(dim, 1), tuple(end[:, 1] for end in ends)))
    same(alone[2].n[1], states.n[1].select(dim, 1))
    assert states._fields == ("h", "c", "n") and len(states.n) == 2


@pytest.mark.parametrize("name", ["gru", "two states"])
def test_an_empty_batch_one_step_and_another_stride(name):
    layer, x, hx = layer_and_input(CELLS[name], **BOTH)
    hx = tuple(hx) if layer.cell.states else hx[0]
    y, ends = layer(x[:, :0])
    assert y.shape == (T, 0, 2 * H) and all(end.shape == (4, 0, H) for end in (ends if layer.cell.states else [ends]))
    assert not any(of.any() for of in torch.autograd.grad(y.sum(), list(layer.parameters())))
    y, ends = layer(x, hx, lengths=[1] * B)
    same(layer(x[:1], hx), (y[:1], ends))
    same(layer(x.transpose(0, 2).contiguous().transpose(0, 2), hx), layer(x, hx))


ZERO, WRONG_ROWS, WRONG_UNITS, ONE = map(torch.zeros, ((1, B, H), (1, 2, H), (1, B, 4), (T, B, I)))
REFUSED = {
    "two of three": (two_states, ONE, (ZERO, ZERO), ValueError, r"takes hx as \(h0, c0, n0\), got tuple of 2"),
    "a tensor for three": (two_states, ONE, ZERO, ValueError, r"takes hx as \(h0, c0, n0\), got Tensor of 1"),
    "a tuple for one": (cells.gru, ONE, (ZERO,), ValueError, "the cell gru takes hx as h0, a tensor, got tuple of 1"),
    "rows of h": (cells.gru, ONE, WRONG_ROWS, RuntimeError, r"Expected hidden size \(1, 3, 5\), got \[1, 2, 5\]"),
    "units of c": (cells.lstm, ONE, (ZERO, WRONG_UNITS), RuntimeError, r"hidden\[1\] size .*, got \[1, 3, 4\]"),
    "2-D hx": (cells.gru, ONE, ZERO[0], RuntimeError, "For batched 3-D input, hx should also be 3-D but got 2-D"),
    "3-D hx": (cells.gru, ONE[:, 0], ZERO, RuntimeError, "For unbatched 2-D input, hx should also be 2-D but got 3-D"),
    "4-D input": (cells.gru, ONE[None], None, ValueError, "gru: Expected input to be 2D or 3D, got 4D instead"),
    "features": (cells.gru, torch.zeros(T, B, 7), None, RuntimeError, "must be equal to input_size. Expected 2, got 7"),
    "dtype": (cells.gru, ONE.double(), None, ValueError, "input dtype .torch.float64. does not match weight dtype"),
    "no step": (cells.gru, ONE[:0], None, RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
}


@pytest.mark.parametrize(("of", "x", "hx", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(of, x, hx, kind, text):
    with pytest.raises(kind, match=text):
        Recurrent(of, I, H)(x, hx)


@pytest.mark.parametrize("given", ["gru", nn.GRU, cells.gru.function], ids=["text", "class", "function"])
def test_what_is_no_cell_is_refused(given):
    with pytest.raises(TypeError, match=rf"takes a cell of fused_lstm\.cells .*, got {type(given).__name__}"):
        Recurrent(given, I, H)


def test_a_layer_says_what_it_is():
    assert repr(Recurrent(cells.gru, I, H, bidirectional=True)) == "Recurrent(gru, 2, 5, bidirectional=True)"
    assert repr(Recurrent(two_states, I, H, 2, recompute=4)) == "Recurrent(two_states, 2, 5, num_layers=2, recompute=4)"
    shapes = {name: tuple(p.shape) for name, p in Recurrent(feeding, I, H, 2, bias=False).named_parameters()}
    expected = {"weight_ih_l1": (15, 5), "weight_hh_l1": (15, 5), "weight_fh_l1": (10, 10), "w_l1": (5,)}
    assert {name: size for name, size in shapes.items() if name.endswith("_l1")} == expected


def test_a_plan_says_why():
    odd, x = cell(gates="a")(lambda x, r, s, p: torch.atan2(x.a, r.a)), torch.zeros(T, B, I)
    reasons = {cells.fgr: "states feed back through matrices of their own", odd: "atan2 has no form in Triton"}
    for plan, why in ((Recurrent(of, I, H).plan(x), why) for of, why in reasons.items()):
        assert plan.mode == "composed" and (why in plan.why or WHY_NO_TRITON is not None)
    assert Recurrent(cells.gru, I, H).plan(x).mode == ("local" if WHY_NO_TRITON is None else "composed")


def test_dropout():
    """Between the layers alone, in training, by torch's generator: a layer of one seed is torch's own."""
    ours, theirs = Recurrent(cells.gru, I, H, dropout=0.5, num_layers=2), nn.GRU(I, H, dropout=0.5, num_layers=2)
    theirs.load_state_dict(ours.state_dict())
    x, found = torch.randn(T, B, I), []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        found.append([layer(x), layer(x)])
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0][0][0], found[0][1][0]) and found[0][0][0].all()
    same(ours.eval()(x), ours(x))


def test_copies():
    layer, x, _ = layer_and_input(feeding, **BOTH)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell is feeding and other.weight_fh_l1 is not layer.weight_fh_l1
        same(other(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer).float()(x.float())[0], layer(x)[0].float())


@pytest.mark.parametrize("name", ["gru", "two states", "feeding"])
def test_autocast(name):
    """Its results are those of a layer in bfloat16; its gradients have the parameters' dtype."""
    layer, x, hx = layer_and_input(CELLS[name], torch.bfloat16, **BOTH)
    wide = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(wide, x.float(), [state.float() for state in hx])
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    torch.testing.assert_close(found, call(layer, x, hx), rtol=0, atol=0)
    found[0].float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in wide.parameters())


# Graphs


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["gru", "feeding"])
def test_one_graph_serves_every_length_and_batch(name, training):
    layer = Recurrent(CELLS[name], I, H, bidirectional=name == "feeding").train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True), []
    for sizes in [(4, 3), (3, 6)]:
        x, results = torch.randn(*sizes, I, requires_grad=training), []
        hx = [torch.randn(len(layer.all_weights), sizes[1], H) for _ in layer.cell.S._fields]
        cuts = {"lengths": torch.arange(sizes[1]) % 4, "reset": torch.rand(sizes) < 0.3, "reset_to": "hx"}
        for run in (compiled, layer):
            with torch.set_grad_enabled(training):
                y, ends = run(x, tuple(hx) if layer.cell.states else hx[0], **cuts)
            outputs = [y, *(ends if layer.cell.states else [ends])]
            if training:
                loss = sum((k + 1) * output.sin().sum() for k, output in enumerate(outputs))
                outputs += torch.autograd.grad(loss, [x, *layer.parameters()])
            results.append(outputs)
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == [counts[0]] * 2, "recompiled"


@pytest.mark.parametrize("name", ["gru", "feeding"])
def test_export_runs_after_save_and_load(name):
    layer, file = Recurrent(CELLS[name], I, H, bidirectional=True), io.BytesIO()
    dims = {k: torch.export.Dim(letter, min=2, max=64) for k, letter in enumerate("TB")}
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(3, 2, I),), dynamic_shapes=(dims,))
    torch.export.save(exported, file)
    file.seek(0)
    x = torch.randn(9, 5, I)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


@pytest.mark.parametrize("name", ["gru", "feeding"])
def test_opcheck(name):
    layer, x, hx = layer_and_input(CELLS[name], torch.float32, bidirectional=True)
    weights = [weight.detach() for of_direction in layer.all_weights for weight in of_direction]
    given = {"input": x, "hx": hx, "weights": weights, "batch_sizes": None, "lengths": LENGTHS, "starts": RESET}
    given |= {"cell": layer.cell.key, "bias": True, "bidirectional": True, "reset_to_hx": True}
    given |= {"needs": [True] * (1 + len(hx) + len(weights))}
    for op in (torch.ops.fused_lstm.cell.default, torch.ops.fused_lstm.cell_backward.default):
        arguments = tuple(given[argument.name] for argument in op._schema.arguments)
        opcheck(op, arguments)
        given |= {"cotangents": list(map(torch.randn_like, op(*arguments)))}


@pytest.mark.parametrize("form", ["dense", "lengths", "unsorted", "reset"])
@pytest.mark.parametrize("name", ["two states", "feeding"])
def test_recompute_in_chunks_is_the_same(name, form):
    """Of more steps than one chunk, which no chunk divides; and less is kept."""
    layer, x, hx = layer_and_input(CELLS[name], **BOTH)
    _, keywords = FORMS[form]
    whole = results(lambda x, hx: call(layer, x, hx, **dict(keywords)), layer, x, hx)
    layer.recompute = 3
    assert layer.plan(x).chunk == 3 and "chunks of 3 steps" in str(layer.plan(x))
    same(results(lambda x, hx: call(layer, x, hx, **dict(keywords)), layer, x, hx), whole)


def test_recompute_keeps_less():
    kept = []

    def pack(tensor):
        kept[-1] += tensor.numel()
        return tensor

    layer, x = Recurrent(cells.gru, 2, 3), torch.randn(64, 2, 2)
    for chunk in (False, 16):
        layer.recompute = chunk
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
    assert kept[1] < kept[0] / 2


def test_a_trace_is_all_that_the_cell_was_given():
    layer, x, hx = layer_and_input(cells.vanilla, **BOTH)
    traced = trace(layer, x, tuple(hx), lengths=LENGTHS)
    y, _, states = layer(x, tuple(hx), lengths=LENGTHS, return_states=True)
    same(traced.s.h[..., 1, 0, :], y[..., :H])
    same(traced.s.c[..., 0, 1, :], states.c[0][..., H:])
    x, r, s = (type(each)(*(tensor[:, 1, 1, 0] for tensor in each)) for each in traced)
    p = cells.vanilla.P(*(getattr(layer, f"{name}_l1") for name in cells.vanilla.params))
    for t in range(1, int(LENGTHS[1])):
        x_t, r_t, before = (type(each)(*(tensor[k] for tensor in each)) for each, k in ((x, t), (r, t), (s, t - 1)))
        h, c = cells.vanilla(x_t, r_t, before, p)
        same((h, c), (s.h[t], s.c[t]))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Recurrent(two_states, I, H)

    def forward(self, x, lengths=None):
        return self.inner(x, lengths=lengths)[0]


def test_fx_and_jit():
    model, x = Model(), torch.randn(T, B, I)
    graph = torch.fx.symbolic_trace(model)
    assert "call_module" in [node.op for node in graph.graph.nodes if node.target == "inner"]
    torch.testing.assert_close(graph(x, LENGTHS), model(x, LENGTHS))
    with pytest.raises(torch.fx.proxy.TraceError, match="a model that has it as a submodule"):
        torch.fx.symbolic_trace(model.inner)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not compile fused_lstm.Recurrent"):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(2 * x), model(2 * x))
