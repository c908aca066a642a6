"""The benchmark's own promises: rows, resuming, the parity gate, the deadline, the watch over a worker, the table."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import cases, fit, measure, memory, report, run, store, timing, worker
from bench.model import TERMS, floor, predicted, terms_of
from bench.offline import KERNELS
from bench.providers import PROVIDERS, Provider, checkpointed, copied, fused
from fused_lstm.kernels.choice import candidates, choose_kernel
from fused_lstm.kernels.tiles import H100, Problem

CPU = torch.device("cpu")
FORWARD, BOTH, ONE_STEP, *FORMS = (case for case in cases.DRY if case.dtype == "fp32")
PLAIN = cases.Case("", T=0, B=0, I=0, H=0, dtype="bf16")
SOME = ["fused_lstm", "compiled cell"]
HERE = {"device": "a device", "torch": "1.0", "source": "abc"}


@pytest.fixture(autouse=True)
def one_thread():
    # At these sizes threads only wait for each other, for seconds on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "device.jsonl"


def sweep(path, *names, until=None, environment=HERE, device=CPU):
    work = [(case, name) for case in (FORWARD, BOTH) for name in names or ["fused_lstm"]]
    return run.sweep(work, path, device, environment, until or time.time() + 60, seconds=0.0)


def wrong_weights(lstm):
    module = fused(lstm)
    with torch.no_grad():
        module.weight_hh_l0 *= 1.01
    return module


def no_build(*args):
    raise RuntimeError("cannot be built")


def test_rows_are_json_lines(path):
    assert sweep(path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [cases.Case(**row["case"]) for row in rows] == [FORWARD, BOTH]
    for row in rows:
        assert (row["status"], row["provider"], row["environment"]) == ("ok", "fused_lstm", HERE)
        assert row["plan"]["mode"]
        for times in (row["ms"], row["baseline_ms"]):
            assert 0 < times["q20"] <= times["median"] <= times["q80"]
            assert times["rounds"] >= 2


def test_a_finished_row_is_not_measured_again(path, monkeypatch):
    sweep(path)
    before = path.read_text()
    monkeypatch.setattr(run, "measure", lambda *args: pytest.fail("measured again"))
    sweep(path)
    assert path.read_text() == before


def test_another_environment_is_measured_anew_and_can_be_forgotten(path):
    sweep(path)
    other = HERE | {"source": "def"}
    sweep(path, environment=other)
    assert [row["environment"] for row in store.read(path)] == [HERE] * 2 + [other] * 2
    store.forget(path, HERE)
    assert store.read(path) == store.read(path, other)


def test_what_breaks_parity_is_timed_and_marked(path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "wrong", Provider(wrong_weights))
    monkeypatch.setattr(report, "plot", lambda *args: pytest.fail("drawn"))
    path = path.with_name("sweep.jsonl")
    sweep(path, "wrong")
    rows = store.read(path)
    for row in rows:
        assert row["status"] == "refused"
        assert "the rule allows" in row["why"]
        assert row["ms"]["median"] > 0 < row["baseline_ms"]["median"]
    printed = report.write(path.parent)
    for row in rows:
        ratio, low, high = report.speed_up(row)
        assert f"| wrong | {ratio:.2f} ({low:.2f}-{high:.2f}), refused |" in printed


@pytest.mark.parametrize(("cell", "baseline"), [("gru", "nn.GRU"), ("slstm", "nn.LSTM")])
def test_a_cell_is_held_to_its_own_equations_and_timed_beside_a_module_of_torchs(cell, baseline, monkeypatch):
    def wrong(module):
        module = copied(module)
        with torch.no_grad():
            module.weight_hh_l0 *= 1.5
        return module

    monkeypatch.setitem(PROVIDERS, "wrong", Provider(wrong))
    case = next(case for case in cases.DRY if case.cell == cell and case.mode == "forward+backward")
    rows = [measure.measure(case, name, CPU, HERE, 0.0) for name in ("fused_lstm", "wrong")]
    assert [(row["status"], row["baseline"]) for row in rows] == [("ok", baseline), ("refused", baseline)]
    assert "the rule allows" in rows[1]["why"]
    for row in rows:
        assert row["plan"]["mode"] == "local" and row["baseline_ms"]["median"] > 0
    assert f"| T3 H7 I5 {cell} B2 | wrong |" in report.table(rows, {})


def test_what_is_refused_and_cannot_be_timed_says_both(path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "wrong", Provider(wrong_weights))
    monkeypatch.setattr(measure, "alternate", no_build)
    sweep(path, "wrong")
    for row in store.read(path):
        assert row["status"] == "refused" and "ms" not in row
        assert "the rule allows" in row["why"] and row["why"].endswith("not timed: RuntimeError: cannot be built")
    assert report.table(store.read(path), {}).count("| wrong | refused |") == 2


@pytest.mark.parametrize("name", ["fused_lstm, CUDA graph", "nn.LSTM, CUDA graph"])
def test_steps_of_a_graph(name):
    """Of the right results, also in a second sequence, which begins with a state of its own."""
    assert PROVIDERS[name].runs(ONE_STEP) == torch.cuda.is_available()  # without it there is no graph
    measure.check(ONE_STEP, name, CPU)
    lstm, x, hx = measure.build(ONE_STEP, CPU)
    with torch.no_grad():
        module = measure.called(ONE_STEP, PROVIDERS[name].build(lstm))
        for states in (hx, tuple(-state for state in hx)):
            y, (hn, cn) = module(x, states)
            theirs, ends = lstm(x, states)
            torch.testing.assert_close((y, hn, cn), (theirs, *ends))


def test_a_failure_is_a_row_and_the_sweep_goes_on(path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "broken", Provider(no_build))
    assert sweep(path, "broken", "fused_lstm") == 0
    rows = store.read(path)
    assert [row["status"] for row in rows] == ["failed", "ok", "failed", "ok"]
    assert rows[0]["why"] == "RuntimeError: cannot be built"


def test_the_deadline_ends_the_sweep_between_rows(path, monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: next(clock)))
    assert sweep(path, until=5.0) == 0
    assert len(store.read(path)) == 1


def supervise(path, program, until=60.0, stall=60.0):
    command = [sys.executable, "-c", program]
    run.supervise(command, [(FORWARD, "fused_lstm")], path, HERE, time.time() + until, stall)


@pytest.mark.parametrize(
    "program, why", [("import time; time.sleep(60)", "no result"), ("import os; os.abort()", "signal 6")]
)
def test_a_worker_that_hangs_or_dies_costs_one_row(path, program, why):
    supervise(path, program, stall=0.3)
    (row,) = store.read(path)
    assert row["status"] == "failed"
    assert why in row["why"]


def test_a_worker_past_the_deadline_leaves_no_row(path, monkeypatch):
    monkeypatch.setattr(worker, "GRACE", 0.1)
    supervise(path, "import time; time.sleep(60)", until=0.2)
    assert not store.read(path)


def test_a_worker_that_cannot_run_ends_the_sweep(path):
    with pytest.raises(SystemExit, match="status 1"):
        supervise(path, "raise ImportError")
    assert not store.read(path)


def test_the_table_and_the_plot_need_the_file_alone(path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "wrong", Provider(wrong_weights))
    path = path.with_name("sweep.jsonl")
    sweep(path, "fused_lstm", "wrong", environment={"device": "an older one"})
    sweep(path, "fused_lstm", "wrong")
    printed = report.write(path.parent)
    assert (path.parent / "table.md").read_text() == printed + "\n"
    assert "device a device, torch 1.0, source abc" in printed
    assert printed.count("| fp32 |") == 4
    assert printed.count(", refused |") == 2
    assert "- wrong fp32 forward T3 H7 I5 B2: " in printed
    drawn = (path.parent / "plot.svg").read_bytes()
    assert b"fused_lstm" in drawn and b"wrong" not in drawn
    report.write(path.parent)
    assert (path.parent / "plot.svg").read_bytes() == drawn


def test_the_table_of_a_known_device_gives_the_share_of_the_floor():
    environment = {"device": "NVIDIA H100 80GB HBM3"}
    case = cases.Case("forward", T=100, B=16, I=512, H=512, dtype="bf16")
    times = {"median": 0.4, "q20": 0.38, "q80": 0.5, "rounds": 9}
    row = {"plan": {"mode": "grid"}, "ms": times, "baseline_ms": times | {"median": 1.2}, "memory": 2**20}
    row |= {"baseline_memory": 2**21, "host_ms": 0.0204, "baseline_host_ms": 0.0301}
    row = measure.row(case, "fused_lstm", environment, "ok", **row)
    share = report.share_of_floor(row, {})
    assert floor("H100", "bf16", "grid", 512, 16).us / 4 < share < 0.5
    assert report.share_of_floor(row, {"poll_us": 1.8, "exchange_us": 1.8}) > share + 0.2
    cells = report.table([row], {}).splitlines()[-1].split(" | ")
    assert cells[2:] == [
        *("T100 H512 B16", "fused_lstm", "3.00 (2.40-3.16)", "", "", "4e+06", "4.00", "12.00"),
        *("20", "30", "1.0", "2.0", "", "", "grid"),
        f"{share:.0%} |",
    ]
    assert report.share_of_floor(row | {"environment": {"device": "another"}}, {}) is None


def test_bf16_is_shown_beside_fp16_and_the_copy_of_the_weights():
    times = {"median": 0.5, "q20": 0.4, "q80": 0.6, "rounds": 9}

    def row(case, baseline, provider="fused_lstm", **more):
        more |= {"plan": None, "ms": times, "baseline_ms": times | {"median": baseline}}
        return measure.row(case, provider, HERE, "ok", **more)

    for mode, T, share in [("forward", 100, "10%"), ("one step", 4, "40%")]:
        bf16 = cases.Case(mode, T=T, B=16, I=512, H=512, dtype="bf16")
        fp16 = row(replace(bf16, dtype="fp16"), 1.0), row(replace(bf16, dtype="fp16"), 9.0, "another")
        rows = [row(bf16, 2.0, copy_ms=0.2), *fp16, row(replace(bf16, B=1), 2.0)]
        cells = [line.split(" | ")[4:7] for line in report.table(rows, {}).splitlines()[-4:]]
        assert cells[0] == ["4.00 (3.33-5.00)", "2.00", share]
        assert [each[1:] for each in cells[1:]] == [["", ""]] * 3


def test_the_copy_of_the_weights_is_timed_where_nn_lstm_makes_one(monkeypatch):
    lstm, _, _ = measure.build(replace(FORWARD, layers=2, dtype="bf16"), CPU)
    copy = measure.weight_copy(lstm)
    with torch.no_grad():
        copy()
        lstm.weight_hh_l1 += 1
        assert torch.equal(copy(), torch.cat([weight.flatten() for weight in lstm.parameters()]))
    assert measure.measure(FORWARD, "fused_lstm", CPU, HERE, seconds=0.0)["copy_ms"] is None
    monkeypatch.setattr(measure, "copies_weights", lambda case, device: True)
    assert measure.measure(FORWARD, "fused_lstm", CPU, HERE, seconds=0.0)["copy_ms"] > 0


@pytest.mark.parametrize("name", ["fused_lstm", "nn.LSTM, checkpointed", "nn.LSTM, CUDA graph"])
def test_copies_have_their_weights_in_one_buffer(name, monkeypatch):
    """Or cuDNN copies all of them at each call, and the ratio would be one to that."""
    flat = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: flat.append(id(self.weight_hh_l0)))
    lstm, _, _ = measure.build(FORWARD, CPU)
    module = PROVIDERS[name].build(lstm)
    assert id(getattr(module, "module", module).weight_hh_l0) in flat


def test_devices_are_known_by_the_names_that_drivers_give():
    for device, name in [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "B200"),
    ]:
        assert terms_of(device) == TERMS[name]
    for device, name, multiprocessors, bytes_per_us in [
        ("NVIDIA H200", "H100", 132, 4.8e6),
        ("NVIDIA H200 NVL", "H100", 132, 4.8e6),
        ("NVIDIA GH200 480GB", "H100", 132, 4.0e6),
        ("NVIDIA H100 PCIe", "H100", 114, 2.0e6),
        ("NVIDIA H100 NVL", "H100", 132, 3.9e6),
        ("NVIDIA A100-PCIE-40GB", "A100", 108, 1.555e6),
        ("NVIDIA A100 80GB PCIe", "A100", 108, 1.935e6),
    ]:
        terms = terms_of(device)
        assert (terms.multiprocessors, terms.memory, terms.shared) == (
            multiprocessors,
            bytes_per_us,
            TERMS[name].shared,
        )
        faster = terms.multiprocessors * terms.matrix["tf32"] / (132 if name == "H100" else 108)
        assert faster / TERMS[name].matrix["tf32"] == pytest.approx(756 / 989 if multiprocessors == 114 else 1)
    assert terms_of("NVIDIA H20") is terms_of("NVIDIA RTX A1000") is terms_of("a device") is None


def test_the_floor_names_its_term():
    assert floor("H100", "bf16", "grid", 256, 1).binds == "exchange"
    assert floor("H100", "bf16", "grid", 1024, 1).binds == "exchange"
    assert floor("H100", "bf16", "grid", 2048, 1).binds == "weights"
    assert floor("H100", "bf16", "grid", 1024, 256).binds == "gather"
    assert floor("H100", "bf16", "step", 64, 1).binds == "launch"
    for name, terms in TERMS.items():
        for mode in ("local", "grid", "step"):
            passes = [floor(name, "bf16", mode, 512, B, backward) for backward in (False, True) for B in (1, 64, 1024)]
            times = [bound.us for bound in passes]
            assert times[:3] == sorted(times[:3]) and all(f <= b for f, b in zip(times[:3], times[3:], strict=True))
        faster = terms.measured({"matrix_bf16_flop_per_us_per_sm": 1.0, "exchange_us": 0.1})
        assert (faster.matrix["bf16"], faster.exchange, faster.l2) == (1.0, 0.1, terms.l2)


@pytest.mark.parametrize("dtype", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_plan_is_predicted_above_the_floor_and_near_it(dtype, backward):
    for H, B in product((64, 256, 512, 1024, 2048), (1, 16, 64, 256)):
        plan = choose_kernel(cases.DTYPES[dtype], B, H, H100, dtype == "fp32")
        planned = predicted("H100", dtype, plan, H, B, backward).us
        bound = floor("H100", dtype, plan.mode, H, B, backward).us
        assert 0.999 * bound <= planned <= (10 if dtype == "bf16" else 40) * bound, (H, B, planned, bound)


def test_the_fit_of_the_model_names_its_error_and_a_wrong_choice(tmp_path, monkeypatch, capsys):
    """On rows whose cycles are the model's own, but for one of the kernels for few rows, which takes half as many."""
    rows, batches = [], (1, 4, 512)
    for kernel in KERNELS:
        for tiles in candidates("grid", Problem("bf16", 512, kernel == "backward"), H100):
            row = {"dtype": "bf16", "kernel": kernel, "mode": "grid", "H": 512, "layers": 1, "proj": 0}
            row["tiles"] = asdict(tiles)
            for B in fit.of_first_launch(row, batches):
                rows.append(row | {"B": B, "cycles": fit.predicted(row, B)})
    slowest = max((row for row in rows if row["tiles"]["poll"] and row["B"] == 4), key=lambda row: row["cycles"])
    slowest["cycles"] /= 2
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["fit", "--load", str(file), "--B", *map(str, batches), "--worst", "1"])
    fit.main()
    few, flags, turns, choices = re.split(r"\n(?! )", capsys.readouterr().out.strip())
    assert "0% in the median" in few and "100% at" in few and fit.described(slowest) in few
    assert "0% at most" in turns
    assert "0% at" in flags and "rank correlation 1.00" in flags and "streaming 1.00" in flags
    assert "6 choices" in choices


def test_what_is_timed_is_drawn_on_the_device():
    """A check is drawn on the CPU, where gold is."""
    torch.manual_seed(0)
    nothing = torch.get_rng_state()
    measure.steps(BOTH, "fused_lstm", torch.device("meta"))
    assert torch.equal(torch.get_rng_state(), nothing)
    measure.build(BOTH, torch.device("meta"))
    assert not torch.equal(torch.get_rng_state(), nothing)


@pytest.mark.parametrize("case", [FORWARD, BOTH, ONE_STEP, *FORMS], ids=lambda case: f"{case.mode} {case.shape}")
def test_every_mode_and_form_is_checked_and_timed(path, case):
    measured = measure.measure(case, "fused_lstm", CPU, HERE, seconds=0.0)
    assert measured["status"] == "ok", measured["why"]


def test_layers_go_back_in_time_and_forward_by_turns():
    (case,) = (case for case in FORMS if case.form == "alternating" and case.mode == "forward")
    module, x, (h0, c0) = measure.build(case, CPU)
    y, (hn, cn) = module(x, (h0, c0))
    for k, layer in enumerate(module.layers):
        both = torch.nn.LSTM(layer.input_size, layer.hidden_size, bidirectional=True)
        weights = layer.state_dict()
        both.load_state_dict(weights | {f"{name}_reverse": weight for name, weight in weights.items()})
        found, ends = both(x, (h0[[k, k]], c0[[k, k]]))
        x = found.chunk(2, -1)[k % 2 == 0]
        torch.testing.assert_close([end[int(k % 2 == 0)] for end in ends], [hn[k], cn[k]])
    torch.testing.assert_close(x, y)


@pytest.fixture
def no_packages(monkeypatch):
    """As where no other's package is installed."""
    monkeypatch.setattr(Provider, "installed", lambda provider: provider.package is None)


def test_rows_say_what_is_kept_for_backward(no_packages):
    (case,) = (case for case in cases.MEMORY if case in cases.DRY)
    x, y, hx = (4 * case.B * size for size in (case.T * case.I, case.T * case.H, 2 * case.H))
    saved = {"fused_lstm": 5 * y, "fused_lstm, recompute": 0, "nn.LSTM, checkpointed": 0}
    assert [name for listed, name in run.work([case])] == list(saved)
    for name, size in saved.items():
        row = measure.measure(case, name, CPU, HERE, seconds=0.0)
        assert row["kept"] == x + y + hx + size and row["baseline_kept"] > x + 6 * y, name
        cells = report.table([row | {"kept": 2**20, "baseline_kept": 2**21}], {}).splitlines()[-1].split(" | ")
        assert cells[10:16] == ["", "", "", "", "1.0", "2.0"]  # the time of the host is in the others, on a CPU
    assert measure.measure(FORWARD, "fused_lstm", CPU, HERE, seconds=0.0)["kept"] == 0


def test_what_a_call_costs_the_host():
    command = [sys.executable, "-m", "bench.host", "--rounds", "2"]
    _, *lines = subprocess.run(command, cwd=store.ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    heads, rows = ([line for line in lines if line.endswith("difference") == head] for head in (True, False))
    assert [head.split()[0] for head in heads] == ["nn.LSTM", "nn.GRU", "nn.LSTM"] and len(rows) == 8 + 6
    for row in rows:
        theirs, ours, difference = map(float, row.split()[-3:])
        assert theirs > 0 < ours and abs(ours - theirs - difference) <= 1.5


def test_what_a_checkpoint_holds_is_counted():
    case = next(case for case in cases.MEMORY if case in cases.DRY)
    lstm, x, hx = measure.build(case, CPU)
    module = checkpointed(lstm)
    module.recompute = 4
    found, _ = memory.kept(lambda: module(x, hx)[0])
    assert memory.beside(found, [x, *hx, *module.parameters()]) == 2 * 2 * hx[0].nbytes  # between three chunks


def test_a_loop_over_a_compiled_cell_is_nn_lstm_too():
    case = cases.Case("forward+backward", T=3, B=2, I=5, H=4, dtype="fp32", layers=2, directions=2)
    measure.check(case, "compiled cell", CPU)


def test_a_provider_stands_only_where_it_is_installed_and_runs(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "absent", Provider(no_build, package="no_such_package"))
    monkeypatch.setitem(PROVIDERS, "dense", Provider(no_build, runs=lambda case: case.form == "dense"))
    listed = run.work([FORWARD, FORMS[0]])
    assert (FORWARD, "dense") in listed and (FORMS[0], "dense") not in listed
    assert not [name for _, name in listed if name == "absent"]


def test_ours_comes_first_on_all_cases_and_providers_can_be_chosen(monkeypatch, no_packages):
    case = next(case for case in cases.MEMORY if case in cases.DRY)
    monkeypatch.setitem(PROVIDERS, "compiled cell", Provider(no_build))
    ways = ["fused_lstm, recompute", "nn.LSTM, checkpointed"]
    names = ["fused_lstm", "fused_lstm", *ways, "compiled cell", "compiled cell"]
    assert [name for _, name in run.work([FORWARD, case])] == names
    assert [listed for listed, _ in run.work([FORWARD, case])] == [FORWARD, case, case, case, FORWARD, case]
    assert run.work([FORWARD, case], ["compiled cell"]) == [(FORWARD, "compiled cell"), (case, "compiled cell")]


def test_the_worker_measures_the_chosen_providers(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(run, "supervise", lambda command, *args: seen.append((command, *args)))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["run", "--dry", "--results", str(tmp_path), "--providers", *SOME])
    assert run.main() == 1  # a dry run that lacks rows
    ((command, listed, path, *_),) = seen
    assert command[-3:] == ["--providers", *SOME] and {name for _, name in listed} == {"fused_lstm", "compiled cell"}
    assert f"{path}: 0 of {len(listed)} rows; the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, tf32", [("tf32", True), ("fp32", False), ("bf16", False)])
def test_both_names_of_cudnns_switch_agree(dtype, tf32):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.rnn.fp32_precision
    with measure.precision(dtype):
        assert cudnn.allow_tf32 == tf32
        assert cudnn.rnn.fp32_precision == ("tf32" if tf32 else "ieee")
    assert (cudnn.allow_tf32, cudnn.rnn.fp32_precision) == before


def test_times_are_median_and_quantiles():
    assert timing.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == timing.Times(3.5, 2.0, 5.0, 6)


def test_a_cuda_device_is_held_until_the_host_is_ahead(monkeypatch):
    """Filled and held before the first event, for 1.5 times what the host takes, in cycles of the clock that it has."""
    now, held, done = 0.0, 0.0, []  # the host's clock in seconds, the device's work in milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")
            self.at = held

        def synchronize(self):
            done.append("read")

        def elapsed_time(self, end):
            return end.at - self.at

    def sleep(cycles):
        nonlocal held
        done.append(cycles)
        held += cycles / 2e6

    def call(ms_of_host, ms):
        nonlocal now, held
        done.append("call")
        now, held = now + 1e-3 * ms_of_host, held + ms

    for name, value in {"Event": Event, "_sleep": sleep, "synchronize": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(timing, "_cache_filler", lambda device: SimpleNamespace(zero_=lambda: done.append("fill")))
    calls = {"short": lambda: call(2.0, 0.5), "long": lambda: call(100.0, 7.0)}
    cuda = torch.device("cuda")
    hosts = timing.on_host(calls, cuda)
    assert hosts == {"short": pytest.approx(2.0), "long": pytest.approx(100.0)} and set(done) == {"call"}
    done.clear()
    times = timing.alternate(calls, cuda, 0.0, hosts)
    assert (times["short"].median, times["long"].median, times["long"].rounds) == (pytest.approx(0.5), 7.0, 5)
    calibrated = ["call", "call", 1, "event", 1_000_000, "event"]
    assert done[:6] == calibrated and done[-10:] == ["read"] * 10
    assert [each for each in done[6:-10] if each != "read"] == 6 * [
        *("fill", pytest.approx(6e6, abs=1), "event", "call", "event"),
        *("fill", pytest.approx(4e7, abs=1), "event", "call", "event"),  # past the queue's end nothing is gained
    ]
    done.clear()
    timing.alternate(calls, cuda, 0.0)
    assert set(done) == {"fill", "event", "call", "read"}
    assert timing.on_host(calls, CPU) == {}


def test_lengths_are_as_the_case_says():
    case = cases.Case("forward", T=2000, B=64, I=1, H=1, dtype="fp32", form="packed")
    long, uniform = (replace(case, lengths=lengths) for lengths in ("one long", "uniform"))
    spread, drawn = measure.lengths_of(case).sort().values, measure.lengths_of(uniform).sort().values
    assert (spread[0], spread[-1], spread.diff().max() - spread.diff().min()) == (250, 2000, 1)
    assert measure.lengths_of(long).sort().values.tolist() == [40] * 63 + [2000]
    assert 1 <= drawn[0] < 250 and 1750 < drawn[-1] <= 2000 and 800 < drawn[32] < 1200
    assert all(torch.equal(measure.lengths_of(each), measure.lengths_of(each)) for each in (case, long, uniform))
    assert (case.shape, long.shape) == ("T2000 H1 packed", "T2000 H1 packed one long")


def test_rows_from_before_lengths_differed_are_read():
    case = {name: value for name, value in asdict(FORMS[0]).items() if name != "lengths"}
    assert cases.Case(**case) == FORMS[0]


def test_bf16_is_never_measured_without_fp16():
    at = {case: number for number, case in enumerate(cases.GPU)}
    bf16 = [case for case in cases.GPU if case.dtype == "bf16"]
    assert len(bf16) == 131 and all(replace(case, dtype="fp16") in at for case in bf16)
    square = [case for case in bf16 if replace(case, T=0, B=0, H=0, I=0, mode="") == PLAIN and case not in cases.MEMORY]
    assert len([case for case in square if case.I == case.H]) == 62
    assert all(0 < at[replace(case, dtype="fp16")] - at[case] <= 4 for case in square if case.I == case.H)


def test_no_case_stands_twice_in_a_sweep():
    for sweep_cases in (cases.GPU, cases.CPU, cases.DRY):
        assert len(set(sweep_cases)) == len(sweep_cases)


@pytest.mark.gpu
def test_rows_on_a_cuda_device(path):
    assert sweep(path, device=torch.device("cuda")) == 0
    assert [row["status"] for row in store.read(path)] == ["ok", "ok"]


@pytest.mark.slow
def test_the_dry_run_runs_to_the_end(tmp_path):
    command = [sys.executable, "-m", "bench.run", "--dry", "--results", tmp_path]
    assert subprocess.run(command, cwd=store.ROOT).returncode == 0
    (folder,) = tmp_path.iterdir()
    assert len(store.read(folder / "sweep.jsonl")) == len(run.work(cases.DRY))
    assert (folder / "table.md").exists() and (folder / "plot.svg").exists()
