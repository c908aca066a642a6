"""`python -m bench.run`: the sweep on a CUDA device, or on a machine without one the CPU path in pytest-benchmark.

A worker process measures row by row and a supervisor watches the file grow: a kernel that hangs or takes the CUDA
context down costs its own row and not the rest of the sweep. A dry run's times are the interpreter's and mean nothing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from . import cases, report, store, worker
from .measure import measure, row
from .providers import BASELINE, PROVIDERS
from .worker import RESTART, STALL, lost

Work = list[tuple[cases.Case, str]]


def todo(work: Work, path: Path, environment: dict[str, Any]) -> Work:
    """Returns the part of `work` that has no row of this environment in the file yet."""
    done = {(cases.Case(**row["case"]), row["provider"]) for row in store.read(path, environment)}
    return [item for item in work if item not in done]


def sweep(
    work: Work, path: Path, device: torch.device, environment: dict[str, Any], until: float, seconds: float
) -> int:
    """Measures what the file has no row of yet, in order, until the deadline.

    Args:
        work: pairs of case and provider.
        path: the results file.
        device: to measure on.
        environment: store.environment(device).
        until: the deadline in seconds since the epoch; a row that is begun is finished.
        seconds: time spent on the rounds of one row.

    Returns:
        0, or RESTART if the device can only be used again by a new process.
    """
    for case, provider in todo(work, path, environment):
        if time.time() >= until:
            break
        measured = measure(case, provider, device, environment, seconds)
        store.append(path, measured)
        print(f"{provider} {case.dtype} {case.mode} {case.shape} B{case.B}: {measured['status']}", flush=True)
        if measured["status"] != "ok" and lost(device):
            return RESTART
    return 0


def supervise(
    command: list[str], work: Work, path: Path, environment: dict[str, Any], until: float, stall: float = STALL
) -> None:
    """Runs the worker `command` until it has measured all of `work`, or until the deadline.

    Args:
        command: starts a worker that runs sweep() over the same work, file and environment.
        work, path, environment, until: as of sweep().
        stall: seconds without a new row after which the worker is killed; its row is then a failed one.
    """

    def fail(item: tuple[cases.Case, str], why: str) -> None:
        store.append(path, row(*item, environment, "failed", why))

    worker.supervise(command, path, lambda: todo(work, path, environment), fail, until, stall)


def work(listed: list[cases.Case], names: Collection[str] = PROVIDERS) -> Work:
    """Each case with every installed provider of `names` that runs it, and nn.LSTM beside it in each row.

    fused_lstm on all cases comes first: a deadline cuts off others. Then, case by case, ours and nn.LSTM called in
    another way, and last what others wrote.
    """

    def later(item: tuple[cases.Case, str]) -> int:
        return 0 if item[1] == "fused_lstm" else 1 if item[1].startswith(("fused_lstm", BASELINE)) else 2

    installed = {name: PROVIDERS[name] for name in PROVIDERS if name in names and PROVIDERS[name].installed()}
    runs = [(case, name) for case in listed for name, provider in installed.items() if provider.runs(case)]
    return sorted(runs, key=later)


def cpu(path: Path) -> int:
    """Runs the CPU path in pytest-benchmark and keeps its rows in a file; returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "report.json")
        options = ["--benchmark-enable", "--benchmark-columns=median,iqr,rounds", "-q"]
        status = pytest.main([str(store.ROOT / "bench/test_cpu.py"), f"--benchmark-json={result}", *options])
        benchmarks = json.loads(result.read_text())["benchmarks"] if result.exists() else []
    for benchmark in benchmarks:
        store.append(path, benchmark["extra_info"]["row"])
    return int(status)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dry", action="store_true", help="tiny cases on the CPU in Triton's interpreter")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", choices=PROVIDERS, default=list(PROVIDERS), help="default: all"
    )
    parser.add_argument("--results", type=Path, help="folder (default: bench/results, a temporary one for --dry)")
    parser.add_argument("--until", type=float, default=time.time() + 420, help="deadline, seconds since the epoch")
    parser.add_argument(
        "--stall",
        type=float,
        default=STALL,
        help=f"seconds without a new row that count as hung (default: {STALL:.0f})",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has a row of")
    # The supervisor's environment: an edit of the source while the sweep runs must not split its rows in two.
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Runs the command line; returns 1 if a row of ours was refused or failed, and from a dry run also if one lacks."""
    args = _arguments()
    kind = "cpu" if args.dry else args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    device = torch.device(kind)
    environment = args.worker or store.environment(device) | ({"dry": True} if args.dry else {})
    results = args.results or (Path(tempfile.mkdtemp()) if args.dry else store.ROOT / "bench/results")
    path = store.folder_for(results, environment) / "sweep.jsonl"
    listed = work(cases.DRY if args.dry else cases.GPU, args.providers)
    if args.worker:
        return sweep(listed, path, device, environment, args.until, seconds=0.0 if args.dry else 0.6)

    if kind == "cpu" and not args.dry:
        if args.providers != list(PROVIDERS):
            raise SystemExit("--providers is of the GPU sweep and its dry run")
        store.forget(path, environment)
        failed = cpu(path)
    else:
        if args.fresh:
            store.forget(path, environment)
        if args.dry:
            # One thread: at these sizes threads only wait for each other, for seconds on a busy machine.
            os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.run", "--worker", json.dumps(environment), "--device", kind]
        command += ["--results", str(results), "--until", str(args.until), *["--dry"] * args.dry]
        command += ["--providers", *args.providers]
        supervise(command, listed, path, environment, args.until, args.stall)
        rows = store.read(path, environment)
        lacking = len(todo(listed, path, environment))
        print(f"\n{path}: {len(listed) - lacking} of {len(listed)} rows{'; the same command goes on' * bool(lacking)}")
        failed = any(row["status"] != "ok" for row in rows if row["provider"].startswith("fused_lstm"))
        failed |= args.dry and lacking > 0
    missing = [name for name in args.providers if not PROVIDERS[name].installed()]
    print(f"\nnot installed, so not measured: {', '.join(missing)}\n" if missing else "")
    if path.exists():
        print(report.write(path.parent))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
