"""`python -m bench.run`: the sweep on a CUDA device, or on a machine without one the CPU path in pytest-benchmark.

A worker process measures row by row and a supervisor watches the file grow: a kernel that hangs or takes the CUDA
context down costs its own row and not the rest of the sweep.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from . import cases, store
from .measure import measure, row
from .providers import PROVIDERS
from .table import table

Work = list[tuple[cases.Case, str]]

# Seconds without a new row after which a worker counts as hung; a first row imports torch and compiles kernels.
STALL = 90.0
# Seconds past the deadline that a row in progress may still take.
GRACE = 15.0
# A worker's exit status when its CUDA context is lost.
RESTART = 3


def todo(work: Work, path: Path, environment: dict[str, Any]) -> Work:
    """Returns the part of `work` that has no row of this environment in the file yet."""
    done = {(cases.Case(**row["case"]), row["provider"]) for row in store.read(path, environment)}
    return [item for item in work if item not in done]


def _lost(device: torch.device) -> bool:
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


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
        if measured["status"] == "failed" and _lost(device):
            return RESTART
    return 0


def _watch(worker: subprocess.Popen, path: Path, until: float, stall: float) -> str:
    """Waits for a worker; returns what ended its row: "" (nothing), "deadline" or the failure in words."""
    size, grown = -1, time.time()
    while worker.poll() is None:
        now, before = time.time(), size
        size = path.stat().st_size if path.exists() else 0
        if size != before:
            grown = now
        if now > until + GRACE or now > grown + stall:
            worker.kill()
            worker.wait()
            return "deadline" if now > until + GRACE else f"no result after {stall:.0f} s: killed"
        time.sleep(0.1)
    if worker.returncode in (0, RESTART):
        return ""
    if worker.returncode < 0:
        return f"process ended by signal {-worker.returncode}"
    # An exception outside of a row: the next worker would meet it again.
    raise SystemExit(f"the worker failed with status {worker.returncode}")


def supervise(
    command: list[str], work: Work, path: Path, environment: dict[str, Any], until: float, stall: float = STALL
) -> None:
    """Runs the worker `command` until it has measured all of `work`, or until the deadline.

    Args:
        command: starts a worker that runs sweep() over the same work, file and environment.
        work, path, environment, until: as of sweep().
        stall: seconds without a new row after which the worker is killed; its row is then a failed one.
    """
    while (rest := todo(work, path, environment)) and time.time() < until:
        worker = subprocess.Popen(command)
        try:
            failure = _watch(worker, path, until, stall)
        finally:
            worker.kill()
        if failure and failure != "deadline":
            case, provider = todo(rest, path, environment)[0]
            store.append(path, row(case, provider, environment, "failed", failure))


def cpu() -> int:
    """Runs the CPU path in pytest-benchmark, which keeps its results in .benchmarks; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ["--benchmark-enable", "--benchmark-autosave", "--benchmark-columns=median,iqr,rounds", "-q"]
        status = pytest.main([str(store.ROOT / "bench/test_cpu.py"), f"--benchmark-json={report}", *options])
        benchmarks = json.loads(report.read_text())["benchmarks"] if report.exists() else []
    print("\n" + table([benchmark["extra_info"]["row"] for benchmark in benchmarks]))
    return int(status)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dry", action="store_true", help="tiny cases on the CPU in Triton's interpreter")
    parser.add_argument("--results", type=Path, help="folder (default: bench/results, a temporary one for --dry)")
    parser.add_argument("--until", type=float, default=time.time() + 420, help="deadline, seconds since the epoch")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has a row of")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    # The supervisor's environment: an edit of the source while the sweep runs must not split its rows in two.
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Runs the command line; returns 1 if a row was refused or failed, and from a dry run also if one is missing."""
    args = _arguments()
    if args.table:
        rows = store.read(args.table)
        print(table(store.read(args.table, rows[-1]["environment"]) if rows else []))
        return 0
    kind = "cpu" if args.dry else args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu" and not args.dry:
        return cpu()
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")

    device = torch.device(kind)
    environment = args.worker or store.environment(device)
    folder = args.results or (Path(tempfile.mkdtemp()) if args.dry else store.ROOT / "bench/results")
    path = store.file_for(folder, environment)
    work = [(case, provider) for case in (cases.DRY if args.dry else cases.GPU) for provider in PROVIDERS]
    if args.worker:
        return sweep(work, path, device, environment, args.until, seconds=0.0 if args.dry else 0.6)

    if args.fresh:
        store.forget(path, environment)
    if args.dry:
        # One thread: at these sizes threads only wait for each other, for seconds on a busy machine.
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.run", "--worker", json.dumps(environment), "--device", kind]
    command += ["--results", str(folder), "--until", str(args.until), *["--dry"] * args.dry]
    supervise(command, work, path, environment, args.until)
    rows = store.read(path, environment)
    print(f"\n{path}: {len(rows)} of {len(work)} rows{'; the same command goes on' * (len(rows) < len(work))}\n")
    print(table(rows))
    return int(any(row["status"] != "ok" for row in rows) or (args.dry and len(rows) < len(work)))


if __name__ == "__main__":
    raise SystemExit(main())
