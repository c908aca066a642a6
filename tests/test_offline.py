"""The compiled link: what plan.py can choose for an A100 and an H100 becomes machine code that keeps its promises.

Needs no GPU: bench.offline compiles for the device and reads the cubin, PTX and TTGIR.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.offline import DEVICES

ROOT = Path(__file__).parents[1]
DTYPES = {"fp16": ("fp16",), "bf16": ("bf16",), "tf32": ("fp32",), "tf32x3": ("fp32", "--ieee")}

# In each dtype: sizes of all three forms; padded and whole tiles, rows that no wide load divides.
SIZES = {
    "bf16": (20, 100, 130, 650, 2048),
    "tf32": (20, 130, 512, 2048),
    "tf32x3": (20, 64, 130, 650),
}
ALL_SIZES = (
    *(1, 3, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 80, 96, 100, 112, 127, 128, 129, 130, 144, 160, 192, 200, 224),
    *(255, 256, 257, 300, 320, 384, 400, 448, 500, 511, 512, 513, 576, 600, 640, 650, 700, 768, 800, 896, 960),
    *(1000, 1023, 1024, 1025, 1100, 1280, 1500, 1536, 1792, 2000, 2047, 2048),
)
ALL_BATCHES = (1, 16, 17, 32, 64, 128, 256, 1024)
VARIANTS = {
    "dense": (),
    "reverse": ("--reverse",),
    "packed": ("--packed",),
    "packed reverse": ("--packed", "--reverse"),
    "inference": ("--inference",),
}


def compiled(device, dtype, sizes, batches, *options):
    """The rows of bench.offline, from a process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    grid = ["--H", *map(str, sizes), "--B", *map(str, batches)]
    command = [sys.executable, "-m", "bench.offline", "--device", device, "--dtype", *DTYPES[dtype], *grid, *options]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, f"{process.stdout[-500:]}\n{process.stderr[-2000:]}"
    return [json.loads(line) for line in process.stdout.splitlines()]


def faults(row):
    """The promises that a compiled kernel breaks, in words."""
    if "error" in row:
        return [row["error"]]
    found, options, device = row["resources"], row["options"], DEVICES[row["device"]]
    forward, grid, step = row["kernel"] == "forward_kernel", row["mode"] == "grid", row["mode"] == "step"
    weights = triton.cdiv(row["H"], row["tiles"]["chunk"]) * (1 if forward else 4)
    # A step's own: the input gates; in backward the gates, c, c_prev, dy and dhn. From the other programs: h or
    # dgates, as many tiles as W_hh has. With offsets, one for each step that these belong to. W_hh is not among them.
    own, offsets = (4, 1) if forward else (8, 2)
    loads = own + grid * weights + row["packed"] * (offsets + grid)
    broken = {
        f"{found['spills']} spills in the time loop": found["spills"] > 0,
        f"{found['shared']} bytes of shared memory, of {device.shared}": found["shared"] > device.shared,
        f"{found['loads']} tiles loaded a step, not {loads}": not step and found["loads"] != loads,
        f"{found['resident']} tiles on chip, W_hh has {weights}": not step and found["resident"] < weights,
        "more programs than multiprocessors": grid
        and triton.cdiv(row["H"], row["tiles"]["units"]) > device.multiprocessors,
        "not cooperative": grid and not options["cooperative"],
        f"{options['stages']} stages: h may be loaded before its flag": options["stages"] != 1,
        f"{found['read_only']} loads past the coherent caches": found["read_only"] > 0,
        f"{found['acquires']} acquires and {found['releases']} releases in order": found["acquires"] != grid
        or found["releases"] != grid,
    }
    return [fault for fault, is_broken in broken.items() if is_broken]


def check(rows):
    failures = [f"{fault}: {row}" for row in rows for fault in faults(row)]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_plans(device, dtype):
    rows = compiled(device, dtype, SIZES[dtype], (1, 64))
    assert {row["mode"] for row in rows} == {"local", "grid", "step"}
    check(rows)


@pytest.mark.parametrize("variant", ["packed reverse", "inference"])
def test_variants(variant):
    check(compiled("H100", "bf16", (20, 136), (64,), *VARIANTS[variant]))


def test_bounded_waits(monkeypatch):
    monkeypatch.setenv("FUSED_LSTM_DEBUG", "1")
    check(compiled("H100", "bf16", (136,), (64,)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_all_plans(device, dtype, variant):
    check(compiled(device, dtype, ALL_SIZES, ALL_BATCHES, *VARIANTS[variant]))
