"""The kernels of any cell: both launchers, in every form, against cells/reference.py, which evaluates a cell's graph in
torch operations; and the grid form under schedules."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lstm import Recurrent, cell, cells
from fused_lstm.cells import operators, reference
from fused_lstm.cells.compiled import compiled
from fused_lstm.kernels import plan_of_cell, recurrent_latency_backward, recurrent_latency_forward
from fused_lstm.kernels import recurrent_backward as backward_module
from fused_lstm.kernels import recurrent_forward as forward_module
from fused_lstm.kernels.choice import kind_of
from fused_lstm.kernels.findings import Refused
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.tiles import Problem, Tiles
from fused_lstm.sequence import Sequence

from .explorer import SCHEDULES, Broken, explore
from .layouts import NAMES, layout_of
from .parity import WIDEST, assert_close


@cell(gates="abcde", state="u v", params="w")
def five_gates(x, r, s, p):
    """More gates than four, two states, a vector; one gate is apart, one is not used by all, h of before is taken."""
    u = torch.tanh(x.a + r.a) * s.u + torch.sigmoid(x.b + r.b) * s.h
    v = 0.5 * s.v + torch.exp(-torch.abs(x.c + torch.sigmoid(x.d + r.d) * r.c)) * p.w
    return torch.sigmoid(x.e + r.e) * torch.tanh(u + v), u, v


CELLS = {made.__name__: made for made in (cells.gru, cells.slstm, cells.vanilla, cells.rnn_tanh, five_gates)}
# Tiles that divide neither B nor H of the cases below, and several programs; what has no room is loaded at every step.
STEP = Plan("step", Tiles(16, 16, 32, 4), Tiles(16, 16, 16, 4), 0, "ieee", "")
GRID = Plan("grid", Tiles(2, 2, 8, 4), Tiles(2, 2, 8, 4), resident=6, precision="ieee", why="")
STREAMING = replace(GRID, forward=Tiles(2, 2, 2, 4, kept=1), backward=Tiles(2, 2, 2, 4, kept=3))
FEW = Tiles(2, 2, 16, 2, split=2, poll=True)
POLLING = replace(GRID, forward=FEW, backward=FEW)


def local(made, H, dtype=torch.float32):
    """The local form's first tiles."""
    forward, backward = (
        next(plan_of_cell.local(Problem(kind_of(dtype, True), H, back), len(made.gates))) for back in (False, True)
    )
    return replace(STEP, mode="local", forward=forward, backward=backward)


def inputs_of(cell, T, B, H, D, form, dtype, seed=0, device="cpu"):
    """What both launchers take, by name, with cotangents."""
    layout, lead = layout_of(form, T, B, device)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, of=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=of)

    acc = torch.float64 if dtype == torch.float64 else torch.float32
    G, n = len(cell.gates), len(cell.S._fields)

    def states(*shape):
        # A normaliser is above zero.
        return tuple(randn(*shape, of=acc if k else dtype).abs() + 0.5 for k in range(n))

    if D == 2 and layout.offsets is None:
        both = [sequence.layout.starts for sequence in Sequence.padded(layout, False, T).per_direction(2)]
        layout = layout if layout.starts is None else layout._replace(starts=torch.stack(both))
    bias = randn(D, G * H) if cell.graph.apart else None
    forward = randn(*lead, D * G * H), randn(D, G * H, H) / H**0.5, bias
    resets = None if layout.starts is None else states(D, B, H)
    rest = tuple(randn(D, H) for _ in cell.params), states(D, B, H)
    cotangents = tuple(randn(*lead, D * H, of=acc if k else dtype) for k in range(n)), states(D, B, H)
    return forward, rest, {"layout": layout, "resets": resets}, cotangents


def both_passes(cell, plan, forward, rest, options, cotangents, modules=(forward_module, backward_module)):
    """All that the launchers return."""
    made, (x, weight_hh, bias) = compiled(cell), forward
    vectors, initial = rest
    steps, ends, kept = modules[0].recurrent_forward(made, x, weight_hh, bias, vectors, initial, plan=plan, **options)
    args = *cotangents, weight_hh, vectors, initial, steps, kept
    return (steps, ends, kept), modules[1].recurrent_backward(made, *args, plan=plan, **options)


def by_reference(cell, forward, rest, options, cotangents, saved=None):
    """The same of reference.py; saved: what backward takes of forward."""
    x, weight_hh, bias = forward
    vectors, initial = map(list, rest)
    options = options | {"resets": options["resets"] and list(options["resets"])}
    found = reference.forward(cell, x, weight_hh, bias, vectors, initial, **options)
    steps, _, kept = saved or found
    of_steps = *map(list, cotangents), weight_hh, vectors, initial, list(steps), kept
    return found, reference.backward(cell, *of_steps, **options)


def flat(results):
    """The tensors in nested results, with what they are called."""
    names = ("steps", "ends", "kept"), ("dr", "dx", "dinitial", "dresets", "dvectors")
    for of, values in zip(names, results, strict=True):
        for name, value in zip(of, values, strict=True):
            several = value if isinstance(value, list | tuple) else [value]
            yield from ((f"{name} {k}", tensor) for k, tensor in enumerate(several) if tensor is not None)


def wide(values):
    """Nested tensors in float64."""
    if isinstance(values, torch.Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: wide(value) for name, value in values.items()}
    if isinstance(values, tuple) and not hasattr(values, "_fields"):
        return tuple(map(wide, values))
    return values


def check(cell, plan, T, B, H, D=1, form="dense", dtype=torch.float64, device="cpu"):
    """Both launchers, by the rule, with the reference in `dtype` as the other side's error."""
    inputs = inputs_of(cell, T, B, H, D, form, dtype, device=device)
    ours = both_passes(cell, plan, *inputs)
    theirs, gold = by_reference(cell, *inputs, ours[0]), by_reference(cell, *wide(inputs), wide(ours[0]))
    layout = inputs[2]["layout"]
    compared = 0
    for (name, own), (_, other), (_, exact) in zip(*map(flat, (ours, theirs, gold)), strict=True):
        if name == "kept 0" and layout.padded:  # past a row's end it is as the memory was
            inside = ~layout.past(own.shape)[..., 0]
            own, other, exact = own[inside], other[inside], exact[inside]
        assert_close(name, own.to(dtype), other.cpu(), exact.cpu().double(), dtype)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", ["step", "local"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["widest", "float32", "bfloat16"])
def test_forms(name, form, dtype, device):
    plan = STEP if form == "step" else local(CELLS[name], 20)
    check(CELLS[name], plan, 3, 17, 20, dtype=dtype or WIDEST[device], device=device)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", ["slstm", "five_gates"])
def test_layouts(name, form, device):
    made = CELLS[name]
    check(made, local(made, 18) if name == "slstm" else STEP, 4, 5, 18, 2, form, WIDEST[device], device)


@pytest.mark.parametrize("H", [1, 100, 130])
def test_sizes(H, device):
    check(cells.gru, STEP, 2, 3, H, dtype=WIDEST[device], device=device)
    check(cells.gru, local(cells.gru, H) if H == 1 else STEP, 1, 1, H, dtype=WIDEST[device], device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "lengths and reset", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CELLS)
def test_grid_on_a_device(name, dtype, form):
    """Of which schedules are the twin."""
    made, H = CELLS[name], 136
    tiles = []
    for back in (False, True):
        problem = Problem(kind_of(dtype, True), H, back, 2)
        polled = next(plan_of_cell.polled(problem, len(made.gates)))
        tiles.append((polled, next(plan_of_cell.behind_flags("grid", problem, compiled(made)))))
    for forward, backward in zip(*tiles, strict=True):
        precision = "ieee" if dtype == torch.bfloat16 else "tf32x3"
        plan = Plan("grid", forward, backward, 64, precision, "", 2)
        check(made, plan, 5, 17, H, 2, form, dtype, "cuda")


def run(schedule, seed, made, plan=GRID, form="dense", D=1, strict=False, modules=(forward_module, backward_module)):
    """Both passes in the grid form under a schedule, exact to rounding."""
    inputs = inputs_of(made, 3, 3, 4, D, form, torch.float64, seed)
    with explore(schedule, seed, strict):
        ours = both_passes(made, plan, *inputs, modules)
    for (name, own), (_, other) in zip(flat(ours), flat(by_reference(made, *inputs, ours[0])), strict=True):
        if not (name == "kept 0" and inputs[2]["layout"].padded):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    run(schedule, 0, cells.gru, strict=True)
    run(schedule, 1, cells.gru, STREAMING, "packed", 2)
    run(schedule, 2, cells.slstm, STREAMING)
    run(schedule, 3, cells.slstm, GRID, "lengths", 2)
    run(schedule, 4, cells.gru, POLLING, strict=True)
    run(schedule, 5, five_gates, POLLING, "lengths and reset", 2)
    run(schedule, 6, cells.slstm, POLLING, "packed", 2)


@cell(gates="a")
def chosen(x, r, s, p):
    """It hands on numbers without arithmetic, which would give another NaN."""
    return torch.where(r.a > 0, r.a, x.a)


@pytest.mark.parametrize("form", ["lengths", "reset"])
def test_a_nan_that_looks_as_if_nothing_had_come_is_taken_for_one(form):
    nothing = torch.tensor(-1).view(torch.float64)
    inputs = inputs_of(chosen, 3, 3, 4, 2, form, torch.float64)
    (x, *_), (_, (h0,)), options, ((dy,), _) = inputs
    x[:, 0, ::2] = nothing
    for tensor in (h0 if form == "lengths" else options["resets"][0], dy):
        tensor[..., ::2] = nothing
    with explore("uniform"):
        ours = both_passes(chosen, POLLING, *inputs)
    for (name, own), (_, other) in zip(flat(ours), flat(by_reference(chosen, *inputs, ours[0])), strict=True):
        if name != "kept 0":
            torch.testing.assert_close(own, other, rtol=0, atol=1e-11, equal_nan=True)


def planted(module, old, new, folder):
    """A module of the kernels with a fault in its text, from a file in a folder."""
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1
    name = f"{module.__name__}_planted"
    file = folder / "planted.py"
    file.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
def test_a_wait_that_is_skipped_is_found(which, tmp_path):
    modules = [forward_module, backward_module]
    wait = "wait_if(step > 0, step_flags, step, sync.timeout_info, MAX_SPINS, 1)"
    modules[which] = planted(modules[which], wait, wait.replace("step > 0", "step > 1"), tmp_path)
    with pytest.raises(Broken):
        for seed in range(3):
            run("uniform", seed, cells.gru, modules=modules)


FAULTS_OF_POLLING = {
    "forward": {
        "not awaited": ('sync, FORM, "await"', 'sync, FORM, "load"'),
        "h of a row that begins late": ("tl.where(going_on, h_rows, initial_rows)", "h_rows"),
        "h of a reset row": ("tl.where(after.start, reset_rows, h_rows)", "h_rows"),
        "the states of a reset row": ("select_each(at.start[:, None], reset_to, states)", "states"),
        "the initial h of a reset row": (
            "tl.where(at.start[None, None, :],",
            "tl.where(at.start[None, None, :] & False,",
        ),
    },
    "backward": {
        "not awaited": ('sync, FORM, "await"', 'sync, FORM, "load"'),
        "dr across a reset or an end": ("fetch(of_next, next_mask,", "fetch(of_next, None,"),
        "the gradient of a row's end": ("mask=active & ~after.mask[:, None]", "mask=active & False"),
    },
}
MODULES = {"forward": recurrent_latency_forward, "backward": recurrent_latency_backward}


@pytest.mark.parametrize(
    ("which", "fault"), [(which, fault) for which, of in FAULTS_OF_POLLING.items() for fault in of]
)
def test_a_planted_fault_in_polling_is_found(which, fault, tmp_path, monkeypatch):
    module = MODULES[which]
    kernel = f"{module.__name__.rpartition('.')[2]}_kernel"
    made = planted(module, *FAULTS_OF_POLLING[which][fault], tmp_path)
    monkeypatch.setattr((forward_module, backward_module)[which == "backward"], kernel, getattr(made, kernel))
    with pytest.raises((AssertionError, Broken)):
        for seed in range(3):
            run("uniform", seed, five_gates, POLLING, "lengths and reset", 2)


@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("count", [1, 100], ids=["the first", "all"])
def test_what_a_device_refuses_makes_way_for_the_next(which, count, monkeypatch):
    """Of the candidates in turn, or of all, after which the operators run torch operations; the numbers stay right."""
    launcher, refused = ("recurrent_forward", "recurrent_backward")[which], []

    def refusing(*args, plan, **options):
        if len(refused) < count:
            refused.append(plan)
            raise Refused("planted", lasts=True)
        return original(*args, plan=plan, **options)

    original = getattr(operators, launcher)
    monkeypatch.setattr(operators, launcher, refusing)
    monkeypatch.setattr(plan_of_cell, "_refused", {})
    plan_of_cell.choose_for.cache_clear()
    torch.manual_seed(0)
    layer, x = Recurrent(cells.gru, 3, 20, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)
    theirs = torch.nn.GRU(3, 20, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    before = layer.plan(x)
    for module in (layer, theirs):
        module(x)[0].square().sum().backward()
    for (name, own), other in zip(layer.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-12, msg=name)
    after = layer.plan(x)
    assert len(refused) == len(after.refused) and "planted" in str(after)
    assert after != before and (after.mode == "composed") == (count == 100)
    plan_of_cell.choose_for.cache_clear()
