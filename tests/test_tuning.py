"""tune(): what is the fastest on the device at hand is taken from then on, and nothing wrong ever is.

In the interpreter its times mean nothing; where they decide they are set here.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_lstm
from fused_lstm import LSTM, LSTMCell, tuning
from fused_lstm.kernels import choice, findings, plan
from fused_lstm.kernels.findings import Findings, findings_on
from fused_lstm.kernels.tiles import H100

from .parity import assert_parity, run, twin

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.stands_in


@pytest.fixture(autouse=True)
def forgets(no_refusals, monkeypatch):
    """Timings are short here, but in processes of their own, and forgotten after each test."""

    def microseconds(call):
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    monkeypatch.setattr(tuning, "MOST", 2)
    yield
    findings.forget()
    plan.forget_plans()


@pytest.fixture
def times(monkeypatch):
    """In "each" what the timings give, one after another, as a test sets it."""
    taken = {}

    def microseconds(call):
        call()
        return next(taken["each"])

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    return taken


def module_and_input(H=20, **options):
    torch.manual_seed(0)
    return LSTM(5, H, dtype=torch.float64, **options), torch.randn(4, 3, 5, dtype=torch.float64)


CALLS = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "projection": {"proj_size": 7},
    "recompute": {"recompute": 2},
    "batch first": {"batch_first": True},
}


@pytest.mark.parametrize("options", CALLS)
def test_tunes_and_keeps_the_numbers(options, capsys):
    module, x = module_and_input(**CALLS[options])
    before = torch.get_rng_state()
    tuned = fused_lstm.tune(module, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.parameters())
    shown = capsys.readouterr().out
    assert str(tuned) in shown and "backward" in shown and "torch's own LSTM" in shown
    ((form, of_call),) = tuned.calls.items()
    assert form.B == 8 and form.saves and form.layers == module.num_layers and of_call.kernels > 0 < of_call.torch
    planned, torch_wins = module.plan(x), of_call.torch < of_call.kernels
    # Torch's own LSTM cannot recompute.
    assert (planned.mode == "torch") == (torch_wins and not module.recompute)
    assert "measured on this device" in str(planned)
    module.dropout = 0.0
    assert_parity(module, x)


@pytest.mark.parametrize("form", ["lengths", "not finite"])
def test_no_right_kernel_is_refused(form):
    """The kernels leave the gates of the padding as the memory was, and NaN in the input is NaN in every result."""
    module, x = module_and_input()
    if form == "not finite":
        x[2, 1] = torch.nan
    given = {"lengths": [4, 0, 2]} if form == "lengths" else {}
    tuned = fused_lstm.tune(module, x, progress=False, **given)
    assert not findings.refused_kernels() and all(row.us for row in tuned.rows)


def test_a_form_whose_other_pass_is_refused_is_not_taken(times):
    """What was tuned for inference may have to train."""
    module, x = module_and_input()
    with torch.no_grad():
        forward = plan.alternatives(*launch_of(module, x, False))
        times["each"] = iter([*range(1, len(forward) + 1), 1.0, 2.0])
        fused_lstm.tune(module, x, progress=False)
        assert module.plan(x).mode == "local"
    problem = plan.Problem("fp32", 20, True)
    for tiles in choice.candidates("local", problem, H100):
        findings_on(H100).refuse(findings.Candidate(problem, "local", tiles), "too large", True)
    plan.forget_plans()
    assert module.plan(x).mode == "step"
    assert_parity(module, x)
    findings.forget()


def test_a_second_time_nothing_is_timed_but_again(times):
    module, x = module_and_input()
    times["each"] = iter(range(1, 100))
    first = fused_lstm.tune(module, x, progress=False)
    times["each"] = iter([])
    known = fused_lstm.tune(module, x, progress=False)
    assert [row.us for row in known.rows] == [row.us for row in first.rows] and known.calls == first.calls
    assert all(row.remark == "known" for row in known.rows[:-2])
    times["each"] = iter(range(100, 200))
    again = fused_lstm.tune(module, x, again=True, progress=False)
    assert min(row.us for row in again.rows) > max(row.us * 4 for row in first.rows[:-2])


@pytest.mark.parametrize("fastest", range(3))
def test_the_fastest_kernel_is_taken(times, fastest):
    module, x = module_and_input()
    forward = plan.alternatives(*launch_of(module, x, False))
    each = [9.0] * len(forward)
    each[fastest] = 1.0
    times["each"] = iter([*each, *each, 100.0, 200.0])  # both passes have as many, then the call
    fused_lstm.tune(module, x, progress=False)
    chosen = module.plan(x)
    assert chosen.mode == forward[fastest].mode and chosen.forward == forward[fastest].forward
    assert "100 us a call, torch's own LSTM 200" in chosen.evidence and "fastest" in chosen.why
    assert_parity(module, x)
    # Another batch of as many programs has it too, and a larger one, another dtype and one without gradients do not.
    assert module.plan(x[:, :1]).forward == chosen.forward
    assert "model" in module.plan(x.repeat(1, 3, 1)).evidence
    with torch.no_grad():
        assert "model" in module.plan(x).evidence


def launch_of(module, x, backward):
    problem = plan.Problem("fp32", module.hidden_size, backward)
    return x.dtype, x.shape[1], problem, x.device, tuning.MOST


def test_torch_is_taken_where_it_is_faster(times):
    module, x = module_and_input()
    count = 2 * len(plan.alternatives(*launch_of(module, x, False)))
    times["each"] = iter([*[1.0] * count, 300.0, 200.0])
    fused_lstm.tune(module, x, progress=False)
    planned = module.plan(x)
    assert planned.mode == "torch" and "faster here: 200 us a call, the kernels 300" in planned.why
    torch.testing.assert_close(run(module, x, None), run(twin(module), x, None), rtol=0, atol=0)
    # A compiled graph is the same for every batch, and a call with lengths another one.
    assert module.plan(torch.nn.utils.rnn.pack_padded_sequence(x, [4, 3, 1])).mode == "local"


def test_wrong_numbers_are_refused(monkeypatch):
    module, x = module_and_input()
    real, wrong = tuning.operators.forward_kernel.forward, []

    def forward(*args, plan, **options):
        y, *rest = real(*args, plan=plan, **options)
        if not wrong or plan.forward in wrong:
            wrong.append(plan.forward)
            y = y + 0.1
        return y, *rest

    monkeypatch.setattr(tuning.operators.forward_kernel, "forward", forward)
    with pytest.warns(RuntimeWarning, match="its numbers are wrong"):
        tuned = fused_lstm.tune(module, x, progress=False)
    assert sum("wrong" in row.remark for row in tuned.rows) == 1
    assert module.plan(x).forward not in wrong
    findings.forget()


@pytest.mark.parametrize("module", [LSTM(5, 20, num_layers=2), LSTMCell(5, 20)], ids=["LSTM", "LSTMCell"])
def test_one_step(module):
    x = torch.randn(1, 3, 5) if isinstance(module, LSTM) else torch.randn(3, 5)
    with torch.no_grad():
        tuned = fused_lstm.tune(module, x, progress=False)
        (form,) = tuned.calls
        assert form.one_step and not form.saves and "measured" in module.plan(x).evidence
        torch.testing.assert_close(module(x), twin(module)(x))


@pytest.mark.parametrize("T", [1, 3])
def test_weights_of_8_bits_are_timed_wide(T):
    module, x = module_and_input()
    fused_lstm.quantize(module)
    with torch.no_grad():
        y, _ = module(x[:T])
        tuned = fused_lstm.tune(module, x[:T], progress=False)
        assert len(tuned.calls) == 1 and not any(row.remark for row in tuned.rows)
        torch.testing.assert_close(module(x[:T])[0], y)


def test_a_model_has_each_of_its_layers_tuned():
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), LSTM(5, 20), Second(), LSTM(20, 24))
    assert len(fused_lstm.tune(model, torch.randn(2, 3, 5), progress=False).calls) == 2
    with pytest.raises(ValueError, match="swap"):
        fused_lstm.tune(torch.nn.LSTM(5, 20), torch.randn(2, 3, 5))


class Second(torch.nn.Module):
    def forward(self, pair):
        return pair[0]


def test_at_each_first_call(times):
    """As FUSED_LSTM_TUNE=1 has it."""
    module, x = module_and_input()
    times["each"] = iter(range(1, 1000))
    with tuning.watching(tuning.at_first_call):
        module(x)
        after = next(times["each"])
        module(x)
        torch.compile(module, backend="eager")(x)
        torch.vmap(module)(x[None])
        assert next(times["each"]) == after + 1 > 3
        with torch.no_grad():
            module(x)
        assert next(times["each"]) > after + 3
    assert "measured" in module.plan(x).evidence


# What is shipped


@pytest.fixture
def shipped_file(tmp_path):
    """What was found on another device: of the local form the second tiles are the fastest."""
    module, x = module_and_input()
    file = tmp_path / "shipped.jsonl"
    found = Findings()
    found.attach(file)
    for backward in (False, True):
        each = plan.alternatives(*launch_of(module, x, backward))
        for us, made in zip([9.0, 1.0, 9.0], each, strict=False):
            problem = plan.Problem("fp32", 20, backward)
            found.note_time(findings.Launch(problem, 8, made.mode, made.tiles(backward)), us)
    form = findings.CallForm("fp32", 8, 20, 0, 1, 1, saves=True, one_step=False, cut=False)
    found.note_call(form, findings.CallTime(100.0, 200.0, "2026-01-02"))
    return file


def ship(file):
    findings_on(H100).shipped = Findings()
    findings_on(H100).shipped.attach(file, "NVIDIA H100")
    plan.forget_plans()


def test_what_is_shipped_counts_until_it_is_measured_here(times, shipped_file):
    module, x = module_and_input()
    by_model = module.plan(x)
    ship(shipped_file)
    shipped, before = module.plan(x), shipped_file.read_text()
    assert shipped.forward != by_model.forward and shipped.mode == "local"
    assert (
        "measured on an NVIDIA H100 of ours on 2026-01-02" in shipped.evidence and "100 us a call" in shipped.evidence
    )
    assert_parity(module, x)
    count = len(plan.alternatives(*launch_of(module, x, False)))
    times["each"] = iter([*range(1, 1 + 2 * count), 300.0, 400.0])
    fused_lstm.tune(module, x, progress=False)
    here = module.plan(x)
    assert "measured on this device" in here.evidence and "300 us a call" in here.evidence
    assert here.forward == by_model.forward and shipped_file.read_text() == before


def test_shipped_tiles_that_this_triton_cannot_compile_are_not_taken(shipped_file, monkeypatch):
    module, x = module_and_input()
    by_model = module.plan(x)
    monkeypatch.setattr(plan, "candidates", lambda *problem: [by_model.forward, by_model.backward])
    ship(shipped_file)
    assert module.plan(x).forward == by_model.forward


def test_a_device_has_what_is_shipped_for_its_name(shipped_file, tmp_path, monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    properties.name = "NVIDIA H100 80GB HBM3"
    assert findings.shipped_for(properties.name).parts[-2:] == ("measured", "NVIDIA-H100-80GB-HBM3.jsonl")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(plan, "file_for", lambda name: tmp_path / "here.jsonl")
    monkeypatch.setattr(plan, "shipped_for", lambda name: shipped_file)
    hardware = plan.cuda_device.__wrapped__(torch.device("cuda", 0))
    here, shipped = findings_on(hardware).measured()
    assert not here.calls and len(shipped.calls) == 1 and shipped.device == here.device == properties.name


# A process of its own, which is killed, and its file

SCRIPT = """
import sys, torch
from pathlib import Path
import fused_lstm
from fused_lstm import tuning
from fused_lstm.kernels.findings import findings_on
from fused_lstm.kernels.tiles import H100
tuning.SHORTEST, tuning.MOST = 1e-3, 2
findings_on(H100).attach(Path(sys.argv[1]))
module, x = fused_lstm.LSTM(5, 20), torch.randn(4, 3, 5)
print("ready", flush=True)
tuned = fused_lstm.tune(module, x, progress=False)
print(sum(row.remark == "known" for row in tuned.rows), "measured" in module.plan(x).evidence)
"""


def test_goes_on_after_a_kill_and_beside_another(tmp_path):
    file = tmp_path / "device.jsonl"
    environment = os.environ | {"TRITON_INTERPRET": "1"}

    def start():
        command = [sys.executable, "-c", SCRIPT, str(file)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    killed = start()
    while not file.exists():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    lines = len(file.read_text().split())
    with file.open("ab") as damaged:
        damaged.write(b'\n{"problem": {"kind"\xff\n[1, 2]\n{"call": {"B": 1}}')
    both = [start(), start()]
    results = [process.communicate()[0].split() for process in both]
    assert lines and all(int(known) > 0 and measured == "True" for _, known, measured in results), results
    found = Findings()
    found.attach(file)
    assert len(found.calls) == 1 and all(us > 0 for us in found.times.values())


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "fused_lstm.tune", "--hidden-size", "20", "--batch", "2", "--steps", "2"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    options = ["--dtype", "float32", "--input-size", "5", "--inference"]
    process = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "float32, H 20, B 2, T 2, inference" in process.stdout and "measured on this device" in process.stdout


def test_where_no_kernel_runs_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(plan, "interpreted", lambda: False)
    tuned = fused_lstm.tune(LSTM(5, 20), torch.randn(2, 3, 5), progress=False)
    assert not tuned.calls and "torch's own LSTM" in str(tuned)
    assert not findings_on(H100).times
