"""One step of a stack without a GPU: what the machine code of its kernel takes, and how long it is simulated to take.

Rows of bench/results/offline, beside those of offline.py, which writes them: `python -m bench.offline`.
"""

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

from fused_lstm.kernels import one_step
from fused_lstm.kernels.choice import kind_of, precision_of
from fused_lstm.kernels.exchange import Exchange
from fused_lstm.kernels.one_step import Prepared
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.plan_of_step import plan_for
from fused_lstm.kernels.sync import Sync
from fused_lstm.kernels.tiles import DEVICES, H100, Device, Problem

from . import simulate
from .cases import STACKS
from .offline import ALL, DTYPES, NARROW_POINTERS, POINTERS, Row, compile_typed, read, side_by_side, usage, write
from .sources import hash_of

CASES = [
    *(("H100", dtype, L, H, B, 1, 0) for (L, H), dtype, B in product(STACKS, ("bf16", "tf32"), (1, 4, 16))),
    *((device, "bf16", L, H, 1, 1, 0) for device, (L, H) in product(("A100", "B200", "L4"), STACKS)),
    *(
        ("H100", dtype, *case)
        for dtype in ("bf16", "tf32", "fp32")
        for case in ((2, 512, 1, 2, 0), (2, 1024, 16, 1, 256))
    ),
    *((device, "fp32", 2, H, 16, 1, 0) for device in ("A100", "H100", "B200", "L4") for H in (20, 131, 650, 1024)),
    *((device, "bf16", 1, H, 4097, 1, 0) for device in ("H100", "MI300X", "RX 7900 XTX") for H in (131, 650, 4096)),
    *((device, "fp32", 1, H, 4097, 1, 0) for device in ("MI300X", "RX 7900 XTX") for H in (131, 650)),
]
# Of weights in 8 bits.
NARROW = [
    *(("H100", dtype, L, H, B, 1, 0) for (L, H), dtype, B in product(STACKS, ("bf16", "fp16"), (1, 16))),
    *(("H100", dtype, 2, H, 16, 1, 0) for dtype in ("bf16", "tf32", "fp32") for H in (131, 650)),
    *(("H100", dtype, 2, 1024, 16, 1, 0) for dtype in ("tf32", "fp32")),
    *((device, "bf16", 2, 160, 1, 1, 0) for device in ("B200", "L4")),
]
NAMES = "device", "dtype", "L", "H", "B", "D", "P", "weights"


def plan_of(row: Row) -> tuple[Plan, Device, Any]:
    """The plan of a row, its device and its torch dtype."""
    (dtype, ieee), device = DTYPES[row["dtype"]], ALL[row["device"]]
    problem = Problem(kind_of(dtype, ieee), row["H"], False, row["D"], row["L"], row["P"])
    return plan_for(precision_of(dtype, ieee, device), problem, row["B"], dtype.itemsize, device), device, dtype


def tiles_of(row: Row) -> list[int]:
    """Batch rows, units, chunk and warps of a row's plan."""
    tiles = plan_of(row)[0].forward
    assert tiles is not None
    return [tiles.batch, tiles.units, tiles.chunk, tiles.warps]


def compile_row(row: Row) -> tuple[CompiledKernel, Prepared]:
    """Compiles the first launch of a row, of I = H input features, as its launcher would."""
    plan, device, dtype = plan_of(row)
    H, R = row["H"], plan.layers * row["D"]
    prepared = Prepared(plan, device, dtype, R, (row["B"], H, H, row["P"] or H))
    made = prepared.kernels[True] or prepared.kernels[False]
    own = POINTERS[dtype]
    of_all = (own,) * R
    integers = {2: "*i16", 4: "*i32"}[dtype.itemsize]
    types = dict.fromkeys(("x", "h0", "c0", "y", "hn", "cn"), own)
    types |= dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), of_all)
    types |= dict.fromkeys(("scale_ih", "scale_hh"), of_all if row["weights"] else None)
    if row["weights"]:
        types |= dict.fromkeys(("weight_ih", "weight_hh"), (NARROW_POINTERS[row["weights"]],) * R)
    types |= {"weight_hr": of_all if row["P"] else None, "sync": Sync(None, None, None)}
    types["exchange"] = Exchange(own, integers) if prepared.slots else Exchange(None, None)
    return compile_typed(device, made.kernel, types, made.constants, made.options), prepared


def bytes_of(row: Row) -> int:
    """Bytes of the weights that a step of few rows loads once."""
    H, D, out, size = row["H"], row["D"], row["P"] or row["H"], DTYPES[row["dtype"]][0].itemsize
    weights = 4 * H * (out * row["L"] + H + D * out * (row["L"] - 1))
    return D * (weights * (1 if row["weights"] else size) + H * row["P"] * row["L"] * size)


def simulated(row: Row, kernel: CompiledKernel, prepared: Prepared) -> dict[str, int]:
    """Cycles of a launch on an H100: until the first layer has left its h, from a layer to the next one, and of all."""
    programs, B = prepared.programs, {"B": row["B"]}
    program = min(1, programs[0] - 1), 0

    def run(layer: int, arrives: float = 0.0) -> simulate.Run:
        return simulate.simulate_once(kernel, B, programs, (*program, layer), arrives=arrives)

    # One program of a multiprocessor is simulated. If there are more, L2 takes at least this long to give the weights.
    least = bytes_of(row) * -(-row["B"] // prepared.rows) / simulate.Clocks().l2_bytes
    first, layers = run(0), programs[2]
    if layers == 1:
        return {"all": round(max(least, first.ended))}
    hop = run(1, first.left).left - first.left if layers > 2 else 0
    last = run(layers - 1, first.left).ended + (layers - 2) * hop
    return {"first": round(first.left), "hop": round(hop), "all": round(max(least, last))}


def answered(row: Row) -> Row:
    """A row with what its kernel takes and, on an H100, the simulated cycles."""
    kernel, prepared = compile_row(row)
    plan, _, _ = plan_of(row)
    found = {"tiles": tiles_of(row), "launches": -(-row["L"] // plan.layers)}
    found |= {"usage": usage(kernel), "programs": prepared.programs, "bytes": bytes_of(row)}
    if DEVICES.get(row["device"]) == H100 and plan.layers == row["L"] and row["B"] <= 16 and not row["P"]:
        found["simulated"] = simulated(row, kernel, prepared)
    return row | found


def rows_of() -> Iterator[Row]:
    """What is to be compiled."""
    wide = ((*case, "") for case in CASES)
    narrow = ((*case, weights) for weights in NARROW_POINTERS for case in NARROW)
    others = ("A100", "bf16", 2, 160, 1, 1, 0, "int8"), ("MI300X", "bf16", 1, 650, 16, 1, 0, "int8")
    return (dict(zip(NAMES, case, strict=True)) for case in (*wide, *narrow, *others))


def key(row: Row) -> str:
    return " ".join(str(row[name]) for name in NAMES)


def path_of(results: Path) -> Path:
    return results / f"steps-{triton.__version__}.jsonl"


@cache
def source() -> str:
    """A hash of the code that the kernel is compiled of."""
    return hash_of(one_step.one_step_kernel)


def tabulate(results: Path) -> bool:
    """Brings the installed Triton's file up to date; returns whether all of it passes."""
    path = path_of(results)
    known = {key(row): row for row in read(path) if row["source"] == source()}
    found = []
    for row in rows_of():
        before = known.get(key(row))
        if before is None or before["tiles"] != tiles_of(row):
            before = answered(row) | {"source": source()}
            print(key(before), before["usage"], before.get("simulated"), flush=True)
        found.append(before)
        write(path, found)
    return not any(row["usage"]["stack"] for row in found)


def table(results: Path) -> list[str]:
    """The lines of the table of all Tritons' files."""
    files = {path.stem.removeprefix("steps-"): read(path) for path in sorted(results.glob("steps-*.jsonl"))}
    by_key: dict[str, list[Row]] = {}
    for of_version in files.values():
        for row in of_version:
            by_key.setdefault(key(row), []).append(row)
    head = "layers | H | B | directions | features of a projection | device | dtype | weights | launches | programs"
    head += " | tiles | registers | spills | shared KiB | weights KiB"
    times = "first µs | a layer more µs | all µs"
    lines = ["", "## One step of a stack", ""]
    lines += [
        f"The kernel of one step, of as many input features as hidden units, with Triton {', '.join(files)}. Tiles:",
        "batch rows, units, chunk, warps. The last columns are simulated by `bench/simulate.py`, of an H100 at 1.83",
        "GHz whose L2 has the weights: from the beginning of the first program until others see the first layer's h,",
        "from there to that of the layer above, and until the last program ends, at least as long as L2 takes to give",
        "all weights. How long a launch takes to begin is not in it. NVIDIA's kernels of STAC-ML take, in fp16 at B 1",
        "and beyond an empty round trip, 1.1 µs for 2 layers of 96, 2.3 for 3 of 160 and 10.8 for 4 of 736.",
        "",
        f"| {head} | {times} |",
        "| --- " * (head.count("|") + times.count("|") + 2) + "|",
    ]
    for versions in by_key.values():
        row = versions[0]
        of = [str(row[name]) for name in ("L", "H", "B", "D")]
        of += [str(row["P"] or "-"), row["device"], row["dtype"], row["weights"] or "as dtype", str(row["launches"])]
        of += ["x".join(map(str, row["programs"])), ", ".join(map(str, row["tiles"]))]
        used = [each["usage"] for each in versions]
        of += [side_by_side(str(each[name]) for each in used) for name in ("registers", "stack")]
        of += [side_by_side(f"{each['shared'] / 1024:.4g}" for each in used), f"{row['bytes'] / 1024:,.0f}"]
        for name in ("first", "hop", "all"):
            cycles = (each.get("simulated", {}).get(name) for each in versions)
            of.append(side_by_side(f"{each / 1830:.2f}" if each else "-" for each in cycles))
        lines.append(f"| {' | '.join(of)} |")
    return lines
