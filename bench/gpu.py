"""`python -m bench.gpu`, that is `make gpu`: what a GPU is asked in a few minutes, in parts, and a page of its answers.

The parts stand in the order of worth: the deadline cuts off the end. Each runs in processes of its own with a limit of
its own, so that one that hangs, crashes or gives a wrong result leaves the others. A dry run takes the same parts on
tiny sizes in Triton's interpreter; its times mean nothing.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from . import store
from .cases import Case

# Seconds from SIGINT, at which pytest prints its summary, to SIGKILL; and from there until nobody waits any longer:
# a process whose GPU hangs may survive both.
GRACE = 15.0
# Seconds of its limit that a part which measures keeps for its last row and its table.
RESERVE = 20.0
CORES = os.cpu_count() or 1


def _form(H: int, B: int, dtype: str = "bf16", mode: str = "forward+backward", **more: Any) -> Case:
    return Case(mode, T=8, B=B, H=H, dtype=dtype, **{"I": H, **more})


# Each form of the kernels, in the sizes of the sweep that take it on an H100: provider and case.
FORMS = {
    "local": ("fused_lstm", _form(128, 16)),
    "grid behind a flag": ("fused_lstm", _form(650, 16, I=80)),
    "grid polled": ("fused_lstm", _form(512, 16)),
    "grid in teams": ("fused_lstm", _form(1024, 64)),
    "grid in TF32": ("fused_lstm", _form(512, 16, "tf32")),
    "grid in full precision": ("fused_lstm", _form(128, 16, "fp32")),
    "grid streaming W_hh": ("fused_lstm", _form(1024, 16, "fp32")),
    "grid, W_hh in int8": ("fused_lstm, int8", _form(2048, 16, mode="forward", weights="int8")),
    "row tiles in turn": ("fused_lstm", _form(256, 8192)),
    "stack of layers": ("fused_lstm", _form(512, 16, layers=4)),
    "both directions": ("fused_lstm", _form(512, 16, directions=2)),
    "projection in the loop": ("fused_lstm", _form(4096, 16, I=512, proj=512)),
    "one step": ("fused_lstm", _form(512, 16, mode="one step")),
    "one step of a stack": ("fused_lstm", _form(736, 1, mode="one step", layers=4)),
    "one step, both directions": ("fused_lstm", _form(650, 3, mode="one step", layers=2, directions=2)),
    "one step with a projection": ("fused_lstm", _form(1024, 4, "tf32", mode="one step", layers=2, proj=256)),
    "one step in a session": ("fused_lstm, session", _form(160, 1, "fp16", mode="one step", layers=3)),
    "lengths": ("fused_lstm", _form(512, 64, form="lengths")),
    "resets": ("fused_lstm", _form(512, 64, form="reset")),
    "packed": ("fused_lstm", _form(512, 64, form="packed")),
    "recompute": ("fused_lstm, recompute", _form(512, 16)),
    "any cell, local": ("fused_lstm", _form(64, 16, cell="gru")),
    "any cell, grid polled": ("fused_lstm", _form(512, 16, cell="slstm")),
    "any cell, packed": ("fused_lstm", _form(512, 64, form="packed", cell="gru")),
}


def smoke(form: str, dry: bool) -> None:
    """Runs a form once, forward and backward.

    Raises:
        bench.measure.Refused: a result that breaks the parity rule.
    """
    from . import measure
    from .providers import PROVIDERS

    provider, case = FORMS[form]
    if dry:
        H = 20 if "local" in form else 70
        case = replace(case, T=3, B=3, I=5, H=H, proj=min(case.proj, 8))
    device = torch.device("cpu" if dry else "cuda")
    with measure.precision(case.dtype):
        lstm, x, _ = measure.build(case, device)
        with torch.set_grad_enabled(case.mode == "forward+backward"):
            module = PROVIDERS[provider].build(lstm)
            plan = getattr(module, "module", module).plan(x[:1] if case.mode == "one step" else x)
        # Before a launch that may hang.
        print(f"{plan.mode}, layers {plan.layers}, {plan.forward}, {plan.backward}", flush=True)
        measure.check(case, provider, device)
    print(f"by the rule, in mode {plan.mode}")


@dataclass(frozen=True)
class Part:
    """What one question to the GPU takes.

    limit: seconds, of each of its commands.
    commands: by name; they run at once.
    measures: they take --until, and use what time the parts after them leave.
    needs: a program without which the part is not run.
    variables: of their environment.
    """

    name: str
    limit: float
    commands: dict[str, list[str]]
    measures: bool = False
    needs: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)


def tests(*selection: str, workers: int = 12, seconds: int = 40, dry: bool = False) -> list[str]:
    """pytest on a selection, each test with a limit where pytest-timeout is there; workers: 0 for its own process."""
    command = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "-p", "no:cacheprovider", "--tb=line"]
    command += ["--continue-on-collection-errors", "-m", f"{'not gpu' if dry else 'gpu'} and not slow"]
    command += ["-o", "addopts=--strict-markers"]  # pyproject's own ask for a plugin that may not be there
    if workers and find_spec("xdist"):
        command += ["-n", str(max(1, min(workers, CORES * 3 // 4)))]
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(seconds), "--timeout-method", "thread"]
    return [*command, *selection]


def parts(dry: bool, results: Path) -> list[Part]:
    """All parts, in the order of worth."""
    python, options = [sys.executable, "-m"], ["--results", str(results), *["--dry"] * dry]
    lab, run = ([*python, f"bench.{name}", *options] for name in ("lab", "run"))
    smi = ["nvidia-smi", "--format=csv", "--query-gpu=clocks.sm,clocks.mem,compute_mode,mig.mode.current,pstate"]
    kernels = "tests/test_kernels.py"
    grid = [kernels, "-k", "test_step_with_products" if dry else "test_grid"]
    small = [kernels, "-k", "test_awkward" if dry else "test_grid and 130 and dense"]
    every = ["tests", "--ignore", "tests/test_device.py", "--ignore", "tests/test_lab.py"]  # parts of their own
    device = ["tests/test_numbers.py", "-k", "same_bits"] if dry else ["tests/test_device.py"]
    forms = {form: [*python, "bench.gpu", "--smoke", form, *["--dry"] * dry] for form in FORMS}
    latency = [*python, "bench.latency", "--results", str(results)]
    latency += ["--sizes", "2,8", "--calls", "20"] if dry else []
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    every_part = [
        Part("clocks", 10, {"": smi}, needs="nvidia-smi"),
        Part("functions", 45, {"": [*lab, "functions"]}, measures=True),
        Part("smoke", 45, forms, variables={"OMP_NUM_THREADS": "1"}),
        Part("parity", 110, {"": tests(*(["tests/test_recurrence.py"] if dry else every), dry=dry)}),
        # A hang of ours costs 45 s: nothing else takes so long here, not even kernels that were not compiled ahead.
        Part("sweep", 260, {"": [*run, "--providers", "fused_lstm", "--stall", "45"]}, measures=True),
        Part("latency", 40, {"": latency}),
        Part("micro", 60, {"": [*lab, "exchange", "broadcast", "launch", "matrix"]}, measures=True),
        Part("plans", 70, {"": [*lab, "plans"]}, measures=True),
        Part("tune", 70, {"": [*lab, "tune"]}, measures=True),
        Part("device", 75, {"": tests("-vv", *device, workers=1, seconds=30, dry=dry)}),
        Part("debug", 30, {"": tests(*grid, workers=8, seconds=25, dry=dry)}, variables={"FUSED_LSTM_DEBUG": "1"}),
        Part("memcheck", 50, {"": [*sanitizer, *tests(*small, workers=0, dry=dry)]}, needs="compute-sanitizer"),
        Part("others", 60, {"": run}, measures=True),
    ]
    return [replace(part, limit=4 * part.limit) for part in every_part] if dry else every_part


class Outcome(NamedTuple):
    """What came of a command: its status in words, its last line of note, and a line for each failure."""

    name: str
    status: str
    seconds: float = 0.0
    said: str = ""
    failures: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        return not self.status.startswith("not run")


# How pytest, bench.lab and bench.run name what failed, and how they count.
FAILURE = re.compile(r"^(FAILED|ERROR) |: (refused|failed)$")
COUNT = re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b|\d+ of \d+ rows|by the rule")


class Running:
    """A command in a process group of its own, whose lines are handed on as they come."""

    def __init__(
        self, name: str, command: list[str], limit: float, variables: dict[str, str], line: Callable[[str], object]
    ) -> None:
        self.name, self.limit, self.line = name, limit, line
        self.lines: list[str] = []
        self.asked = self.killed = False
        self.began = time.time()
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            # So a shell starts what is to run in the background, and the command would ignore it, too.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options: Any = {"env": variables, "text": True, "errors": "replace", "start_new_session": True}
        self.process = subprocess.Popen(command, cwd=store.ROOT, **pipes, **options)
        self.reader = Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip().replace(f"{store.ROOT}/", ""))  # a page is read on other machines
            self.line(self.lines[-1])

    def signal(self, number: int) -> None:
        """To the whole group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def ended(self) -> bool:
        """Whether nobody waits for it any longer; past its limit it is asked to end, then killed, then left."""
        if self.process.poll() is not None:
            return True
        late = time.time() - self.began - self.limit
        if late >= 0 and not self.asked:
            self.asked = True
            self.signal(signal.SIGINT)
        if late >= GRACE and not self.killed:
            self.killed = True
            self.signal(signal.SIGKILL)
        return late >= 2 * GRACE

    def outcome(self) -> Outcome:
        """What came of it; whatever is left of its group is killed."""
        seconds = time.time() - self.began
        self.signal(signal.SIGKILL)
        self.reader.join(5)
        lines = [line for line in self.lines if line.strip()]
        failures = [line for line in lines if FAILURE.search(line)]
        code = self.process.poll()
        if self.killed:
            status = f"hung: killed after {seconds:.0f} s" + ", and still there" * (code is None)
        elif self.asked:
            status = f"stopped at its limit of {self.limit:.0f} s" + f", {len(failures)} failed" * bool(failures)
        elif code == 0:
            status = "ok"
        elif code is not None and code < 0:
            status = f"crashed: {signal.Signals(-code).name}"
        else:
            status = f"{len(failures)} failed" if failures else f"failed: exit status {code}"
        counts = (line[found.start() :].rstrip("= ") for line in reversed(lines) if (found := COUNT.search(line)))
        said = next(counts, lines[-1] if lines else "")
        if status != "ok" and not failures:  # what it said in the end, or last before it hung
            failures = lines[-1:] if self.asked or not said else [said]
        return Outcome(self.name, status, seconds, said, tuple(failures))


def _told(line: Callable[[str], None], prefix: str, text: str) -> None:
    line(prefix + text)


def run(
    part: Part, until: float, later: float, variables: dict[str, str], line: Callable[[str], None]
) -> list[Outcome]:
    """Runs a part's commands at once, as many as the cores take; returns what came of each.

    until: the deadline in seconds since the epoch, which cuts off limits. later: seconds that the parts after it want.
    """
    if shutil.which(part.needs) is None:
        return [Outcome(part.name, f"not run: {part.needs} is not installed")]
    waiting, running, done = list(part.commands.items()), list[Running](), list[Outcome]()
    try:
        while waiting or running:
            while waiting and len(running) < max(2, CORES - 1):
                name, command = waiting.pop(0)
                whole = f"{part.name}: {name}" if name else part.name
                left = until - time.time()
                limit = min(left, max(part.limit, left - later) if part.measures else part.limit)
                if limit <= 0:
                    done.append(Outcome(whole, "not run: no time was left"))
                    continue
                if part.measures:
                    command = [*command, "--until", str(time.time() + max(1.0, limit - RESERVE))]
                line(f"== {whole}, at most {limit:.0f} s")
                told = partial(_told, line, f"[{name}] " if name else "")
                running.append(Running(whole, command, limit, variables | part.variables, told))
            for each in [each for each in running if each.ended()]:
                running.remove(each)
                done.append(each.outcome())
                line(f"== {each.name}: {done[-1].status}, {done[-1].seconds:.0f} s")
            time.sleep(0.02)
    finally:
        for each in running:
            each.signal(signal.SIGKILL)
    order = [f"{part.name}: {name}" if name else part.name for name in part.commands]
    return sorted(done, key=lambda outcome: order.index(outcome.name))


def drive(
    asked: list[Part], folder: Path, about: dict[str, Any], minutes: float, dry: bool, variables: dict[str, str]
) -> list[Outcome]:
    """Runs parts until the deadline; log.txt in the folder grows line by line, README.md after every part."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * minutes
    outcomes: list[Outcome] = []
    with (folder / "log.txt").open("a", encoding="utf-8", buffering=1) as log:

        def line(text: str) -> None:
            log.write(text + "\n")
            print(text[:160], flush=True)

        line(f"\n==== {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC: {in_words(about)}")
        for k, part in enumerate(asked):
            later = sum(part.limit for part in asked[k + 1 :])
            try:
                outcomes += run(part, until, later, variables, line)
            except BaseException as error:
                outcomes.append(Outcome(part.name, f"interrupted: {type(error).__name__}"))
                raise
            finally:
                rest = [Outcome(part.name, "not run: not reached") for part in asked[k + 1 :]]
                (folder / "README.md").write_text(page(folder, about, [*outcomes, *rest], dry), encoding="utf-8")
    return outcomes


def in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def page(folder: Path, about: dict[str, Any], outcomes: list[Outcome], dry: bool) -> str:
    """The page of a run, from what came of its parts and from the rows in its folder."""
    title = "# What the GPU says: " if not dry else "# A dry run, whose times are the interpreter's and mean nothing: "
    lines = [title + about["device"], "", in_words(about), ""]
    cells = [(o.name, o.status, f"{o.seconds:.0f}" if o.ran else "", o.said[:120]) for o in outcomes]
    lines += _table(("part", "status", "seconds", "its last word"), cells)
    broken = [outcome for outcome in outcomes if outcome.ran and outcome.status != "ok"]
    if broken:
        lines += ["", "## What fails", ""]
    for outcome in broken:
        lines.append(f"- {outcome.name}: {outcome.status}")
        lines += _some([f"  - `{_cell(text[:240])}`" for text in outcome.failures], "  - and {} more in log.txt")
    for section in (_ratios, _measured):
        try:
            lines += section(folder)
        except Exception as error:  # a row cut short must not take the rest of the run along
            lines += ["", f"The rows cannot be read: {type(error).__name__}: {error}"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")


def _some(lines: list[str], more: str, most: int = 40) -> list[str]:
    return lines[:most] + [more.format(len(lines) - most)] * (len(lines) > most)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(map(_cell, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def _newest(path: Path) -> list[store.Row]:
    """The rows of the newest environment in a file."""
    rows = store.read(path)
    return [row for row in rows if row["environment"] == rows[-1]["environment"]]


def _ratios(folder: Path) -> list[str]:
    """How many times as fast as nn.LSTM, and which rows are not; which were refused, or failed."""
    from .report import speed_up

    rows = _newest(folder / "sweep.jsonl")
    if not rows:
        return []

    def what(row: store.Row) -> str:
        case = Case(**row["case"])
        return f"{row['provider']} {case.dtype} {case.mode} {case.shape} B{case.B}"

    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = row["provider"], row["case"]["dtype"], row["case"]["mode"]
            groups.setdefault(key, []).append(speed_up(row)[0])
    cells = [
        (*key, str(len(ratios)), f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}")
        for key, ratios in groups.items()
    ]
    lines = ["", "## nn.LSTM's time over ours, and over the others'", ""]
    lines += _table(("provider", "dtype", "mode", "rows", "median", "range"), cells)
    ours = [row for row in rows if row["status"] == "ok" and row["provider"].startswith("fused_lstm")]
    slower = sorted((speed_up(row)[0], what(row)) for row in ours if speed_up(row)[0] < 1)
    lines += ["", f"Of {len(ours)} rows of ours {len(slower)} are slower than nn.LSTM."]
    lines += _some([f"- {ratio:.2f}: {text}" for ratio, text in slower], "- and {} more")
    bad = [row for row in rows if row["status"] != "ok"]
    lines += ["", f"Of {len(rows)} rows {len(bad)} were refused or failed; table.md has every row."]
    why = [f"- {what(row)}: {row['status']}, {row['why'].partition(chr(10))[0][:160]}" for row in bad]
    return lines + _some(why, "- and {} more")


def _measured(folder: Path) -> list[str]:
    """The terms of the model and the accuracy of the functions, as measured; what the lab refused, or failed at."""
    from .lab import broken, terms, what
    from .model import terms_of

    rows = _newest(folder / "lab.jsonl")
    if not rows:
        return []
    model = terms_of(rows[0]["environment"]["device"])
    theirs: dict[str, float] = {}
    if model:
        theirs = {f"matrix_{name}_flop_per_us_per_sm": rate for name, rate in model.matrix.items()}
        theirs |= {"exchange_us": model.exchange, "poll_us": model.poll}
        theirs |= {"l2_bytes_per_us": model.l2, "graph_launch_us": model.launch}
    cells = [
        (name, f"{value:.4g}", f"{theirs[name]:.4g}" if name in theirs else "") for name, value in terms(rows).items()
    ]
    lines = []
    if cells:
        lines += ["", "## What a step is made of", "", *_table(("term", "measured", "in kernels/model.py"), cells)]
    accuracy = [row for row in rows if row["part"] == "functions" and row["status"] == "ok"]
    if accuracy:
        lines += ["", "## How exact the device's functions are", ""]
        lines += _table(("function", "value", "unit"), [(what(r), f"{r['value']:.4g}", r["unit"]) for r in accuracy])
    bad = [row for row in rows if broken(row)]
    lines += ["", f"Of {len(rows)} rows of the lab {len(bad)} were refused or failed; lab.md has every row."]
    why = [f"- {row['part']} {what(row)}: {row['why'].partition(chr(10))[0][:160]}" for row in bad]
    return lines + _some(why, "- and {} more")


def link() -> None:
    """Makes fused_lstm.kernels importable from the tree where the package is not installed: no pip is needed."""
    kernels = store.ROOT / "fused_lstm/kernels"
    specs = (finder.find_spec("fused_lstm.kernels", [str(kernels.parent)]) for finder in sys.meta_path)
    if not any(spec and store.ROOT in Path(spec.origin or "/").resolve().parents for spec in specs):
        kernels.symlink_to("../kernels")


def environment(dry: bool, variables: dict[str, str]) -> dict[str, Any]:
    """store.environment() and what else a reader wants to know, from a process of its own, which may hang."""
    command = [sys.executable, "-m", "bench.gpu", "--about", *["--dry"] * dry]
    asked = Running("about", command, 90, variables, lambda text: None)
    while not asked.ended():
        time.sleep(0.02)
    outcome = asked.outcome()
    if outcome.status != "ok":
        raise SystemExit("\n".join([*asked.lines, f"asked for the device: {outcome.status}"]))
    return json.loads(asked.lines[-1])


def _about(dry: bool) -> dict[str, Any]:
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; make gpu DRY=1 runs without one")
    about = store.environment(torch.device("cpu" if dry else "cuda")) | {"numpy": version("numpy")}
    if not dry:
        device = torch.cuda.get_device_properties(0)
        about |= {"multiprocessors": device.multi_processor_count, "capability": f"{device.major}.{device.minor}"}
        about |= {"shared": device.shared_memory_per_block_optin, "l2": device.L2_cache_size}
    return about


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    names = [part.name for part in parts(False, Path())]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(names)}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU in Triton's interpreter")
    parser.add_argument(
        "--minutes", type=float, help="in all: what is not begun by then is not run (default: 9; dry: 20)"
    )
    parser.add_argument("--results", type=Path, help="folder (default: bench/results, a temporary one for --dry)")
    parser.add_argument("--smoke", choices=FORMS, metavar="FORM", help="only this form, in this process")
    parser.add_argument("--about", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(names):
        parser.error(f"no such part: {' '.join(sorted(unknown))}; there are {' '.join(names)}")
    return args


def main() -> int:
    """Runs the command line; returns 1 if a part that ran is not ok."""
    args = _arguments()
    if args.smoke or args.about:
        print(json.dumps(_about(args.dry))) if args.about else smoke(args.smoke, args.dry)
        return 0
    # Its parts are in groups of their own: what ends the driver must end them, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    link()
    variables = {name: value for name, value in os.environ.items() if name != "FUSED_LSTM_DEBUG"}
    # pytest cuts its lines at COLUMNS; torch wants the workspace where results are to be the same bits.
    variables |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "240"}
    variables |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if args.dry:
        variables["TRITON_INTERPRET"] = "1"
    from . import ahead

    compiled = ahead.ARCHIVE.with_name("cache")
    found = ahead.unpack(ahead.ARCHIVE, compiled)
    variables |= {"TRITON_CACHE_DIR": str(compiled), "TORCHINDUCTOR_CACHE_DIR": str(compiled.with_name("inductor"))}
    results = args.results or (Path(tempfile.mkdtemp()) if args.dry else store.ROOT / "bench/results")
    results = results.resolve()
    about = environment(args.dry, variables) | {"compiled ahead": found}
    folder = store.folder_for(results, about)
    asked = [part for part in parts(args.dry, results) if not args.parts or part.name in args.parts]
    minutes = args.minutes or (20.0 if args.dry else 9.0)
    outcomes = drive(asked, folder, about, minutes, args.dry, variables)
    print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}\n{folder}")
    return int(any(outcome.ran and outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
