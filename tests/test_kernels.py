"""The kernels' link: every launcher, in every form, against reference.py."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from fused_lstm import reference
from fused_lstm.kernels.backward import backward
from fused_lstm.kernels.forward import forward
from fused_lstm.kernels.layout import Layout
from fused_lstm.kernels.plan import Plan, choose
from fused_lstm.kernels.tiles import Tiles

from . import recurrences
from .layouts import NAMES, layout_of
from .parity import assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def local(H):
    tiles = Tiles(batch=16, units=H, chunk=H, warps=4, split=4)
    return Plan("local", tiles, tiles, 0, "ieee", "")


# Tiles that divide neither B nor H of the cases below, and several programs in each direction.
STEP = Plan("step", Tiles(16, 16, 32, 4), Tiles(16, 16, 64, 4), 0, "ieee", "")


# Those of few rows, whose weight is in parts of 64 bytes; a launch of its own for each step.
FEW = Tiles(16, 16, 64, 4, split=4, poll=True)
LATENCY = replace(STEP, forward=FEW, backward=FEW)


# Those of large batches: a program has two row tiles in turn, and their cells in one part or in several.
IN_TURN = Tiles(16, 32, 32, 1, part=16)
THROUGHPUT = [
    replace(STEP, forward=IN_TURN, backward=replace(IN_TURN, units=16, kept=2)),
    replace(STEP, forward=replace(IN_TURN, units=64, kept=1, part=8), backward=replace(IN_TURN, part=4)),
]
IDS = ["flags", "polled", "in turn", "in parts"]


# Features in two programs, of which three have units.
PROJECTING = replace(STEP, forward=replace(STEP.forward, features=16), backward=replace(STEP.backward, features=16))


def tensors(shapes, dtype, device):
    return [torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype) for shape in shapes]


def check(plan, dtype, T, B, H, device, reverse=False, form="dense", out=None):
    """Both passes of one recurrence, by the rule, with the reference in `dtype` as the other side's error."""
    out = out or H
    layout, lead = layout_of(form, T, B, device)
    shapes = [
        (*lead, 4 * H),
        (4 * H, out),
        (B, out),
        *[(B, H)] * 2,
        (*lead, out),
        (B, out),
        (B, H),
        (*lead, H),
        (out, H),
    ]
    input_gates, weight_hh, h0, c0, c_reset, dy, dhn, dcn, dc_steps, weight_hr = tensors(shapes, dtype, device)
    weight_hh /= H**0.5
    weight_hr /= H**0.5
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"reverse": reverse, "layout": layout}
    resets = {} if layout.starts is None else {"c_reset": c_reset}
    projection = {} if out == H else {"weight_hr": weight_hr}
    # Every other form has no gradient of the cells of its own.
    steps = {} if form in ("packed", "lengths") else {"dc_steps": dc_steps}

    def run(function, plan, cast, *inputs, **more):
        arguments = {name: cast(value) for name, value in (resets | projection | more).items()}
        return function(*map(cast, inputs), **arguments, **options, **({"plan": plan} if plan else {}))

    def compare(names, ours, theirs, gold):
        for name, *results in zip(names, ours, theirs, gold, strict=True):
            if results[0] is not None:
                assert_close(name, results[0].to(dtype), *(v.cpu() for v in results[1:]), dtype)

    inputs = (input_gates, weight_hh, h0, c0)
    wide = {name: value.to(accumulator) for name, value in resets.items()}
    ours = forward(*inputs, plan=plan, **wide, **projection, **options)
    theirs = run(reference.forward, None, lambda v: v, *inputs)
    gold = run(reference.forward, None, torch.Tensor.double, *inputs)
    *_, c, gates = ours
    inside = ~layout.past(gates.shape)[..., 0] if layout.padded else slice(None)
    written, theirs, gold = ((*given[:4], given[4][inside]) for given in (ours, theirs, gold))
    compare(("y", "hn", "cn", "c", "gates"), written, theirs, gold)

    inputs = (dy, dhn, dcn, weight_hh, c0.to(accumulator), c, gates)
    ours = backward(*inputs, plan=plan, **wide, **projection, **steps, **options)
    theirs = run(reference.backward, None, lambda v: v.to(dtype), *inputs, **steps)
    gold = run(reference.backward, None, torch.Tensor.double, *inputs, **steps)
    compare(("dgates", "dc0", "dc_reset", "dh_steps"), ours, theirs, gold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_local(dtype, reverse, device):
    check(local(32), dtype, 4, 3, 20, device, reverse)


@pytest.mark.parametrize("form", ["dense", "reset"])
def test_local_in_eight_parts(form, device):
    tiles = Tiles(8, 32, 32, 8, split=8)
    check(Plan("local", tiles, tiles, 0, "ieee", ""), torch.float32, 4, 9, 20, device, True, form)


@pytest.mark.parametrize("plan", [STEP, LATENCY, *THROUGHPUT], ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_step_with_many_programs(plan, dtype, reverse, device):
    if dtype == torch.float64 and device == "cuda":
        plan = STEP  # no plan polls for float64, which torch's own LSTM has there
    check(plan, dtype, 3, 17, 36, device, reverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_projection(dtype, reverse, device):
    check(PROJECTING, dtype, 3, 17, 36, device, reverse, out=20)


@pytest.mark.parametrize("form", NAMES[1:])
def test_projection_of_every_layout(form, device):
    check(PROJECTING, torch.float32, 5, 5, 20, device, form=form, out=18)


@pytest.mark.parametrize("plan", [local(16), STEP, LATENCY, *THROUGHPUT], ids=["local", "step", *IDS[1:]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", NAMES[1:])
def test_layouts(plan, reverse, form, device):
    B = 35 if plan.forward.in_turn else 5
    check(plan, torch.float32, 5, B, 16 if plan.mode == "local" else 20, device, reverse, form)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("of", recurrences.KINDS)
def test_several_recurrences_in_a_launch(of, form):
    B = 17 if form == "lengths" else 5  # two batch groups of uneven rows
    recurrences.check(STEP, of, form, 3, B, 20)
    recurrences.check(LATENCY, of, form, 3, B, 20)
    if of == "directions":
        recurrences.check(THROUGHPUT[0], of, form, 3, 35, 20)
    if of == "directions":
        recurrences.check(local(16), of, form, 3, B, 7)


@pytest.mark.parametrize("form", ["lengths", "lengths and reset"])
def test_a_tile_ends_with_its_longest_row(form, device):
    check(local(16), torch.float32, 3, 33, 7, device, True, form)


def test_finished_rows_cost_nothing(monkeypatch):
    """A tile whose rows have all ended loads no more than if the sequence ended there."""
    loads, load = [], interpreter_builder.create_masked_load
    monkeypatch.setattr(interpreter_builder, "create_masked_load", lambda *args: loads.append(1) or load(*args))

    def count(T):
        loads.clear()
        inputs = tensors([(T, 2, 16), (16, 4), (2, 4), (2, 4)], torch.float32, "cpu")
        forward(*inputs, plan=local(16), layout=Layout(torch.tensor([1, 2])))
        return len(loads)

    assert count(50) == count(2) > 0


@pytest.mark.parametrize("T,B,H", [(1, 1, 1), (1, 17, 3), (9, 1, 16)])
def test_awkward_shapes(T, B, H, device):
    check(local(16), torch.float32, T, B, H, device)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [130, 256, 512, 650, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["dense", "lengths and reset"])
def test_grid(dtype, H, form):
    """The cooperative form; its CPU twins are test_step_with_many_programs and the compiled plans."""
    plan = choose(dtype, 33, H, torch.device("cuda"), ieee=True)
    assert plan.mode in ("grid", "step")
    check(plan, dtype, 20, 33, H, "cuda", form=form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "lengths and reset"])
def test_projection_of_many_units(form):
    """Its CPU twin: test_projection."""
    plan = choose(torch.bfloat16, 33, 2048, torch.device("cuda"), ieee=False, proj=256)
    assert plan.forward.features and plan.backward.features
    check(plan, torch.bfloat16, 20, 33, 2048, "cuda", form=form, out=256)


def test_nothing_is_saved_on_request():
    input_gates, weight_hh, h0, c0 = tensors([(2, 3, 32), (32, 8), (3, 8), (3, 8)], torch.float32, "cpu")
    kept = forward(input_gates, weight_hh, h0, c0, plan=local(16))
    *ends, c, gates = forward(input_gates, weight_hh, h0, c0, plan=local(16), save=False)
    assert c is None and gates is None
    assert all(map(torch.equal, ends, kept))


def test_inputs_are_left_alone():
    inputs = tensors([(2, 3, 32), (32, 8), (3, 8), (3, 8)], torch.float32, "cpu")
    copies = [v.clone() for v in inputs]
    forward(*inputs, plan=local(16))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
