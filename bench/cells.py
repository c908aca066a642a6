"""The kernels of any cell in machine code, without a GPU: the second part of `python -m bench.offline`.

Compiles, of some cells of fused_lstm.cells, the kernels that are planned for chosen sizes, and writes what they take
into cells-*.jsonl of bench/results/offline, a file for each Triton. A cell of a user's is in no table: there what a
device refuses, or compiles with registers in memory, makes way for the next candidate as it is found out.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

from fused_lstm import cells
from fused_lstm.cells.compiled import compiled
from fused_lstm.kernels import cell as hand_written
from fused_lstm.kernels import (
    elementwise,
    launch,
    recurrent_backward,
    recurrent_forward,
    recurrent_latency_backward,
    recurrent_latency_forward,
)
from fused_lstm.kernels.equations import Equations
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.plan_of_cell import plan_on
from fused_lstm.kernels.tiles import DEVICES, H100, Tiles

from . import simulate
from .offline import (
    DTYPES,
    INTEGER_POINTERS,
    POINTERS,
    RECORDS,
    compile_typed,
    read,
    resources,
    side_by_side,
    write,
)
from .sources import hash_of

Row = dict[str, Any]

CELLS = "vanilla", "cifg", "gru", "slstm"
# With W_hh in shared memory, and in registers.
KERNELS: dict[str, tuple[Any, Any]] = {
    "forward": (
        recurrent_forward.recurrent_forward_kernel,
        recurrent_latency_forward.recurrent_latency_forward_kernel,
    ),
    "backward": (
        recurrent_backward.recurrent_backward_kernel,
        recurrent_latency_backward.recurrent_latency_backward_kernel,
    ),
}
# Devices, dtypes, H and B.
CASES = [
    *((device, "bf16", H, 16) for device in ("A100", "H100", "B200") for H in (64, 130, 512, 1024)),
    *(("H100", "bf16", H, 256) for H in (512, 2048)),
    *(("H100", dtype, H, 16) for dtype in ("tf32", "fp32") for H in (64, 512)),
]


def rows_of(cell: str) -> Iterator[Row]:
    """What is to be compiled of a cell: the planned kernels, each once."""
    for device, dtype, H, B in CASES:
        torch_dtype, ieee = DTYPES[dtype]
        plan = plan_on(DEVICES[device], compiled(getattr(cells, cell)), torch_dtype, B, H, ieee, 1)
        for kernel in KERNELS:
            tiles = asdict(plan.tiles(kernel == "backward"))
            row = {"cell": cell, "device": device, "dtype": dtype, "kernel": kernel, "mode": plan.mode}
            yield row | {"precision": plan.precision, "H": H, "B": B, "tiles": tiles}


def compile_row(row: Row, save: bool = True, resets: bool = False, lengths: bool = False) -> CompiledKernel:
    """Compiles the kernel of a row as its launcher would. save: with what backward needs."""
    tiles = Tiles(**row["tiles"])
    plan = Plan(row["mode"], tiles, tiles, 0, row["precision"], "")
    cell, device = compiled(getattr(cells, row["cell"])), DEVICES[row["device"]]
    in_registers = launch.weight_in_registers(plan.mode, tiles)
    kernel = KERNELS[row["kernel"]][in_registers]
    form = {"DIRECTIONS": row.get("directions", 1), "REVERSE": False, "CELL": cell}
    form["PAIRS"] = launch.compares_pairs(device.capability)
    made = launch.specialized(kernel, plan, tiles, row["H"], row["H"], **form)
    present = {"lengths": lengths, "order": lengths, "starts": resets}
    present |= {"flags": row["mode"] == "grid" and not in_registers, "zeros": in_registers and (lengths or resets)}
    types = types_of(cell, DTYPES[row["dtype"]][0], save, present)
    return compile_typed(device, kernel, types, made.constants, made.options)


def types_of(cell: Equations, dtype: torch.dtype, save: bool, present: dict[str, bool]) -> dict[str, Any]:
    """By an argument of any of the kernels its type, or those of its tensors; None: it is not there. present: of the
    records' tensors those that are there."""
    own = POINTERS[dtype]
    others = ("*fp32",) * (cell.states - 1)
    of_states, wide = (own, *others), ("*fp32",) * cell.states
    types = {name: INTEGER_POINTERS.get(name, own) if is_there else None for name, is_there in present.items()}
    records = {
        name: record(*(types.get(field) for field in record._fields))
        for name, record in RECORDS.items()
        if name in ("layout", "sync")
    }
    return records | {
        "x": own,
        "weight_hh": own,
        "bias_hh": own if cell.apart else None,
        "vectors": (own,) * cell.vectors or None,
        "initial": of_states,
        "resets": of_states if present["starts"] else None,
        "steps": of_states if save else (own, *(None for _ in others)),
        "kept": own if cell.kept and save else None,
        "ends": of_states,
        "dsteps": (own, *(None for _ in others)),
        "dends": of_states,
        "dr": own,
        "dx": own if cell.apart else None,
        "dinitial": wide,
        "dresets": wide if present["starts"] else None,
        "dvectors": ("*fp32",) * cell.vectors or None,
    }


def answered(row: Row) -> Row:
    """A row with what its kernel takes and, of an H100, the simulated cycles of a step."""
    kernel = compile_row(row)
    found: Row = {"resources": asdict(resources(kernel))}
    if DEVICES[row["device"]] == H100 and row["mode"] != "step":
        tiles = Tiles(**row["tiles"])
        plan = Plan(row["mode"], tiles, tiles, H100.multiprocessors, row["precision"], "")
        timing, why = simulate.simulate_plan(kernel, row["kernel"], plan, row["H"], row["B"])
        _, launches = simulate.launches_of(plan, row["kernel"], row["H"], row["B"], H100)
        found["simulated"] = {"why": why} if timing is None else {"cycles": round(launches * timing.cycles)}
    return row | found


def path_of(results: Path) -> Path:
    return results / f"cells-{triton.__version__}.jsonl"


def key(row: Row) -> str:
    tiles = " ".join(str(value) for value in row["tiles"].values())
    return " ".join(str(row[name]) for name in ("cell", "device", "dtype", "kernel", "mode", "H", "B")) + f" {tiles}"


@cache
def source() -> str:
    """A hash of the code that the kernels are compiled of, beside a cell's equations."""
    return hash_of(*(kernel for pair in KERNELS.values() for kernel in pair), elementwise, hand_written)


def tabulate(results: Path) -> bool:
    """Brings the installed Triton's file up to date; returns whether all of it passes."""
    path = path_of(results)
    known = {key(row): row for row in read(path) if row["source"] == source()}
    found = []
    for cell in CELLS:
        hashed = compiled(getattr(cells, cell)).name
        for row in rows_of(cell):
            row |= {"source": source(), "equations": hashed}
            if (before := known.get(key(row))) is None or before["equations"] != hashed:
                before = answered(row)
                print(key(before), before["resources"]["registers"], before["resources"]["spills"], flush=True)
            found.append(before)
        write(path, found)
    return not any(row["resources"]["spills"] for row in found)


def table(results: Path) -> list[str]:
    """The lines of the table of all Tritons' files."""
    files = {path.stem.removeprefix("cells-"): read(path) for path in sorted(results.glob("cells-*.jsonl"))}
    by_key: dict[str, list[Row]] = {}
    for of_version in files.values():
        for row in of_version:
            by_key.setdefault(key(row), []).append(row)
    head = "cell | device | dtype | pass | form | H | B | tiles | registers | spills | shared KiB | instructions"
    lines = ["", "## Any cell", ""]
    lines += [
        "The kernels of `kernels/recurrent_*.py`, which take a cell's equations: of some that come with fused_lstm, at",
        f"chosen sizes, with Triton {', '.join(files)}. Tiles as above.",
        "",
        f"| {head} | simulated µs |",
        "| --- " * (head.count("|") + 2) + "|",
    ]
    for versions in by_key.values():
        row, found = versions[0], [each["resources"] for each in versions]
        tiles = row["tiles"]
        shape = [str(tiles[name]) for name in ("batch", "units", "chunk", "warps")]
        shape += [f"kept {tiles['kept']}"] if tiles["kept"] else []
        shape += ["polled"] if tiles["poll"] else []
        cells_of = [
            *(str(row[name]) for name in ("cell", "device", "dtype", "kernel", "mode", "H", "B")),
            ", ".join(shape),
        ]
        cells_of += [side_by_side(str(each[name]) for each in found) for name in ("registers", "spills")]
        cells_of.append(side_by_side(f"{each['shared'] / 1024:.4g}" for each in found))
        cells_of.append(side_by_side(str(each["instructions"]) for each in found))
        cycles = (each.get("simulated", {}).get("cycles") for each in versions)
        cells_of.append(side_by_side("-" if each is None else f"{each / 1830:.2f}" for each in cycles))
        lines.append(f"| {' | '.join(cells_of)} |")
    return lines
