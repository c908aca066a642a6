"""The supervision of a worker process: what hangs or takes the CUDA context down costs one row and not the rest."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")

# Seconds without a new row after which a worker counts as hung; a first row imports torch and compiles kernels.
STALL = 90.0
# Seconds past the deadline that a row in progress may still take.
GRACE = 15.0
# A worker's exit status when its CUDA context is lost.
RESTART = 3


def lost(device: torch.device) -> bool:
    """Whether this process can use the device no more."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def watch(worker: subprocess.Popen, path: Path, until: float, stall: float) -> str:
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
    command: list[str],
    path: Path,
    todo: Callable[[], Sequence[Item]],
    fail: Callable[[Item, str], None],
    until: float,
    stall: float = STALL,
) -> None:
    """Runs a worker until it has measured all, or until the deadline; one that ends before is followed by another.

    Args:
        command: starts a worker, which measures what todo() returns in its order and writes rows to a file.
        path: the file.
        todo: what the file has no row of yet.
        fail: writes the row of an item at which a worker hung or died, with the reason.
        until: the deadline in seconds since the epoch.
        stall: seconds without a new row after which a worker is killed.
    """
    while todo() and time.time() < until:
        worker = subprocess.Popen(command)
        try:
            failure = watch(worker, path, until, stall)
        finally:
            worker.kill()
        if failure and failure != "deadline":
            fail(todo()[0], failure)
