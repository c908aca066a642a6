"""The lab's own promises: every part runs, rows resume, a wrong result is marked, and its kernels compile."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import lab, micro, plans, store, tune
from fused_lstm import tuning
from fused_lstm.kernels import findings
from fused_lstm.kernels.plan import choose_kernel
from fused_lstm.kernels.tiles import H100

HERE = {"device": "a device", "source": "abc"}
DRY = micro.Lab(torch.device("cpu"), seconds=0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "device" / "lab.jsonl"


def sweep(path, work, until=None):
    return lab.sweep(work, path, DRY, HERE, until or time.time() + 60)


def first(part, **sizes):
    """The first item of a part with such sizes."""
    return next(item for item in lab.listed(DRY, [part]) if sizes.items() <= item.params.items())


# tune() holds the kernels to torch's operations.
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.stands_in] * (part == "plans")) for part in lab.PARTS]
)
def test_every_part_runs_to_the_end(path, part, monkeypatch):
    monkeypatch.setattr(tuning, "SHORTEST", 1e-3)
    work = lab.listed(DRY, [part])
    assert sweep(path, work) == 0
    rows = store.read(path, HERE)
    assert [lab.Item(row["part"], row["name"], row["params"]) for row in rows] == work
    for row in rows:
        assert row["status"] == "ok", row["why"]
        assert row["q20"] <= row["us"] == row["median"] <= row["q80"]
        assert row["unit"]
    assert lab.table(rows).count(f"| {part} |") == (4 if part == "tune" else len(work))
    assert part in ("functions", "tune", "plans") or lab.terms(rows)


def test_resuming_measures_nothing_again(path, monkeypatch):
    work = [first("launch"), first("tune")]
    sweep(path, work)
    before = path.read_text()
    monkeypatch.setattr(lab, "measure", lambda *args: pytest.fail("measured again"))
    sweep(path, work)
    assert path.read_text() == before


def test_the_deadline_ends_the_sweep_between_rows(path):
    assert sweep(path, lab.listed(DRY, ["launch"]), until=time.time() - 1) == 0
    assert not store.read(path)


def wrong(item, **tiles):
    return item._replace(params=item.params | {"tiles": item.params["tiles"] | tiles})


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_wrong_tiles_are_refused_and_never_the_best(path, name):
    local = next(item for item in lab.listed(DRY, ["tune"]) if item.name == name and item.params["mode"] == "local")
    # A program of the local form that holds half of the units hears nothing of the others.
    item = local._replace(params=local.params | {"H": 24})
    sweep(path, [wrong(item, units=16, chunk=16)])
    (row,) = store.read(path)
    assert row["status"] == "refused", row["why"]
    assert "Mismatched elements" in row["why"]
    assert row["us"] == row["value"] and row["unit"] == "us a step"  # what it takes, all the same
    row["value"] = 0.001
    slower = row | {"status": "ok", "value": 2.0, "params": row["params"] | {"chosen": False}}
    assert "| 2.000, the plan's own 0.001, refused | us a step, best of 1, 2 tried |" in lab.table([row, slower])
    assert "| none, the plan's own 0.001, refused | of 1 tried |" in lab.table([row])
    assert lab.broken(row)


def test_a_wrong_product_is_marked_and_no_term(path, monkeypatch):
    item = first("matrix")
    monkeypatch.setattr(micro, "settled", lambda steps: 1.0)
    sweep(path, [item])
    (row,) = store.read(path)
    assert row["status"] == "refused" and "a product is off by" in row["why"]
    assert row["value"] and lab.terms([row]) == {}
    assert f"| {row['value']:.4g}, refused | {row['unit']} |" in lab.table([row])


def test_what_is_wrong_and_cannot_be_timed_is_refused(path, monkeypatch):
    def lost(*args):
        raise RuntimeError("lost in the noise")

    item = first("matrix")
    monkeypatch.setattr(micro, "settled", lambda steps: 1.0)
    monkeypatch.setattr(micro, "alternate", lost)
    sweep(path, [item])
    (row,) = store.read(path)
    assert row["status"] == "refused" and "value" not in row
    assert row["why"].endswith("; not timed: RuntimeError: lost in the noise")


def test_an_element_that_is_left_out_is_refused(path, monkeypatch):
    """Also where the memory still holds the right one from a run before."""
    torch.set_deterministic_debug_mode("default")
    item = first("tune")
    tune.measure(DRY, item.name, item.params)
    monkeypatch.setattr(tune, "forward", lambda input_gates, *rest, **options: leave_out(input_gates, *rest))
    sweep(path, [item])
    (row,) = store.read(path)
    assert row["status"] == "refused"


def leave_out(input_gates, weight_hh, h0, c0):
    T, B, H = len(input_gates), *h0.shape
    return torch.empty(T, B, H), c0.float(), torch.empty(T, B, H), torch.empty_like(input_gates)


def test_a_failure_is_a_row_and_the_next_part_runs(path):
    sweep(path, [wrong(first("tune"), batch=7), first("launch")])
    failed, ok = store.read(path)
    assert (failed["status"], ok["status"]) == ("failed", "ok")
    assert "power of 2" in failed["why"]


@pytest.mark.stands_in
def test_what_tune_has_found_is_kept_in_a_file_that_can_be_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "microseconds", lambda call: (call(), 1.0)[1])
    plans.keep_in(tmp_path, DRY)
    item = first("plans")
    assert lab.measure(item, DRY, HERE)["status"] == "ok"
    found = findings.Findings()
    found.attach(tmp_path / "interpreter.jsonl")
    assert len(found.calls) == 1 and found.times
    findings.forget()
    monkeypatch.setattr(tuning, "mismatch", lambda *args: "result 0 is off by 1")
    with pytest.warns(RuntimeWarning, match="numbers are wrong"):
        row = lab.measure(item, DRY, HERE)
    assert row["status"] == "refused" and "off by 1" in row["why"] and row["value"]
    findings.forget()


def test_errors_are_counted_in_units_of_the_last_place():
    gold = torch.tensor([1.0, -1.75, 3e-7, 4097.0], dtype=torch.float64)
    right = gold.float()
    off = torch.nextafter(right, torch.tensor(torch.inf)).nextafter(torch.tensor(torch.inf))
    assert micro.ulps(right[[0, 1, 3]], gold[[0, 1, 3]]).tolist() == [0.0, 0.0, 0.0]
    assert micro.ulps(off, gold) == pytest.approx([2.0, 2.0, 2.0, 2.0], abs=0.5)


@pytest.mark.parametrize("low, high", [(-2.0, -1.0), (0.25, 16.0)])
def test_arguments_are_as_dense_as_floats(low, high):
    every = micro.floats(1.0, 2.0, 2**23, DRY.device)
    assert every[0] == 1 and every[-1] < 2 and torch.equal(every.unique(), every)
    x = micro.floats(low, high, 3000, DRY.device)
    assert low <= x.min() and x.max() <= high and len(x.unique()) == 3000
    binades = torch.frexp(x).exponent.unique(return_counts=True)[1]
    assert binades.max() - binades.min() <= 2


@pytest.mark.parametrize("name, allowed", [("exp2", 1), ("divide", 0.5), ("exp", 20), ("sigmoid", 8), ("tanh", 8)])
def test_a_functions_error_is_found(name, allowed, monkeypatch):
    """The interpreter's is numpy's; a planted one of 7 ulp, and a function that is another, are seen."""
    item = first("functions")._replace(name=name) if name != "divide" else first("functions", to=2)
    _, value, unit = micro.functions(DRY, name, item.params)
    assert 0 < value <= allowed and unit == "ulp"
    exact, intervals = micro.FUNCTIONS[name]
    monkeypatch.setitem(micro.FUNCTIONS, name, (lambda *args: exact(*args) * (1 + 30 * 2**-24), intervals))
    _, more, _ = micro.functions(DRY, name, item.params)
    assert more > value + 5
    monkeypatch.setitem(micro.FUNCTIONS, name, (lambda *args: exact(*args) + 0.01, intervals))
    with pytest.raises(micro.Wrong, match=f"{name} is off by"):
        micro.functions(DRY, name, item.params)


def test_a_program_that_polls_in_vain_is_heard():
    report = torch.zeros(4, dtype=torch.int32)
    h = torch.full((2, 1, 16), 0x4000, dtype=torch.int16)
    # One program of 8 units, where the row has 16.
    micro.poll_kernel[(1,)](h, report, 2, B=1, H=16, MAX_SPINS=20, BLOCK_H=8, WIDTH=16)
    with pytest.raises(micro.Wrong, match="program 0 waited in vain at step 0"):
        micro.heard(report)


def test_worker_that_dies_costs_one_row(path):
    work = [first("launch")]
    lab.supervise([sys.executable, "-c", "import os; os.abort()"], work, path, HERE, time.time() + 60)
    (row,) = store.read(path)
    assert (row["status"], row["why"]) == ("failed", "process ended by signal 6")


def made_up(part, name, value, **params):
    return {"part": part, "name": name, "params": params, "value": value, "status": "ok"}


def test_terms():
    rows = [
        made_up("exchange", "counter", 0.7, N=33),
        made_up("exchange", "counter", 0.9, N=132),
        made_up("exchange", "counter", 9.0, N=66),
        made_up("exchange", "poll", 0.5, N=132, B=1, units=8),
        made_up("exchange", "poll", 0.6, N=132, B=16, units=8),
        made_up("broadcast", "read", 5e6, N=132, H=1024, B=64, bytes=17_301_504),
        made_up("broadcast", "read", 1e5, N=132, H=256, B=1, bytes=67_584),
        made_up("launch", "python", 11.0),
        made_up("launch", "graph", 1.5),
        *(made_up("matrix", "forward", value, dtype="bf16") for value in (1e6, 3e6, 9e6)),
        made_up("matrix", "backward", 1.0, dtype="fp32") | {"status": "refused"},
    ]
    assert lab.terms(rows) == {
        "exchange_us": 0.9,
        "poll_us": 0.5,
        "l2_bytes_per_us": 5e6,
        "launch_us": 11.0,
        "graph_launch_us": 1.5,
        "matrix_bf16_flop_per_us_per_sm": 3e6,
    }
    assert lab.terms([]) == {}


@pytest.mark.parametrize("dtype, H", [("bf16", 512), ("fp32", 256), ("tf32", 1024), ("bf16", 100), ("fp32", 1024)])
def test_candidates_lie_around_the_plans_own_and_fit(dtype, H):
    plan = choose_kernel(tune.DTYPES[dtype], 16, H, H100, dtype == "fp32")
    for own in (plan.forward, plan.backward):
        found = tune.candidates(plan, own, dtype, H, 16, H100)
        assert found[0] == own
        assert len(set(found)) == len(found) > 2
        if plan.mode == "grid":
            assert all(-(-H // tiles.units) <= H100.multiprocessors for tiles in found)
        if plan.mode == "local":
            assert {(tiles.units, tiles.chunk) for tiles in found} == {(own.units, own.chunk)}


def test_the_plans_own_tiles_are_tuned_first_then_their_neighbours(monkeypatch):
    class Device(micro.Lab):
        dry = False
        hardware = H100

    # Two of each list, or it takes seconds.
    for name in ("SIZES", "BATCHES", "NAMES"):
        monkeypatch.setattr(tune, name, getattr(tune, name)[:2])
    found = list(tune.items(Device(torch.device("cpu"))))
    chosen, others = found[:16], found[16:]
    assert all(params["chosen"] for _, params in chosen) and not any(params["chosen"] for _, params in others)
    cases = [(name, params["dtype"], params["H"], params["B"]) for name, params in chosen]
    assert len(set(cases)) == 16
    assert cases[:2] == [("forward", "bf16", 512, 16), ("backward", "bf16", 512, 16)]
    own = dict(zip(cases, [tune.Tiles(**params["tiles"]) for _, params in chosen], strict=True))
    away = [
        tune.distance(own[name, params["dtype"], params["H"], params["B"]], tune.Tiles(**params["tiles"]))
        for name, params in others
    ]
    assert away == sorted(away) and set(away) == {1, 2}
    # At each distance the sizes come in the same order.
    for _, group in itertools.groupby(zip(away, others, strict=True), key=lambda each: each[0]):
        order = dict.fromkeys((name, p["dtype"], p["H"], p["B"]) for _, (name, p) in group)
        assert list(order) == cases


def test_the_dry_run_of_the_command(tmp_path):
    command = [sys.executable, "-m", "bench.lab", "exchange", "--dry", "--results", str(tmp_path)]
    process = subprocess.run(command, cwd=store.ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = tmp_path.glob("*/lab.jsonl")
    assert {row["status"] for row in store.read(path)} == {"ok"}
    assert "a dry run, whose times are the interpreter's and mean nothing" in process.stdout
    assert "| terms | exchange_us |" in process.stdout


COMPILE = """
import json, torch
from bench import micro, tune
from fused_lstm.kernels.tiles import H100
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Lab(micro.Lab):
    dry = False
    hardware = H100

driver.set_active(tune.Compiler(H100.capability))
compiled = []
JITFunction.__getitem__ = lambda self, grid: lambda *args, **options: compiled.append(
    self.run(*args, grid=grid, warmup=True, **options)
)
lab = Lab(torch.device("cpu"))
for items, measure in [
    (micro.functions_items, micro.functions),
    (micro.exchange_items, micro.exchange),
    (micro.broadcast_items, micro.broadcast),
    (micro.launch_items, micro.launch),
    (micro.matrix_items, micro.matrix),
]:
    seen = set()
    for name, params in items(lab):
        if name in seen or params.get("dtype") not in (None, "bf16"):
            continue
        seen.add(name)
        compiled.clear()
        try:
            measure(lab, name, params)
        except micro.Wrong:  # nothing has run
            pass
        kernel, *_ = compiled
        before, loop = kernel.asm["ttgir"].partition("scf.for")[::2]
        print(json.dumps({
            "name": name,
            "chunks": params.get("chunks"),
            "products": [part.count("tt.dot ") + part.count("warp_group_dot ") for part in (before, loop)],
            "cooperative": kernel.metadata.launch_cooperative_grid,
            "shared": kernel.metadata.shared,
            "volatile": "ld.volatile.global" in kernel.asm["ptx"],
            "approximate": [name for name in ("ex2.approx", "div.full", "div.rn") if name in kernel.asm["ptx"]],
        }))
"""


def test_the_kernels_compile_for_a_gpu():
    """As their launches on an H100 would; in a process of its own, because in this one they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    process = subprocess.run(command, cwd=store.ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    found = {row.pop("name"): row for row in map(json.loads, process.stdout.splitlines())}
    assert set(found) == {*micro.FUNCTIONS, "counter", "poll", "read", "python", "graph", "forward", "backward"}
    approximate = {name: found[name]["approximate"] for name in micro.FUNCTIONS}
    one, both = {"exp2": ["ex2.approx"], "divide": ["div.full"], "exp": ["ex2.approx"]}, ["ex2.approx", "div.full"]
    assert approximate == one | {"sigmoid": both, "tanh": both}
    for name, row in found.items():
        assert row["cooperative"] == (name in ("counter", "poll", "read")), "programs that wait must all be resident"
        assert row["volatile"] == row["cooperative"]  # a wait spins past L1
        assert row["shared"] <= H100.shared
    for name in ("forward", "backward"):
        before, loop = found[name]["products"]
        assert (before, loop) == (0, found[name]["chunks"]), "products left the loop that is timed"


@pytest.mark.gpu
@pytest.mark.parametrize("part", lab.PARTS)
def test_parts_on_a_cuda_device(path, part):
    device = micro.Lab(torch.device("cuda", torch.cuda.current_device()), seconds=0.0)
    one_of_each = {item.name: item for item in reversed(lab.listed(device, [part]))}
    for item in one_of_each.values():
        row = lab.measure(item, device, HERE)
        assert row["status"] == "ok", row["why"]
