"""What happens where a device, its driver or Triton does not take a kernel: the next candidate runs, in the end torch's
own operations, the numbers are right, and the plan and one warning say so."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources

from bench.host import without_driver
from fused_lstm import LSTM, LSTMCell, stand_in
from fused_lstm.kernels import findings, launch, plan, scan
from fused_lstm.kernels.findings import Candidate, Findings, Refused
from fused_lstm.kernels.layout import accumulator
from fused_lstm.kernels.plan import Plan, choose, disable_grid
from fused_lstm.kernels.tiles import H100, Device, Problem, Tiles

from . import recurrences
from .layouts import NAMES, layout_of
from .parity import assert_parity, run, twin

pytestmark = pytest.mark.stands_in

ERRORS = {
    "too large": lambda: OutOfResources(131072, 101376, "shared memory"),
    "does not compile": lambda: CompilationError("src", None, "no such instruction"),
    "driver": lambda: RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    "cooperative": lambda: RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
}
# The candidates of H 20 in the interpreter: four local ones, the grid form's two stand-ins, and one of steps.
ALL = 7
EVERY = 99
CPU = torch.device("cpu")


class Planted:
    """Refuses the first `count` kernels of a pass that are launched, "forward", "backward" or both.

    asked: the kernels in their order, by name and tiles.
    """

    def __init__(self):
        self.real = launch.Specialized.launch
        self.asked = []
        self.plant(0)

    def plant(self, count, error=ERRORS["too large"], name=""):
        self.count, self.error, self.name, self.refused = count, error, name, set()

    def launch(self, made, *args):
        kernel = made.kernel.__name__, made.constants["TILES"]
        if not self.asked or self.asked[-1] != kernel:
            self.asked.append(kernel)
        if self.name in kernel[0] and (kernel in self.refused or len(self.refused) < self.count):
            self.refused.add(kernel)
            raise self.error()
        return self.real(made, *args)


@pytest.fixture
def planted(monkeypatch, no_refusals):
    """Whoever plants is warned once, and the refusals are forgotten after the test."""
    planted = Planted()
    monkeypatch.setattr(launch.Specialized, "launch", lambda made, *args: planted.launch(made, *args))
    monkeypatch.setattr(plan, "_grid_disabled", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield planted
    findings.forget()
    plan.forget_plans()


def module_and_input(H=20, **options):
    torch.manual_seed(0)
    return LSTM(5, H, dtype=torch.float64, **options), torch.randn(4, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, ALL - 1, ALL])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_the_next_candidate_runs(planted, name, error, count):
    module, x = module_and_input()
    before = module.plan(x)
    assert before.mode == "local" and before.refused == ()
    planted.plant(count, ERRORS[error], name)
    assert_parity(module, x)
    asked, now = len(planted.asked), module.plan(x)
    # Each was asked for once, and then no more. Without one for a pass there is no plan for the other.
    assert len(planted.refused) == count
    assert_parity(module, x)
    assert not planted.refused & set(planted.asked[asked:])
    assert len(now.refused) == len(planted.refused) and all(refused in str(now) for refused in now.refused)
    reason = str(ERRORS[error]()).splitlines()[0] if error in ("driver", "cooperative") else ""
    assert all(reason in refused for refused in now.refused)
    if count == ALL:
        assert now.mode == "torch" and "torch's own LSTM" in now.why and "torch's own LSTM" in str(now)
        assert len(planted.asked) == asked
    else:
        assert now.mode == ("step" if count == ALL - 1 else "local")


# Whatever a call has that is more than a plain one, with no kernel that runs from the start, and from backward on.
CALLS = {
    "layers": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 7},
    "recompute": {"recompute": 2},
    "batch first": {"batch_first": True},
}


@pytest.mark.parametrize("name", ["", "backward"])
@pytest.mark.parametrize("options", CALLS)
def test_every_call_has_its_numbers(planted, options, name):
    module, x = module_and_input(**CALLS[options])
    planted.plant(EVERY, name=name)
    assert_parity(module, x)
    assert module.plan(x).mode == "torch"
    assert_parity(module, x)


@pytest.mark.parametrize(
    "form", ["lengths", "reset", "reset to hx", "packed", "states", "mask", "vmap", "compile", "grads"]
)
def test_every_form_has_its_numbers(planted, form):
    """As the kernels have them, with none that runs."""
    module, x = module_and_input()
    x.requires_grad_()
    lengths, reset = torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.4

    def call():
        torch._dynamo.reset()
        if form == "packed":
            y, hx = module(torch.nn.utils.rnn.pack_padded_sequence(x, [4, 3, 1]))
            y = y.data
        elif form == "vmap":
            y, hx = torch.vmap(module)(torch.stack([x, 2 * x]))
        elif form == "compile":
            y, hx = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        elif form == "grads":
            return torch.func.grad(lambda x: module(x)[0].sum())(x.detach())[None]
        else:
            given = {"lengths": {"lengths": lengths}, "reset": {"reset": reset}, "states": {"return_states": True}}
            given |= {"reset to hx": {"reset": reset, "reset_to": "hx"}, "mask": {"mask": ~reset}}
            y, hx, *states = module(x, **given[form])
            y = y if not states else y + states[0].c[0]
        of_all = y.square().sum() + sum(state.sin().sum() for state in hx)
        return [y.detach(), *hx, *torch.autograd.grad(of_all, [x, *module.parameters()])]

    right = call()
    planted.plant(EVERY)
    for _ in range(2):
        for ours, theirs in zip(call(), right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_compiled_graph_survives_a_kernel_that_is_refused_later(planted):
    module, x = module_and_input()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    right = run(compiled, x, None)
    planted.plant(EVERY)
    for name, result in run(compiled, x, None).items():
        torch.testing.assert_close(result, right[name], rtol=1e-9, atol=1e-10)
    assert planted.refused


@pytest.mark.parametrize("name", ["one_step", ""])
def test_one_step(planted, name):
    module, x = module_and_input(num_layers=2)
    cell = LSTMCell(5, 20, dtype=torch.float64)
    with torch.no_grad():
        for of, given in ((module, x[:1]), (cell, x[0])):
            right = twin(of)(given)
            planted.plant(EVERY, name=name)
            for _ in range(2):
                torch.testing.assert_close(of(given), right)
            planned = of.plan(given)
            assert planned.mode == ("local" if name else "torch") and planned.refused
            findings.forget()
            plan.forget_plans()


def test_one_warning_a_process(planted):
    module, x = module_and_input()
    planted.plant(EVERY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module(x)[0].sum().backward()
        LSTM(5, 24)(x.float())
    assert [warning.category for warning in caught] == [RuntimeWarning]
    text = str(caught[0].message)
    assert "takes 131072 of 101376 (shared memory)" in text and "plan(x)" in text


def test_other_errors_are_raised(planted):
    """Of our own, and those that no other kernel would mend; nothing is refused by them."""
    module, x = module_and_input()
    for error in (ValueError("ours"), RuntimeError("Triton Error [CUDA]: out of memory")):
        planted.plant(EVERY, lambda error=error: error)
        with pytest.raises(type(error), match=str(error).split(":")[-1]):
            module(x)
    assert not findings.refused_kernels()


def test_on_a_device_every_error_is_a_refusal_but_where_it_cannot_be(monkeypatch):
    cuda, synchronized = torch.device("cuda", 0), []
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    refused = launch.refusal(AssertionError("LLVM"), cuda)
    assert isinstance(refused, Refused) and "AssertionError: LLVM" in str(refused) and synchronized == [cuda]
    assert launch.refusal(KeyboardInterrupt(), cuda) is None
    state["capturing"] = True
    assert launch.refusal(AssertionError("LLVM"), cuda) is None

    def broken(device):
        raise RuntimeError("an illegal memory access was encountered")

    state["capturing"] = False
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch.refusal(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), cuda)


@pytest.mark.parametrize("tiles", [Tiles(2, 2, 4, 4), Tiles(2, 2, 32, 2, split=2, poll=True)], ids=["flags", "polled"])
def test_a_device_that_cannot_hold_the_grid_gets_one_launch_a_step(planted, tiles, monkeypatch):
    module, x = module_and_input(H=6)
    grid = Plan("grid", tiles, tiles, 8, "ieee", "as was asked for")
    monkeypatch.setattr(plan, "choose_interpreted", lambda *sizes: grid)

    def refusing(made, *args):
        if made.constants["MODE"] == "grid":
            raise ERRORS["cooperative"]()
        return planted.real(made, *args)

    monkeypatch.setattr(planted, "launch", refusing)
    assert module.plan(x).mode == "grid"
    assert_parity(module, x)
    chosen = module.plan(x)
    assert chosen.mode == "step" and "cooperative launch" in chosen.why and "as was asked for" in chosen.why
    # And so does every other size on the device.
    disable_grid(torch.device("cuda", 0), "it is shared")
    monkeypatch.setattr(plan, "cuda_device", lambda device: H100)
    assert "it is shared" in choose(torch.float16, 16, 512, torch.device("cuda", 0), ieee=False).why


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_device_without_matrix_instructions_has_a_plan(dtype, monkeypatch):
    monkeypatch.setattr(plan, "cuda_device", lambda device: Device(40, 64 * 1024, (7, 5)))
    chosen = choose(dtype, 16, 512, torch.device("cuda", 0), ieee=False)
    assert chosen.mode == "torch" and "7.5" in chosen.why


# torch's operations in the place of the launchers


@pytest.mark.parametrize("kind", recurrences.KINDS)
@pytest.mark.parametrize("layout_name", NAMES)
def test_stand_ins_of_both_passes(kind, layout_name):
    launchers = SimpleNamespace(
        forward=lambda *args, plan, **options: stand_in.forward(*args, **options),
        backward=lambda *args, plan, **options: stand_in.backward(*args, **options),
    )
    recurrences.check(None, kind, layout_name, 4, 5, 6, forward=launchers, backward=launchers)
    if layout_name == "dense":
        recurrences.check(None, kind, layout_name, 4, 0, 6, forward=launchers, backward=launchers)


@pytest.mark.parametrize("layout_name", NAMES)
def test_stand_in_of_the_scan(layout_name):
    layout, lead = layout_of(layout_name, 4, 5)
    pre, c0 = torch.randn(*lead, 24), torch.randn(5, 6, dtype=accumulator(torch.float32))
    c_reset = None if layout.starts is None else torch.randn(5, 6)
    gates = pre.clone(), pre.clone()
    cells = [
        run(each, c0, reverse=True, layout=layout, c_reset=c_reset)
        for run, each in zip((scan.scan, stand_in.scan), gates, strict=True)
    ]
    past = layout.past(cells[0].shape) if layout.padded else torch.tensor(False)
    for ours, theirs in (cells, gates):
        torch.testing.assert_close(ours.masked_fill(past, 0), theirs.masked_fill(past, 0))


# The file


TILES = Tiles(16, 16, 64, 4)
KERNELS = [
    Candidate(Problem("bf16", 512, True), "grid", TILES),
    Candidate(Problem("bf16", 512, layers=2, proj=3), "step", TILES),
    Candidate(Problem("fp32", 20), "dropout"),
]


def test_what_lasts_is_known_to_the_next_process(tmp_path):
    file, found = tmp_path / "cache" / "device.jsonl", Findings()
    found.attach(file)
    found.refuse(KERNELS[0], "does not compile", True)
    found.refuse(KERNELS[1], "the driver was busy", False)
    found.refuse(KERNELS[2], "takes too much", True)
    assert found.note_spills(KERNELS[1], 8) and not found.note_spills(KERNELS[1], 8)
    # Cut short by a kill, and not ours.
    whole = file.read_text()
    for begin, end in pairwise(range(0, len(whole), 7)):
        file.write_bytes(whole.encode() + b'\n[]\n{"shape": 1}\n\xff\x00\n' + whole[begin:end].encode())
        Findings().attach(file)
    again = Findings()
    again.attach(file)
    assert again.refused.keys() == {KERNELS[0], KERNELS[2]}
    found.refuse(KERNELS[1], "does not compile", True)
    again = Findings()
    again.attach(file)
    assert again.refused == {one: found.refused[one] for one in KERNELS} and again.spills == {KERNELS[1]: 8}


def test_processes_share_the_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fused_lstm.kernels.findings import *\n"
        "from fused_lstm.kernels.tiles import Problem\n"
        "found = Findings(); found.attach(Path(sys.argv[1]))\n"
        "for H in range(300): found.refuse(Candidate(Problem(sys.argv[2], H), 'scan'), 'x' * 500, True)"
    )
    file = tmp_path / "device.jsonl"
    several = [subprocess.Popen([sys.executable, "-c", code, str(file), kind]) for kind in ("bf16", "tf32")]
    assert [process.wait() for process in several] == [0, 0]
    found = Findings()
    found.attach(file)
    assert len(found.refused) == 600


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "cache").touch()
    found = Findings()
    found.attach(tmp_path / "cache" / "device.jsonl")
    found.refuse(KERNELS[0], "does not compile", True)
    assert found.refused


def test_a_remembered_kernel_is_not_asked_for_again(planted, tmp_path):
    module, x = module_and_input()
    planted.plant(1)
    findings.findings_on(H100).attach(tmp_path / "device.jsonl")
    module(x)
    findings.forget()
    plan.forget_plans()
    findings.findings_on(H100).attach(tmp_path / "device.jsonl")
    assert module.plan(x).refused
    planted.plant(0)
    planted.asked.clear()
    module(x)
    assert len(planted.asked) == 1


def test_of_kernels_that_spill_the_least_is_taken():
    found, problem = Findings(), Problem("bf16", 512)
    tiles = [Tiles(batch, 16, 64, 4) for batch in (8, 16, 32)]
    kernels = [Candidate(problem, "grid", each) for each in tiles]
    for kernel, registers in zip(kernels, (9, 4, 5), strict=True):
        assert found.usable(problem, "grid", tiles)[0] == kernel.tiles
        found.note_spills(kernel, registers)
    assert found.usable(problem, "grid", tiles) == [tiles[1]]
    found.refuse(kernels[1], "too large", True)
    assert found.usable(problem._replace(directions=2), "grid", tiles) == [tiles[2]]
    assert found.usable(problem._replace(backward=True), "grid", tiles) == tiles


@pytest.mark.parametrize(("capability", "counts"), [((9, 0), False), ((9, 1), True)])
def test_spills_before_the_first_step_count_where_no_step_was_checked(capability, counts, monkeypatch):
    hardware = replace(H100, capability=capability)
    monkeypatch.setattr(plan, "hardware_of", lambda device: hardware)
    plan.note_spills(torch.device("cuda"), KERNELS[0], SimpleNamespace(n_spills=3))
    assert (KERNELS[0] in findings.findings_on(hardware).spills) == counts


# Triton's own refusals


def compiled_for_a_small_device():
    """Where Triton compiles for a device whose shared memory takes none of the kernels, and no spilled ones."""
    module, x = LSTM(8, 512), torch.randn(3, 2, 8)
    with without_driver() as driver:
        driver.get_device_properties = lambda device: {"max_shared_mem": 100, "multiprocessor_count": 8}
        module(x)[0].sum().backward()
        planned = module.plan(x)
        assert planned.mode == "torch" and "of 100 (shared memory)" in str(planned), planned
        ours = run(module, x, None)
        assert not driver.launched
    for name, theirs in run(twin(module), x, None).items():
        torch.testing.assert_close(ours[name], theirs)


def test_triton_refuses():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from tests.test_refusals import *; compiled_for_a_small_device()"]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
