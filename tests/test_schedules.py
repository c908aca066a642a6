"""The grid form under every kind of schedule: exact, free of races, never stuck; and planted faults are found."""

import importlib.util
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from fused_lstm import reference
from fused_lstm.kernels import backward as backward_module
from fused_lstm.kernels import forward as forward_module
from fused_lstm.kernels import latency_backward, latency_forward, launch, throughput_backward, throughput_forward
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.tiles import Tiles

from . import recurrences
from .explorer import SCHEDULES, Broken, explore
from .layouts import NAMES, layout_of

T = 3
# B and H: 3 programs in one batch group; 2 in each of 2 groups, the second not full.
ONE_GROUP, TWO_GROUPS = (2, 6), (3, 4)
PLAN = Plan("grid", Tiles(2, 2, 8, 4), Tiles(2, 2, 8, 4), resident=6, precision="ieee", why="")

# Forward has two or three chunks of W_hh, backward four times as many; the last of them are loaded at every step.
STREAMING = replace(PLAN, forward=Tiles(2, 2, 2, 4, kept=1), backward=Tiles(2, 2, 2, 4, kept=5))
# A team of four, some of whom have no units of their own; and two teams.
TEAM = replace(PLAN, backward=Tiles(2, 2, 8, 4, team=4))
TEAMS = replace(PLAN, backward=Tiles(2, 1, 2, 4, kept=1, team=4))
# h and dgates are polled; in the second the parts of a team are, too, which are float32.
POLLING = replace(PLAN, forward=Tiles(2, 2, 16, 2, split=2, poll=True), backward=Tiles(2, 2, 16, 2, split=2, poll=True))
POLLING_TEAM = replace(POLLING, backward=Tiles(2, 1, 64, 4, team=4, split=4, poll=True))
# Two programs of a group; of its three or two row tiles the first group has every other one.
SEVERAL_TILES = (40, 12)
IN_TURN = replace(PLAN, resident=4, forward=Tiles(16, 8, 8, 4, part=8), backward=Tiles(32, 8, 4, 4, kept=1, part=16))
PLANS = [PLAN, STREAMING, TEAM, TEAMS, POLLING, IN_TURN, POLLING_TEAM]


def run(
    schedule,
    seed,
    strict=False,
    *,
    sizes=TWO_GROUPS,
    plan=PLAN,
    reverse=False,
    form="dense",
    memory=True,
    forward=forward_module,
    backward=backward_module,
):
    """Both passes under a schedule, against the reference, in float64 and exact to rounding."""
    B, H = sizes
    dtype, tolerance = (torch.float32, 1e-5) if plan == POLLING_TEAM else (torch.float64, 1e-13)
    layout, lead = layout_of(form, T, B)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*lead, 4 * H), (4 * H, H), *[(B, H)] * 3, (*lead, H), *[(B, H)] * 2]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    input_gates, weight_hh, h0, c0, c_reset, *cotangents = tensors
    options = {"reverse": reverse, "layout": layout, "c_reset": None if layout.starts is None else c_reset}
    with explore(schedule, seed, strict, memory) as explorer:
        ours = forward.forward(input_gates, weight_hh, h0, c0, plan=plan, **options)
        saved = (weight_hh, c0, *ours[3:])
        ours = (*ours[:4], *backward.backward(*cotangents, *saved, plan=plan, **options))
    theirs = reference.forward(input_gates, weight_hh, h0, c0, **options)[:4]
    theirs += reference.backward(*cotangents, *saved, **options)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    return explorer.switches


def run_recurrences(schedule, seed, strict=False, of="layers", *, sizes=(2, 4), plan=PLAN, form="dense", **modules):
    """run() for a launch of two directions, or of three layers."""
    B, H = sizes

    def within(both):
        with explore(schedule, seed, strict):
            return both()

    recurrences.check(replace(plan, resident=64), of, form, T, B, H, seed, within=within, **modules)


def sweep(first, count):
    """`count` runs, each under another seed, going round the schedules and the forms of input; every eighth of them
    of several recurrences, and so of more programs."""
    names = list(SCHEDULES)
    for seed in range(first, first + count):
        form = seed // len(names)
        if seed % 8 == 7:
            of, plan = recurrences.KINDS[seed // 8 % len(recurrences.KINDS)], PLANS[seed // 24 % len(PLANS[:-2])]
            run_recurrences(names[seed % len(names)], seed, form % 6 == 0, of, plan=plan, form=NAMES[form % len(NAMES)])
            continue
        sizes = TWO_GROUPS if form % 2 else ONE_GROUP
        options = {"sizes": sizes, "reverse": form % 4 > 1, "form": NAMES[form % len(NAMES)]}
        options["plan"] = PLANS[form % len(PLANS)]
        if options["plan"] == IN_TURN:
            options["sizes"] = SEVERAL_TILES
        run(names[seed % len(names)], seed, form % 6 == 0, **options)


# In slices, so that workers share them.
@pytest.mark.parametrize("part", range(8))
def test_many_schedules(part):
    sweep(part * 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(50))
def test_ten_thousand_schedules(part):
    sweep(1_000 + part * 200, 200)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batch_groups_that_do_not_fit_together_follow_in_further_launches(schedule):
    run(schedule, 0, plan=replace(PLAN, resident=2))


def test_a_seed_repeats_its_schedule():
    assert run("uniform", 5) == run("uniform", 5)


def faulty(module, old, new):
    """A kernel's text with a fault planted in it, or in one of the files from which it takes functions."""
    source = Path(module.__file__).read_text()
    for name in ("", "sync", "matmul", "operands", "polling", "team", "row_tiles"):
        text = Path(module.__file__).with_name(f"{name}.py").read_text() if name else source
        if old in text:
            break
    assert text.count(old) == 1
    text = text.replace(old, new)
    if not name:
        return text
    source = re.sub(rf"from \.{name} import .*\n", "", source)
    body = text.partition('"""\n\n')[2]
    return source.replace("@triton.jit", f"{body}\n\n@triton.jit", 1)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    def load(module, old, new):
        name = f"{module.__name__}_with_a_fault"
        path = tmp_path / f"{name}.py"
        path.write_text(faulty(module, old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


MODULES = {"forward": forward_module, "backward": backward_module}
PUBLISH = "publish(step_flags + step)"
WAIT = "wait_if(step > 0, step_flags, step, "
WRITERS = "flags + step - BACK, tl.num_programs(0)"
# What stands there, and what is put in its place.
FAULTS = {
    "a publish is missing": (PUBLISH, f"if step < {T - 2}:\n                    {PUBLISH}", "deadlock"),
    "the target is off by one": (WRITERS, f"{WRITERS} - 1", "nobody has written|race"),
    "the target is out of reach": (WRITERS, f"{WRITERS} + 1", "deadlock"),
    "the flag of the step before": (WAIT, WAIT.replace(" step, ", " step - (step > 1), "), "deadlock|written|race"),
    "another group's flag": (
        WAIT,
        WAIT.replace(" step, ", " step + (1 - 2 * tl.program_id(1)) * T, "),
        "nobody has written|race",
    ),
    "no wait at all": (WAIT, WAIT.replace("> 0", "< 0"), "nobody has written|race"),
    "a relaxed publish": ('1, sem="release"', '1, sem="relaxed"', "race"),
    "no acquire": ('0, sem="acquire"', '0, sem="relaxed"', "race"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_planted_fault_is_found(plant, which, fault):
    *texts, found = FAULTS[fault]
    module = plant(MODULES[which], *texts)
    with pytest.raises(Broken, match=found):
        for seed, schedule in enumerate(SCHEDULES):
            run(schedule, seed, **{which: module})


FAULTS_OF_A_TEAM = {
    "the target of the step before": ("TEAM * (step + 1)", "TEAM * step"),
    "the target is short of one": ("TEAM * (step + 1)", "TEAM * (step + 1) - 1"),
    "another team's flag": ("wait(flag, TEAM", "wait(flag + 1 - 2 * (tl.program_id(0) // TEAM), TEAM"),
    "the step's dgates counted in before the products are read": (
        "dh = sum_behind_flag(",
        f"{PUBLISH}\n                dh = sum_behind_flag(",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_OF_A_TEAM)
def test_planted_fault_in_a_team_is_found(plant, fault):
    module = plant(backward_module, *FAULTS_OF_A_TEAM[fault])
    with pytest.raises(Broken, match=r"nobody has written|race|overwrote|deadlock"):
        for seed, schedule in enumerate(SCHEDULES):
            run(schedule, seed, plan=TEAMS, sizes=ONE_GROUP, backward=module)


LOOKED_AT = "(x.to(WORD, bitcast=True) == -1)"
# Where what is not there yet is taken for data, the result shows it, or it spreads and is waited for by all.
FAULTS_OF_POLLING = {
    "only the first of each part is looked at": (LOOKED_AT, f"({LOOKED_AT} & (tl.arange(0, PART) == 0))"),
    "only the last row is looked at": (LOOKED_AT, f"({LOOKED_AT} & (tl.arange(0, M) == M - 1)[None, :, None])"),
    "one element is taken for all": ("missing += tl.max(tl.reshape(", "missing += tl.min(tl.reshape("),
}
POLLS = {
    "forward": (forward_module, latency_forward, "latency_forward_kernel"),
    "backward": (backward_module, latency_backward, "latency_backward_kernel"),
}
TURNS = {
    "forward": (forward_module, throughput_forward, "throughput_forward_kernel"),
    "backward": (backward_module, throughput_backward, "throughput_backward_kernel"),
}


@pytest.fixture
def plant_where(plant, monkeypatch):
    def load(of, old, new):
        module, of_kernel, kernel = of
        monkeypatch.setattr(module, kernel, getattr(plant(of_kernel, old, new), kernel))

    return load


@pytest.mark.parametrize("fault", FAULTS_OF_POLLING)
@pytest.mark.parametrize("which", POLLS)
def test_planted_fault_in_polling_is_found(plant_where, which, fault):
    plant_where(POLLS[which], *FAULTS_OF_POLLING[fault])
    with pytest.raises((AssertionError, Broken), match=r"not close|deadlock"):
        for seed, schedule in product((9, 3, 1, 0), ("uniform", "starve_one", "priorities")):
            run(schedule, seed, True, plan=POLLING, sizes=ONE_GROUP)


FAULTS_OF_A_POLLING_TEAM = {
    "any part will do": ("absent = (word >> 32) != tag", "absent = (word >> 32) != (word >> 32)"),
    "a part of two steps before": ("absent = (word >> 32) != tag", "absent = (word >> 32) < tag - 2"),
    "one set of parts": ("products + step % 2 * part", "products + 0 * part"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_A_POLLING_TEAM)
def test_planted_fault_in_a_polling_team_is_found(plant_where, fault):
    plant_where(POLLS["backward"], *FAULTS_OF_A_POLLING_TEAM[fault])
    with pytest.raises((AssertionError, Broken), match=r"not close|deadlock"):
        for seed, schedule in product(range(4), SCHEDULES):
            run(schedule, seed, True, plan=POLLING_TEAM, sizes=ONE_GROUP, form="reset")


WAIT_IN_TURN = "wait_if(step > 0, flags + tile * steps, step, "
PUBLISH_IN_TURN = "publish(flags + tile * steps + step)"
FAULTS_IN_TURN = {
    "a tile's wait is skipped": (WAIT_IN_TURN, WAIT_IN_TURN.replace("step > 0", "(step > 0) & (tile < 1)")),
    "the flag of the tile before": (WAIT_IN_TURN, WAIT_IN_TURN.replace("tile *", "tl.maximum(tile - 1, 0) *")),
    "the flag of the step before": (WAIT_IN_TURN, WAIT_IN_TURN.replace(" step, ", " step - (step > 1), ")),
    "a tile is counted in only at its first step": (PUBLISH_IN_TURN, PUBLISH_IN_TURN.replace("step)", "0)")),
    "a tile is left out of its turn": ("in range(tl.program_id(1), running", "in range(tl.program_id(1), running - 1"),
    "the tile of another group": ("in range(tl.program_id(1), running", "in range(0, running"),
}


@pytest.mark.parametrize("fault", FAULTS_IN_TURN)
@pytest.mark.parametrize("which", TURNS)
def test_planted_fault_of_tiles_in_turn_is_found(plant_where, which, fault):
    plant_where(TURNS[which], *FAULTS_IN_TURN[fault])
    with pytest.raises((AssertionError, Broken), match=r"nobody has written|race|deadlock|overwrote|not close"):
        for seed, schedule in enumerate(SCHEDULES):
            run(schedule, seed, plan=IN_TURN, sizes=SEVERAL_TILES)


def test_tiles_counted_in_before_their_last_part(plant_where):
    of_part = "                part = next"
    plant_where(
        TURNS["backward"], of_part, f"                if k == 1:\n                    {PUBLISH_IN_TURN}\n{of_part}"
    )
    with pytest.raises(Broken, match=r"nobody has written|race"):
        for seed, schedule in enumerate(SCHEDULES):
            run(schedule, seed, plan=IN_TURN, sizes=SEVERAL_TILES)


def test_buffer_reused_a_turn_too_early(plant_where):
    """h of a tile goes where h of its last step lies, which slower programs of the group have not read yet."""
    plant_where(
        TURNS["forward"], "tl.store(y + part.hidden,", "tl.store(y + part.hidden - tl.where(step > 1, B * H, 0),"
    )
    with pytest.raises(Broken, match=r"overwrote|race"):
        run("uniform", 0, plan=IN_TURN, sizes=SEVERAL_TILES)


def test_nan_is_data():
    """What is not there yet is a NaN as well, but another."""
    B, H = ONE_GROUP
    tensors = [torch.randn(shape) for shape in [(T, B, 4 * H), (4 * H, H), (B, H), (B, H)]]
    tensors[0][1, 0] = torch.nan
    with explore("uniform", 0):
        y, _, _, c, gates = forward_module.forward(*tensors, plan=POLLING)
        assert y[1:, 0].isnan().all() and not y[:, 1].isnan().any() and not y[0].isnan().any()
        given = torch.randn(T, B, H), *torch.randn(2, B, H), *tensors[1::2]
        dgates, _, _, _ = backward_module.backward(*given, c, gates, plan=POLLING)
    assert dgates[:, 0].isnan().any() and not dgates[:, 1].isnan().any()


STORE = "tl.store(y + hidden if OUT == H else unprojected + state, h, mask=active)\n"
WAIT_BELOW = "wait_if(above, flags_below, step, "
WAIT_ABOVE = "wait_if(depth > 0, flags_above, step, "
# By the pass, what there are several of, and the fault.
FAULTS_OF_RECURRENCES = {
    "a layer a step ahead": ("forward", "layers", WAIT_BELOW, "wait_if(above, flags_below, tl.maximum(step - 1, 0), "),
    "a layer a step ahead, backward": (
        "backward",
        "layers",
        WAIT_ABOVE,
        "wait_if(depth > 0, flags_above, tl.maximum(step - 1, 0), ",
    ),
    "no wait for the layer below": ("forward", "layers", WAIT_BELOW, "wait_if(below > recurrence, flags_below, step, "),
    "no wait for the layer above": ("backward", "layers", WAIT_ABOVE, "wait_if(depth > 9, flags_above, step, "),
    "own flags for those of the layer below": ("forward", "layers", WAIT_BELOW, "wait_if(above, step_flags, step, "),
    "the lowest layer's flags": ("backward", "layers", WAIT_ABOVE, "wait_if(depth > 0, sync.flags + group * 0, step, "),
    "a wrong direction's counter": (
        "forward",
        "directions",
        WAIT,
        WAIT.replace("step_flags", "sync.flags + (1 - recurrence) * T"),
    ),
    "a wrong direction's counter, backward": (
        "backward",
        "directions",
        WAIT,
        WAIT.replace("step_flags", "sync.flags + (1 - group) * T"),
    ),
    "counted in before dropout's part is written": (
        "forward",
        "layers with dropout",
        STORE,
        f"{STORE}            {PUBLISH}\n",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_OF_RECURRENCES)
def test_planted_fault_between_recurrences_is_found(plant, fault):
    which, of, old, new = FAULTS_OF_RECURRENCES[fault]
    module = plant(MODULES[which], old, new)
    with pytest.raises(Broken, match=r"nobody has written|race|deadlock"):
        for seed, schedule in enumerate(SCHEDULES):
            run_recurrences(schedule, seed, of=of, **{which: module})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_directions_that_do_not_fit_together_follow_in_further_launches(schedule):
    def within(both):
        with explore(schedule):
            return both()

    recurrences.check(replace(PLAN, resident=2), "directions", "lengths", T, 3, 4, within=within)
    for resident in (2, 8):
        plan = replace(IN_TURN, resident=resident)
        recurrences.check(plan, "directions", "lengths", T, *SEVERAL_TILES, within=within)


def test_flag_published_before_the_data(plant):
    source = Path(forward_module.__file__).read_text()
    publish = f"{PUBLISH}\n"
    both = source[source.index(STORE) : source.index(publish) + len(publish)]
    module = plant(forward_module, both, f"pass\n{both.removeprefix(STORE)}            {STORE}")
    with pytest.raises(Broken, match=r"nobody has written|race"):
        run("uniform", 0, forward=module)


def test_buffer_reused_a_step_too_early(plant):
    """h of step t goes where h of step t-1 lies, which slower programs of the group have not read yet."""
    module = plant(
        forward_module,
        "hidden = at.rows[None, :] * H",
        "hidden = tl.where(step > 1, before.rows, at.rows)[None, :] * H",
    )
    with pytest.raises(Broken, match=r"overwrote|race"):
        run("uniform", 0, forward=module)


def test_flags_left_from_an_earlier_launch(monkeypatch):
    monkeypatch.setattr(torch, "zeros", torch.ones)
    with pytest.raises(Broken, match="not zero at launch"):
        run("uniform", 0)


def test_a_failure_names_the_seed_that_repeats_it(plant):
    module = plant(forward_module, *FAULTS["no wait at all"][:2])
    with pytest.raises(Broken, match=r"schedule='uniform', seed=3, strict=False"):
        run("uniform", 3, forward=module)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_debug_mode_reports_who_waits_in_vain(plant, which, monkeypatch):
    module = plant(MODULES[which], *FAULTS["a publish is missing"][:2])
    monkeypatch.setattr(launch, "MAX_SPINS", 50)
    with pytest.raises(RuntimeError, match=r"program \d of batch group [01] waited in vain for step 1 of the others"):
        run("uniform", 0, memory=False, **{which: module})


@pytest.mark.parametrize("which,stored", [("forward", "y + hidden, h, mask="), ("backward", "dgates_t, ")])
def test_debug_mode_reports_who_polls_in_vain(plant_where, which, stored, monkeypatch):
    plant_where(POLLS[which], f"{stored}active", f"{stored}active & (step < {T - 2})")
    monkeypatch.setattr(launch, "MAX_SPINS", 50)
    with pytest.raises(RuntimeError, match=r"program \d of batch group [01] waited in vain for step 1 of the others"):
        run("uniform", 0, memory=False, plan=POLLING)


def test_debug_mode_is_silent_where_all_is_well(monkeypatch):
    monkeypatch.setattr(launch, "MAX_SPINS", 10_000)
    run("starve_one", 0)
