"""The benchmark's own promises: rows, resuming, the parity gate, the deadline, the watch over a worker, the table."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import cases, measure, run, store, timing
from bench.providers import PROVIDERS, fused
from bench.table import table

CPU = torch.device("cpu")
FORWARD, BOTH = (case for case in cases.DRY if case.dtype == "fp32" and case.B == 2)
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


def no_build(lstm):
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


def test_what_breaks_parity_gets_no_time(path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "wrong", wrong_weights)
    sweep(path, "wrong")
    for row in store.read(path):
        assert row["status"] == "refused"
        assert "the rule allows" in row["why"]
        assert "ms" not in row


def test_a_failure_is_a_row_and_the_sweep_goes_on(path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "broken", no_build)
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
    monkeypatch.setattr(run, "GRACE", 0.1)
    supervise(path, "import time; time.sleep(60)", until=0.2)
    assert not store.read(path)


def test_a_worker_that_cannot_run_ends_the_sweep(path):
    with pytest.raises(SystemExit, match="status 1"):
        supervise(path, "raise ImportError")
    assert not store.read(path)


def test_the_table_needs_the_file_alone(path, monkeypatch, capsys):
    monkeypatch.setitem(PROVIDERS, "wrong", wrong_weights)
    sweep(path, "fused_lstm", "wrong")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench.run", "--table", str(path)])
    assert run.main() == 0
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == table(store.read(path))
    assert "device a device, torch 1.0, source abc" in printed
    assert printed.count("| fp32 |") == 4
    assert printed.count("| refused |") == 2
    assert "- wrong fp32 forward T3 H7 I5 B2: " in printed


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
    (path,) = tmp_path.iterdir()
    assert len(store.read(path)) == len(cases.DRY)
