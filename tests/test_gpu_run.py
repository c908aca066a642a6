"""`make gpu`: one part that hangs, crashes or is wrong costs no other, and the page says so."""

import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from bench import cases, gpu, measure, store
from bench.gpu import FORMS, Part
from bench.providers import PROVIDERS, fused
from fused_lstm import cells as cells_of_ours
from fused_lstm.cells.compiled import compiled
from fused_lstm.kernels import plan_of_cell
from fused_lstm.kernels.choice import kind_of
from fused_lstm.kernels.plan import choose_kernel, grouped, projects
from fused_lstm.kernels.plan_of_step import plan_for
from fused_lstm.kernels.tiles import H100, Problem

ABOUT = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.0"}
# Its child hangs as it does, and outlives neither.
HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child:
    print("child", child, flush=True)
time.sleep(60)
"""
SUMMARY = "import sys; print('FAILED tests/test_x.py::test_y - AssertionError: dx: error 3e-01'); sys.exit(1)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.3)


def python(code):
    return [sys.executable, "-c", code]


def part(name, code, limit=30.0, **options):
    return Part(name, limit, {"": python(code)}, **options)


def drive(folder, *asked, minutes=1.0, dry=False):
    outcomes = gpu.drive(list(asked), folder, ABOUT, minutes, dry, dict(os.environ))
    page, log = ((folder / name).read_text() for name in ("README.md", "log.txt"))
    return {outcome.name: outcome for outcome in outcomes}, page, log


def gone(pid):
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_hang_a_crash_and_a_wrong_result_leave_the_others(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'y: error 3e-01, the rule allows 1e-03'\n")
    outcomes, page, log = drive(
        tmp_path,
        part("hangs", HANGS, 0.5),
        part("crashes", "import os; print('so far', flush=True); os.abort()"),
        Part("wrong", 60, {"": gpu.tests("-c", "pyproject.toml", str(wrong), workers=0, dry=True)}),
        part("fine", "import os; print(os.getcwd() + '/sweep.jsonl: 12 of 12 rows; done')"),
    )
    status = {name: outcome.status for name, outcome in outcomes.items()}
    hung = status["hangs"]
    assert hung.startswith("hung: killed after ")
    assert status == {"hangs": hung, "crashes": "crashed: SIGABRT", "wrong": "1 failed", "fine": "ok"}
    for name, text in status.items():
        assert f"| {name} | {text} |" in page
    assert "| 12 of 12 rows; done |" in page and "| 1 failed, 1 passed in" in page
    assert "::test_bad - AssertionError: y: error 3e-01, the rule allows 1e-03" in page
    assert "so far" in page and "so far" in log
    (child,) = (line.split()[1] for line in log.splitlines() if line.startswith("child"))
    time.sleep(0.1)
    assert gone(child)
    assert "\nsweep.jsonl: 12 of 12" in log and str(store.ROOT) not in page + log


@pytest.fixture
def in_background():
    """As a shell starts what is to run there."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_ends_at_its_limit_has_its_summary(tmp_path, monkeypatch, in_background):
    monkeypatch.setattr(gpu, "GRACE", 20.0)  # a busy machine takes its time
    code = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: {SUMMARY.partition('; ')[2]}"
    outcomes, page, _ = drive(tmp_path, part("long", "import sys\n" + code, 4.0))
    assert outcomes["long"].status == "stopped at its limit of 4 s, 1 failed"
    assert "test_y - AssertionError: dx: error 3e-01" in page


def test_commands_of_a_part_run_at_once_and_each_is_named(tmp_path):
    meets = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\nother = pathlib.Path(sys.argv[2])\n"
    meets += "while not other.exists(): time.sleep(0.01)"
    a, b = (str(tmp_path / name) for name in "ab")
    commands = {"first": [*python(meets), a, b], "second": [*python(meets), b, a], "third": python("1 / 0")}
    outcomes, page, log = drive(tmp_path, Part("smoke", 20, commands))
    assert [outcome.status for outcome in outcomes.values()] == ["ok", "ok", "failed: exit status 1"]
    assert "- smoke: third: failed: exit status 1\n  - `ZeroDivisionError: division by zero`" in page
    assert "[third] ZeroDivisionError" in log


def test_the_deadline_cuts_off_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 20.0)
    late = tmp_path / "late"
    outcomes, page, _ = drive(
        tmp_path,
        part("long", "import time; time.sleep(60)"),
        part("late", f"open({str(late)!r}, 'w')"),
        minutes=0.5 / 60,
    )
    assert outcomes["long"].status.startswith("stopped at its limit of 0 s")
    assert outcomes["late"].status == "not run: no time was left" and "| late | not run: no time was left |" in page
    assert not late.exists()


def test_what_measures_takes_what_the_others_leave(tmp_path):
    code = "import sys, time; print(f'until {float(sys.argv[-1]) - time.time():.0f}')"
    given = lambda *later, **options: int(  # noqa: E731
        drive(tmp_path, part("sweep", code, 30, measures=True), *later, **options)[0]["sweep"].said.split()[1]
    )
    reserve = gpu.RESERVE
    assert given(minutes=5) == pytest.approx(300 - reserve, abs=2)
    assert given(part("next", "pass", 200), minutes=5) == pytest.approx(100 - reserve, abs=2)
    assert given(part("next", "pass", 600), minutes=5) == pytest.approx(30 - reserve, abs=2)
    assert given(minutes=0.4) == pytest.approx(24 - reserve, abs=2)


def test_the_log_is_written_as_it_comes(tmp_path):
    """The part looks for its own line there."""
    code = f"""
import time
print("here I am", flush=True)
until = time.time() + 10
while "here I am" not in open({str(tmp_path / "log.txt")!r}).read():
    assert time.time() < until
"""
    outcomes, _, _ = drive(tmp_path, part("looks", code))
    assert outcomes["looks"].status == "ok"


def test_the_page_is_written_after_every_part(tmp_path):
    code = f"print(*open({str(tmp_path / 'README.md')!r}).read().splitlines()[-1:])"
    outcomes, _, _ = drive(tmp_path, part("first", "pass"), part("second", code))
    assert outcomes["second"].said == "| second | not run: not reached |  |  |"


def test_a_part_without_its_program_is_not_run(tmp_path):
    outcomes, page, _ = drive(tmp_path, part("memcheck", "pass", needs="no-such-program"))
    assert not outcomes["memcheck"].ran
    assert "| memcheck | not run: no-such-program is not installed |" in page


def swept(status, ours, theirs, **more):
    case = {"mode": "forward", "T": 4, "B": 2, "I": 5, "H": 7, "dtype": "bf16"} | more.pop("case", {})
    times = {name: {"median": ms, "q20": ms, "q80": ms} for name, ms in (("ms", ours), ("baseline_ms", theirs))}
    row = {"case": case, "provider": "fused_lstm", "environment": ABOUT, "status": status, "why": ""}
    return row | times | more


def test_the_page_says_what_the_rows_do(tmp_path):
    for row in (
        swept("ok", 9.0, 9.0) | {"environment": {"device": "another"}},
        swept("ok", 1.0, 3.0),
        swept("ok", 2.0, 1.0, case={"H": 9}),
        swept("ok", 1.0, 2.0, case={"H": 11}),
        swept("refused", 1.0, 9.0, why="dx: error 1e-01, the rule allows 1e-03", case={"H": 13}),
    ):
        store.append(tmp_path / "sweep.jsonl", row)
    lab = {"params": {"N": 132}, "environment": ABOUT, "status": "ok", "unit": "us"}
    for row in (
        lab | {"part": "exchange", "name": "counter", "value": 0.7},
        lab | {"part": "functions", "name": "exp2", "value": 1.5, "unit": "ulp", "params": {}},
        lab | {"part": "broadcast", "name": "read", "status": "refused", "why": "read what is not of its step"},
    ):
        store.append(tmp_path / "lab.jsonl", row)
    page = gpu.page(tmp_path, ABOUT, [gpu.Outcome("sweep", "1 failed", 3.0)], dry=False)
    assert "| fused_lstm | bf16 | forward | 3 | 2.00 | 0.50-3.00 |" in page
    assert "Of 3 rows of ours 1 are slower than nn.LSTM.\n- 0.50: fused_lstm bf16 forward T4 H9 I5 B2\n" in page
    assert "bf16 forward T4 H13 I5 B2: refused, dx: error 1e-01, the rule allows 1e-03" in page
    assert "| exchange_us | 0.7 | 0.9 |" in page  # the model's, kernels/model.py
    assert "| exp2 | 1.5 | ulp |" in page
    assert "broadcast read N 132: refused" in page or "broadcast read N 132: read what is not of its step" in page


def test_rows_that_are_cut_short_do_not_take_the_page_along(tmp_path):
    (tmp_path / "sweep.jsonl").write_text('{"case": ')
    page = gpu.page(tmp_path, ABOUT, [gpu.Outcome("sweep", "hung: killed after 9 s", 9.0)], dry=False)
    assert "| sweep | hung: killed after 9 s | 9 |" in page and "The rows cannot be read: JSONDecodeError" in page


def test_a_dry_page_says_so_in_its_first_line(tmp_path):
    _, page, _ = drive(tmp_path, part("fine", "pass"), dry=True)
    assert "dry run, whose times are the interpreter's and mean nothing" in page.splitlines()[0]
    assert "dry" not in drive(tmp_path, part("fine", "pass"))[1]


def plan_of(provider, case):
    ieee = case.dtype == "fp32"
    layers = grouped(case.torch_dtype, case.B, case.H, case.layers, H100, ieee)[0]
    sizes = case.torch_dtype, case.B, case.H
    proj = case.proj if case.proj and projects(*sizes, case.proj, H100, ieee, case.directions) else 0
    return choose_kernel(*sizes, H100, ieee, case.directions, layers, proj)


TAKES = {
    "local": lambda plan, one: plan.mode == "local",
    "grid behind a flag": lambda plan, one: not one.poll and not one.kept,
    "grid polled": lambda plan, one: one.poll,
    "grid in teams": lambda plan, one: one is plan.forward or one.team == 4,
    "grid streaming W_hh": lambda plan, one: one.kept,
    "row tiles in turn": lambda plan, one: one.in_turn,
    "grid in TF32": lambda plan, one: plan.precision == "tf32",
    "grid in full precision": lambda plan, one: plan.precision == "tf32x3" and not one.kept,
    "stack of layers": lambda plan, one: plan.layers == 4,
    "both directions": lambda plan, one: plan.directions == 2,
    "projection in the loop": lambda plan, one: one.features,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_has_the_sizes_of_a_case_in_the_sweep(form):
    """Whose kernels are compiled ahead."""
    provider, case = FORMS[form]
    assert any(replace(case, T=other.T) == other and PROVIDERS[provider].runs(other) for other in cases.GPU)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("one step")])
def test_a_form_of_one_step_has_all_layers_in_a_launch(form):
    case = FORMS[form][1]
    kind, itemsize = kind_of(case.torch_dtype, case.dtype == "fp32"), case.torch_dtype.itemsize
    problem = Problem(kind, case.H, False, case.directions, case.layers, case.proj)
    plan = plan_for("ieee", problem, case.B, itemsize, H100)
    assert (plan.mode, plan.layers, plan.directions) == ("one step", case.layers, case.directions)


@pytest.mark.parametrize("form", TAKES)
def test_a_form_is_what_an_h100_takes_in_its_sizes(form):
    plan = plan_of(*FORMS[form])
    assert plan.mode == {"local": "local", "projection in the loop": "step"}.get(form, "grid")
    assert all(TAKES[form](plan, tiles) for tiles in (plan.forward, plan.backward))


@pytest.mark.parametrize(
    ("form", "mode", "polled"),
    [("any cell, local", "local", False), ("any cell, grid polled", "grid", True), ("any cell, packed", "grid", True)],
)
def test_a_form_of_any_cell_is_what_an_h100_takes_in_its_sizes(form, mode, polled):
    case = FORMS[form][1]
    made = compiled(getattr(cells_of_ours, case.cell))
    plan = plan_of_cell.plan_on(H100, made, case.torch_dtype, case.B, case.H, False, 1)
    assert plan.mode == mode and plan.forward.poll == plan.backward.poll == polled


def test_a_form_that_breaks_the_rule_says_so(monkeypatch):
    gpu.smoke("local", dry=True)

    def doubled(lstm):
        module = fused(lstm)
        module.register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))
        return module

    monkeypatch.setitem(PROVIDERS, "fused_lstm", replace(PROVIDERS["fused_lstm"], build=doubled))
    with pytest.raises(measure.Refused, match="y: error"):
        gpu.smoke("local", dry=True)


def test_the_link_is_made_where_the_kernels_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    for folder in ("fused_lstm", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    for _ in range(2):  # the second finds the first one's
        gpu.link()
    assert (tmp_path / "fused_lstm/kernels").resolve() == tmp_path / "kernels"
    assert os.readlink(tmp_path / "fused_lstm/kernels") == "../kernels"


def test_every_part_asks_for_what_is_there():
    for dry in (False, True):
        for part in gpu.parts(dry, store.ROOT):
            for command in part.commands.values():
                for word in command:
                    assert not word.startswith("tests/") or (store.ROOT / word).exists(), word
