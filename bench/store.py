"""Results files: JSON Lines, one row a line, each written out as soon as it is measured."""

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fused_lstm.kernels.environment import TRITON

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _source() -> str:
    """A hash of the code that makes a time: unlike the commit, it is there without git and sees an uncommitted edit."""
    files = [ROOT / "bench" / name for name in ("measure.py", "providers.py", "timing.py")]
    files += sorted(path for folder in ("fused_lstm", "kernels") for path in (ROOT / folder).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def smi(field: str) -> str | None:
    """One field of nvidia-smi for the first GPU."""
    output = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return output.splitlines()[0] if output else None


def clock() -> float | None:
    """The multiprocessors' clock of the first GPU at this moment, in MHz; None without nvidia-smi."""
    mhz = smi("clocks.sm")
    return float(mhz) if mhz and mhz.isdigit() else None


def _processor() -> str:
    """The CPU's model, and how many threads torch uses on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """What a time depends on: device, driver, highest clocks (MHz), power limit (W), versions, git commit (None without
    git), hash of the source."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "driver": smi("driver_version") if cuda else None,
        "clock": smi("clocks.max.sm") if cuda else None,
        "memory_clock": smi("clocks.max.mem") if cuda else None,
        "power": smi("power.limit") if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": TRITON,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "source": _source(),
    }


def folder_for(results: Path, environment: dict[str, Any]) -> Path:
    """Returns the device's own folder in a folder of results: sweep.jsonl, lab.jsonl and what is made from them."""
    return results / re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")


def append(path: Path, row: Row) -> None:
    """Adds a row and has it on disk on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, environment: dict[str, Any] | None = None) -> list[Row]:
    """Returns the rows of a file, none if it does not exist; with an environment, only the rows measured in it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if environment in (None, row["environment"])]


def forget(path: Path, environment: dict[str, Any]) -> None:
    """Removes the rows that were measured in an environment."""
    kept = [row for row in read(path) if row["environment"] != environment]
    if path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
