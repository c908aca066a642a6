"""Layers that run in one launch, a step behind each other: the numbers of nn.LSTM, its dropout, and when they do."""

import copy
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from torch.nn.utils.rnn import pack_padded_sequence

from fused_lstm import LSTM, route
from fused_lstm.kernels import forward
from fused_lstm.kernels.dropout import dropout
from fused_lstm.kernels.layout import Layout
from fused_lstm.kernels.model import step, terms_for
from fused_lstm.kernels.plan import Plan, choose_kernel, grouped
from fused_lstm.kernels.tiles import A100, H100, Problem, Tiles, max_coresident, programs_of

from .layouts import NAMES, layout_of
from .parity import WIDEST, assert_close, assert_parity, run, twin
from .test_parity import DTYPES, I, states

# T, B, H and L.
SIZES = [(1, 3, 20, 2), (5, 17, 1, 3), (4, 0, 20, 2), (3, 3, 36, 4)]


@pytest.fixture
def one_launch(monkeypatch):
    """Groups layers as told, whatever they cost; all in one launch if not told."""

    def group(*sizes):
        monkeypatch.setattr(route, "layers_together", lambda dtype, B, H, layers, *rest: list(sizes) or [layers])
        route.known_route.cache_clear()

    group()
    return group


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,B,H,L", SIZES)
def test_parity(T, B, H, L, dtype, one_launch, device):
    module = LSTM(I, H, num_layers=L, dtype=dtype, device=device)
    x = torch.randn(T, B, I, dtype=dtype, device=device)
    plan = module.plan(x)
    assert plan.layers == L or plan.mode == "torch"  # float64 on CUDA
    assert_parity(module, x, states(module, B))


@pytest.mark.parametrize("options", [{"bias": False}, {"batch_first": True}], ids=str)
def test_options(options, one_launch, device):
    module = LSTM(I, 20, num_layers=2, **options, dtype=WIDEST[device], device=device)
    assert_parity(module, torch.randn(3, 3, I).to(device, WIDEST[device]), states(module, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype, one_launch, device):
    module = LSTM(I, 20, num_layers=3, dtype=dtype, device=device)
    padded = torch.randn(4, 5, I, dtype=dtype, device=device)
    packed = pack_padded_sequence(padded, [2, 4, 1, 4, 3], enforce_sorted=False)
    assert_parity(module, packed, states(module, 5))


class Called(torch.nn.Module):
    """A module that is called with keywords."""

    def __init__(self, module, **keywords):
        super().__init__()
        self.module, self.keywords = module, keywords

    def forward(self, x, hx):
        return self.module(x, hx, **self.keywords)


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("keywords", [{"lengths": [2, 0, 4]}, {"reset": torch.arange(12).view(4, 3) % 5 == 1}], ids=str)
def test_lengths_and_resets_in_every_grouping(keywords, groups, one_launch):
    module = LSTM(I, 20, num_layers=3, dtype=torch.float64)
    x, hx = torch.randn(4, 3, I, dtype=torch.float64), states(module, 3)

    def call(*sizes):
        one_launch(*sizes)
        return run(Called(module, **keywords), x, hx)

    torch.testing.assert_close(call(), call(*groups), rtol=1e-11, atol=1e-12)


# Dropout


def masked(module, x, hx, masks):
    """nn.LSTM layer by layer in float64, with masks between the layers: a module to be run()."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            theirs = twin(module, torch.float64)
            for name, parameter in theirs.named_parameters():
                self.register_parameter(name, parameter)
            sizes = [I, *[module.hidden_size] * L]
            self.layers = [torch.nn.LSTM(*both).double() for both in pairwise(sizes)]

        def forward(self, x, hx):
            ends = []
            for k, layer in enumerate(self.layers):
                own = {n: getattr(self, f"{n}{k}") for n in ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")}
                own = {f"{name}0": value for name, value in own.items()}
                x, end = torch.func.functional_call(layer, own, (x, (hx[0][k : k + 1], hx[1][k : k + 1])))
                ends.append(end)
                if k < L - 1:
                    x = x * masks[k]
            return x, tuple(torch.cat(s) for s in zip(*ends, strict=True))

    L = module.num_layers
    return run(Layers(), x.double(), tuple(s.double() for s in hx))


def drawn(monkeypatch):
    """The seeds that calls draw, as a list that grows."""
    seeds, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: seeds.append(randint(*a, **k)) or seeds[-1])
    return seeds


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_by_its_own_masks(dtype, one_launch, monkeypatch):
    """The masks read back and given to nn.LSTM: the same outputs and gradients."""
    T, B, H, p = 4, 17, 20, 0.3
    module = LSTM(I, H, num_layers=3, dropout=p, dtype=dtype)
    x, hx, seeds = torch.randn(T, B, I, dtype=dtype), states(module, B), drawn(monkeypatch)
    ours = run(module, x, hx)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keep, ones = torch.tensor([1 - p], dtype=wide), torch.ones(T, B, H, dtype=torch.float64)
    masks = [dropout(ones, seeds[0], keep.double(), layer, B) for layer in range(2)]
    assert all(set(mask.unique().tolist()) == {0.0, 1 / keep.item()} for mask in masks)
    kept = torch.stack(masks) > 0
    assert len(seeds) == 1 and abs(kept.double().mean() - (1 - p)) < 0.03 and not torch.equal(*kept)
    gold = masked(module, x, hx, masks)
    # nn.LSTM's own error, without dropout: the rule takes it for what the dtype costs.
    plain = copy.deepcopy(module).eval()
    theirs = {} if dtype == torch.float64 else run(twin(plain), x, hx)
    exact = run(twin(plain, torch.float64), x.double(), tuple(s.double() for s in hx))
    for name, value in gold.items():
        beside = None if dtype == torch.float64 else value + (theirs[name].double() - exact[name])
        assert_close(name, ours[name], beside, value, dtype)


def test_a_seed_repeats_its_dropout_and_eval_has_none(one_launch):
    module, x = LSTM(I, 20, num_layers=2, dropout=0.5), torch.randn(3, 4, I)

    def call(seed):
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(call(1), call(1)) and not torch.equal(call(1), call(2))
    module.eval()
    assert torch.equal(call(1), call(2))
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], twin(module)(x)[0])


def test_a_mask_is_the_same_wherever_its_rows_lie(one_launch):
    """Packed and padded rows, and another form of the launch."""
    module = LSTM(I, 20, num_layers=3, dropout=0.5).double()
    x, lengths = torch.randn(4, 3, I).double(), [4, 3, 1]
    torch.manual_seed(1)
    padded, _ = module(x, lengths=lengths)
    torch.manual_seed(1)
    packed, _ = module(pack_padded_sequence(x, lengths))
    torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(packed)[0], padded)


@pytest.mark.parametrize("form", NAMES[:3])
def test_dropout_kernel_leaves_out_what_is_not_there(form):
    layout, lead = layout_of(form, 4, 5)
    y = torch.full((*lead, 20), torch.nan)
    present = torch.ones(lead, dtype=torch.bool)
    if layout.padded:
        present = torch.arange(4)[:, None] < layout.lengths
    y[present] = 1.0
    dropped = dropout(y, torch.tensor([3]), torch.tensor([0.5]), 0, 5, layout)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and (dropped[~present] == 0).all()


def test_checkpointing_and_autocast_keep_the_mask(one_launch):
    module, x = LSTM(I, 20, num_layers=2, dropout=0.5), torch.randn(3, 4, I, requires_grad=True)

    def gradient(call):
        torch.manual_seed(1)
        return torch.autograd.grad(call(x)[0].square().sum(), x)[0]

    again = gradient(lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False))
    torch.testing.assert_close(again, gradient(module))


# What looks at a launch from outside: derivatives of derivatives, torch.compile, torch.vmap


def test_second_derivatives(one_launch):
    module = LSTM(2, 3, num_layers=2, dropout=0.5).double()
    x, h0, c0 = (torch.randn(size, requires_grad=True).double() for size in [(2, 1, 2), (2, 1, 3), (2, 1, 3)])

    def call(*tensors):
        torch.manual_seed(1)
        y, (hn, cn) = module(tensors[0], tensors[1:])
        return y, hn, cn

    assert torch.autograd.gradgradcheck(call, (x, h0, c0), fast_mode=True)


def test_compiled(one_launch):
    module = LSTM(I, 20, num_layers=3, dropout=0.5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for T, B in [(4, 3), (7, 2), (3, 5)]:
        x, grads = torch.randn(T, B, I, requires_grad=True), []
        for call in (compiled, module):
            torch.manual_seed(1)
            y, (hn, cn) = call(x)
            grads.append(torch.autograd.grad(y.sum() + hn.sum() + cn.square().sum(), [x, *module.parameters()]))
        torch.testing.assert_close(*grads)
        counts.add(counter.frame_count)
    assert len(counts) == 1, "recompiled"


def test_gradients_of_each_sample(one_launch):
    module, samples = LSTM(I, 20, num_layers=2).double(), torch.randn(3, 4, 2, I).double()

    def loss(parameters, x):
        y, (_, cn) = torch.func.functional_call(module, parameters, (x,))
        return y.sin().sum() + cn.sum()

    parameters = dict(module.named_parameters())
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    alone = [torch.func.grad(loss)(parameters, x) for x in samples]
    torch.testing.assert_close(grads, {name: torch.stack([each[name] for each in alone]) for name in grads})


def test_without_gradients_y_does_not_hold_the_other_layers(one_launch):
    module, x = LSTM(I, 20, num_layers=3), torch.randn(4, 3, I)
    with torch.no_grad():
        y, _ = module(x)
    assert y.untyped_storage().nbytes() == y.nbytes


# Who is grouped


def test_layers_that_fit_together_and_pay_run_together():
    """By the model: a stack's step costs little more than a layer's while its programs are there; no more than fit."""
    assert grouped(torch.bfloat16, 16, 512, 4, H100, False) == [4]
    assert grouped(torch.bfloat16, 16, 512, 6, H100, False) == [3, 3]
    assert grouped(torch.bfloat16, 16, 64, 4, H100, False) == [1] * 4  # one multiprocessor holds a layer
    assert grouped(torch.bfloat16, 16, 1024, 4, H100, False) == [1] * 4  # two layers do not fit
    for device, H, B, L in [(A100, 256, 16, 3), (H100, 384, 64, 4), (H100, 512, 256, 4)]:
        sizes = grouped(torch.bfloat16, B, H, L, device, False)
        plan = choose_kernel(torch.bfloat16, B, H, device, False, 1, sizes[0])
        assert sum(sizes) == L and all(a - b in (0, 1) for a, b in pairwise(sizes)) and plan.layers == sizes[0]
        for tiles in (plan.forward, plan.backward):
            unit_blocks, _ = programs_of(tiles, H, B)
            assert sizes[0] * unit_blocks <= device.multiprocessors
        if sizes[0] > 1:
            alone = choose_kernel(torch.bfloat16, B, H, device, False)
            together, apart = (
                sum(
                    step(terms_for(device), "grid", tiles, Problem("bf16", H, backward, layers=p.layers), B).us
                    for tiles, backward in ((p.forward, False), (p.backward, True))
                )
                for p in (plan, alone)
            )
            assert together < sizes[0] * apart


def test_the_plan_says_how_layers_are_grouped(monkeypatch, one_launch):
    one_launch(2, 1)
    plan = LSTM(I, 20, num_layers=3).plan(torch.randn(2, 2, I))
    assert plan.layers == 2 and "2, 1 layers" in plan.why
    monkeypatch.undo()
    x, bf16 = torch.randn(2, 2, I).bfloat16(), {"num_layers": 3, "dtype": torch.bfloat16}
    assert LSTM(I, 256, **bf16).plan(x).layers == 3
    for options in ({"bidirectional": True}, {"proj_size": 3}, {"recompute": True}):
        assert LSTM(I, 256, **bf16, **options).plan(x).layers == 1
    assert LSTM(I, 256, **bf16, bidirectional=True).plan(x).directions == 2


@pytest.mark.parametrize("slots,recurrences,groups,stacked,expected", [
    (8, 1, 20, False, (1, 8)),
    (8, 2, 4, False, (2, 4)),
    (8, 2, 20, False, (2, 4)),
    (3, 2, 3, False, (1, 3)),  # both directions, a group at a time: three launches; each alone: two
    (1, 2, 3, False, (1, 1)),
    (4, 4, 3, True, (4, 1)),
    (9, 4, 3, True, (4, 2)),
])  # fmt: skip
def test_how_many_are_resident_together(slots, recurrences, groups, stacked, expected):
    assert max_coresident(slots, recurrences, groups, stacked) == expected


def test_rows_are_dealt_by_their_lengths(monkeypatch):
    """A program ends with the longest of its rows: like lengths go together, and few steps are run."""
    plan = Plan("step", Tiles(2, 16, 16, 4), None, 0, "ieee", "")
    lengths = torch.tensor([1, 9, 1, 9])
    tensors = [torch.randn(size) for size in [(9, 4, 64), (64, 16), (4, 16), (4, 16)]]
    ran = []
    cell = forward.cell_forward

    def counted(*tiles):
        ran.append(1)
        return cell(*tiles)

    monkeypatch.setattr(forward, "cell_forward", counted)
    forward.forward(*tensors, plan=plan, layout=Layout(lengths))
    assert len(ran) == 9 + 1  # and not 9 + 9
