"""Numbers under stress: saturation, overflow, NaN, tiny values, long sequences, far addresses, equal bits."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from fused_lstm import LSTM, operators
from fused_lstm.kernels.backward import backward_kernel
from fused_lstm.kernels.forward import forward, forward_kernel
from fused_lstm.kernels.latency_backward import latency_backward_kernel
from fused_lstm.kernels.latency_forward import latency_forward_kernel
from fused_lstm.kernels.launch import specialization
from fused_lstm.kernels.layout import NO_STACK, LayoutTensors
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.sync import Sync
from fused_lstm.kernels.tiles import Tiles

from .parity import assert_close, assert_parity, run, twin

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOCAL = Plan("local", Tiles(16, 32, 32, 4, split=4), Tiles(16, 32, 32, 4, split=4), 0, "ieee", "")
STEP = Plan("step", Tiles(16, 16, 16, 4), Tiles(16, 16, 16, 4), 0, "ieee", "")
PLANS = {"local": LOCAL, "step": STEP}
H = 20  # less than LOCAL's tile; two programs of STEP


@pytest.fixture(params=PLANS)
def form(request, monkeypatch):
    """Every recurrence in one form, whatever its size."""
    plan = PLANS[request.param]
    monkeypatch.setattr(operators, "choose", lambda *_, **__: plan)
    return plan


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


# Saturation and overflow


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "c0"])
def test_saturated_gates(source, dtype, device):
    """Pre-activations (or cells) of +-1e4 beside ordinary ones: exp over- and underflows, and nothing else may."""
    module, x = LSTM(3, 4, dtype=dtype), torch.randn(4, 2, 3, dtype=dtype)
    states = {"h0": torch.randn(1, 2, 4, dtype=dtype), "c0": torch.randn(1, 2, 4, dtype=dtype)}
    tensor = (dict(module.named_parameters()) | states)[source].data
    tensor[torch.rand_like(tensor) < 0.3] *= 1e4 / tensor.abs().max()
    tensor.view(-1)[:2] = torch.tensor([1e4, -1e4])
    ours = assert_parity(module.to(device), x.to(device), tuple(s.to(device) for s in states.values()))
    assert all(value.isfinite().all() for value in ours.values())


def overflowing(module, x, scale):
    """y, hn, cn and all gradients, with cotangents of +-scale."""
    x = x.detach().requires_grad_()
    y, (hn, cn) = module(x)
    cotangents = [torch.randn(v.shape).sign().to(v) * scale for v in (y, hn, cn)]
    inputs = {"x": x} | dict(module.named_parameters())
    grads = torch.autograd.grad([y, hn, cn], list(inputs.values()), cotangents)
    results = {"y": y, "hn": hn, "cn": cn} | {f"d{k}": v for k, v in zip(inputs, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in results.items()}


@pytest.mark.parametrize("gates,scale", [(65504, 1), (65504, 6e4), (1, 6e4)])
def test_half_at_the_edge_of_overflow(gates, scale, device):
    """Gradients may overflow only where nn.LSTM's do; what both can represent obeys the rule."""
    module, x = LSTM(2, 4, dtype=torch.float16).to(device), torch.ones(3, 2, 2, dtype=torch.float16, device=device)
    x[..., 1] = torch.randn(3, 2)
    module.weight_ih_l0.data[::2, 0] = gates
    module.weight_ih_l0.data[1::4, 0] = -gates
    calls = (module, x), (twin(module), x), (twin(module, torch.float64), x.cpu().double())
    results = []
    for call in calls:
        torch.manual_seed(1)
        results.append(overflowing(*call, scale))
    for name, (ours, theirs, gold) in zip(results[0], zip(*(r.values() for r in results), strict=True), strict=True):
        finite = theirs.isfinite()
        assert ours[finite].isfinite().all(), f"{name} overflows where nn.LSTM's does not"
        assert_close(name, ours[finite], theirs[finite], gold[finite], torch.float16)


# NaN and infinity


def by_rows(results, batch_sizes):
    """Per-batch-row parts of the results; the rows of packed ones are given back to their sequences."""
    parts = {}
    for name in ("y", "hn", "cn", "dx", "dh0", "dc0"):
        value = results[name]
        if name in ("y", "dx") and batch_sizes is not None:
            value = nn.utils.rnn.pad_packed_sequence(nn.utils.rnn.PackedSequence(value, batch_sizes))[0]
        parts[name] = value
    return parts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_row_stays_alone(value, packed, form, device):
    T, B, bad = 3, 3, 1
    module, x = LSTM(5, H).to(device), torch.randn(T, B, 5)
    hx = tuple(torch.randn(1, B, H, device=device) for _ in range(2))

    def call(module, x):
        x = pack_padded_sequence(x, [3, 2, 2]) if packed else x
        return by_rows(run(module, x.to(device), hx), x.batch_sizes if packed else None)

    clean = call(module, x)
    x[1, bad, 0] = value
    ours, theirs = call(module, x), call(twin(module), x)
    others = torch.arange(B) != bad
    for name in ours:
        assert torch.equal(ours[name][:, others], clean[name][:, others]), f"{name} of the other rows"
        assert torch.equal(ours[name].isfinite(), theirs[name].isfinite()), f"{name} is not finite where nn.LSTM's is"
    assert not ours["y"][:, bad].equal(clean["y"][:, bad])


# Tiny values


def test_outputs_of_order_1e_6(device):
    module, x = LSTM(3, 4, num_layers=2, bias=False), torch.randn(4, 2, 3) * 1e-3
    for weight in module.parameters():
        weight.data *= 1e-2 if weight.shape[1] == 3 else 1.0
    ours = assert_parity(module.to(device), x.to(device))
    assert 1e-8 < ours["y"].abs().max() < 1e-5


def test_denormal_inputs():
    module, x = LSTM(3, 4, bias=False), torch.randn(4, 2, 3) * 1e-39
    ours = assert_parity(module, x)
    assert 0 < ours["y"].abs().max() < torch.finfo(torch.float32).tiny


# Long sequences


def test_a_forget_gate_near_one_is_rounded_to_nearest(device):
    """What remembers for long sums up every bias of f: with c0 = 1 and i = 0, the next cell is f itself."""
    H = 64
    module = LSTM(1, H, device=device)
    for weight in module.parameters():
        weight.data.zero_()
    bias = torch.linspace(3, 15, H, device=device)
    module.bias_ih_l0.data[:H], module.bias_ih_l0.data[H : 2 * H] = -200.0, bias
    hx = torch.zeros(1, 1, H, device=device), torch.ones(1, 1, H, device=device)
    _, (_, cn) = module(torch.zeros(1, 1, 1, device=device), hx)
    error = (cn.double() - bias.double().sigmoid()).abs().max()
    assert error < 0.55 * 2**-24  # half of the spacing below 1


@pytest.mark.parametrize("T", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_drift_over_a_long_sequence(T, device):
    """A cell that forgets over thousands of steps sums up its rounding: no more of it than nn.LSTM's."""
    module, x = LSTM(1, 2), torch.randn(T, 2, 1)
    module.bias_ih_l0.data[2:4] = torch.tensor([6.0, 9.0])  # forget gates of 0.998 and 0.9999
    with torch.no_grad():
        assert_parity(module.to(device), x.to(device), backward=False)


# Offsets past 2^31 elements


@pytest.fixture
def addresses(monkeypatch):
    """Records the addresses that a kernel loads from and stores to, and touches none of them but int64 indices."""
    seen = {"load": set(), "store": set()}
    load = interpreter_builder.create_masked_load

    def record(kind, pointers, mask):
        seen[kind].update(pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].ravel().tolist())

    def fake_load(pointers, mask, *args):
        if pointers.get_element_ty() == tl.int64:
            return load(pointers, mask, *args)
        record("load", pointers, mask)
        nothing = TensorHandle(np.zeros_like(mask.data), mask.dtype)
        return load(pointers, nothing, None, *args[1:])

    monkeypatch.setattr(interpreter_builder, "create_masked_load", fake_load)
    monkeypatch.setattr(
        interpreter_builder, "create_masked_store", lambda pointers, _, mask, *__: record("store", pointers, mask)
    )
    return seen


def elements(tensor, first, count):
    """The addresses of `count` elements from element `first` on."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    return set(range(begin + first * size, begin + (first + count) * size, size))


FAR = 2**31 // H + 1  # from this row on, an offset in a tensor of H columns needs more than 32 bits


def forward_parts(row, t, previous, following, end, mode, B):
    """What the forward kernel may load and store in step t, as (tensor, first element, count)."""
    names = ("input_gates", "weight_hh", "h0", "c0", "cn", "hn", "y", "c", "gates")
    tensors = {name: torch.empty(1) for name in names}
    steps, states = B * H, B * H
    h = ("y", row(previous) * H, steps) if mode == "step" else ("h0", 0, states)
    loads = [("input_gates", row(t) * 4 * H, 4 * steps), ("weight_hh", 0, 4 * H * H), h]
    loads += [("y", row(end) * H, steps)]
    loads += [("cn", 0, states)] if mode == "step" else [("input_gates", row(following) * 4 * H, 4 * steps)]
    stores = [("y", row(t) * H, steps), ("c", row(t) * H, steps), ("gates", row(t) * 4 * H, 4 * steps)]
    return tensors, loads, [*stores, ("cn", 0, states), ("hn", 0, states)]


def backward_parts(row, t, previous, before, following, mode, B):
    """What the backward kernel may load and store in step t, as (tensor, first element, count). before: the step before
    the previous one, None if that is the first."""
    names = ("dy", "dhn", "weight_hh", "c0", "c", "gates", "dcn", "dc0", "dgates")
    tensors = {name: torch.empty(1) for name in names}
    n, w = B * H, 4 * B * H
    loads = [("dy", row(t) * H, n), ("gates", row(t) * 4 * H, w), ("c", row(t) * H, n), ("c", row(previous) * H, n)]
    loads += [("weight_hh", 0, 4 * H * H)]
    if mode == "step":
        loads += [("dgates", row(following) * 4 * H, w), ("dc0", 0, n)]
    else:
        # Behind a first step, of which there is none in this launch, also its own; and what the next step takes.
        loads += [("dgates", row(t) * 4 * H, w), ("gates", row(previous) * 4 * H, w), ("dy", row(previous) * H, n)]
        loads += [("c0", 0, n) if before is None else ("c", row(before) * H, n)]
    return tensors, loads, [("dgates", row(t) * 4 * H, w), ("dc0", 0, n)]


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_addresses_past_2_31_elements(backward, mode, packed, reverse, addresses):
    """The last step but one in tensors too large to allocate: its addresses are the right ones, to the byte."""
    B = 3
    of_mode = {"step": (forward_kernel, backward_kernel), "local": (latency_forward_kernel, latency_backward_kernel)}
    kernel = of_mode[mode][backward]
    # Where a packed sequence's steps begin is read from a tensor: there three steps, far apart, suffice.
    T = 3 if packed else FAR // B + 4
    offsets = FAR + FAR * torch.arange(T) if packed else None
    lengths = torch.full((B,), T) if packed else None

    def row(t):
        return int(offsets[t]) if packed else t * B

    t, neighbours = T - 2, (T - 1, T - 3) if reverse else (T - 3, T - 1)
    assert min(row(s) for s in (t, *neighbours)) * H > 2**31
    if backward:
        previous, following = neighbours
        before = None if packed or reverse else previous - 1
        tensors, loads, stores = backward_parts(row, t, previous, before, following, mode, B)
    else:
        tensors, loads, stores = forward_parts(row, t, *neighbours, 0 if reverse else T - 1, mode, B)
    step = 1 if reverse != backward else t
    tiles = PLANS[mode].backward if backward else PLANS[mode].forward
    form = {"DIRECTIONS": 1, "REVERSE": reverse, "PAIRS": False}
    constants, options = specialization(PLANS[mode], tiles, H, H, **form)
    total_rows = FAR + FAR * T if packed else T * B
    sizes = {"T": T, "B": B, "total_rows": total_rows, "step_stride": B, "row_stride": 1}
    sizes |= {"first_recurrence": 0, "row_begin": 0, "step_begin": step, "step_end": step + 1}
    records = {"layout": LayoutTensors(lengths, offsets, None, None), "stack": NO_STACK, "sync": Sync(None, None, None)}
    arguments = dict.fromkeys(kernel.arg_names)  # None for what only the grid form takes
    arguments |= tensors | records | sizes
    arguments |= {name: value for name, value in constants.items() if name in arguments}
    kernel[(triton.cdiv(H, tiles.units), 1, 1)](**arguments, **options)
    for kind, parts in (("load", loads), ("store", stores)):
        expected = set().union(*(elements(tensors[name], first, count) for name, first, count in parts))
        assert addresses[kind] == expected, kind


# Equal bits


def test_a_row_does_not_depend_on_its_neighbours(form):
    """The kernels' part, bit for bit: a tile's arithmetic is the same whatever fills its other rows."""
    T, B = 3, 18
    shapes = [(T, B, 4 * H), (4 * H, H), (B, H), (B, H)]
    input_gates, weight_hh, h0, c0 = (torch.randn(shape) for shape in shapes)
    everything = forward(input_gates, weight_hh, h0, c0, plan=form)
    for rows in (slice(0, 1), slice(0, 5), slice(16, 18)):
        part = (input_gates[:, rows].contiguous(), weight_hh, h0[rows].contiguous(), c0[rows].contiguous())
        for ours, whole in zip(forward(*part, plan=form), everything, strict=True):
            assert torch.equal(ours, whole[..., rows, :])


def test_rows_agree_by_the_rule_in_batches_of_any_size():
    """The products around the kernels are torch's, whose order of summation may follow the number of rows."""
    module, x = LSTM(5, 8), torch.randn(3, 17, 5)
    whole = assert_parity(module, x, backward=False)["y"]
    for rows in (slice(3, 4), slice(2, 9)):
        alone = assert_parity(module, x[:, rows], backward=False)["y"]
        torch.testing.assert_close(alone, whole[:, rows], rtol=0, atol=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_call_gives_the_same_bits(packed, form, device):
    module = LSTM(5, H).to(device)
    x = pack_sequence([torch.randn(T, 5) for T in (3, 2)]) if packed else torch.randn(3, 2, 5)
    first, second = (run(module, x.to(device), None) for _ in range(2))
    assert_same(first, second)
