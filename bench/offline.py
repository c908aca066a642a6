"""What machine code says without a GPU: compiles the kernels for a compute capability and reads their resources.

`python -m bench.offline` compiles one kernel for each group of sizes that the plans treat alike, over H 1 to 2048 and
B 1 to 8192, for A100, H100 and B200. Where one fails it lowers the limit that the plans keep to (limits.py),
kernels/limits.json, until all that are planned pass. Then it writes bench/results/offline: a JSON Lines file for the
installed Triton and a table over all of them. Cut short, it goes on where it was. The other devices of kernels/tiles.py
have limits and no table: `--explore`, with their `--target`.
With `--H` or `--groups` it prints the rows of chosen sizes or groups instead, with `--beside` what the kernels beside
the recurrence take. Exit status 1: a kernel was not compiled, spills or does not fit.

H is a constant of the kernels, so one size stands for a group, the largest of those of its class: where no 16-byte load
divides a row odd and even ones are apart, because an odd H has the narrowest loads, and so the most addresses to hold;
elsewhere those that the chunk divides, powers of two with their simpler addresses apart, and those that have masks.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from itertools import product as pairs
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel

from fused_lstm.kernels import (
    backward,
    dropout,
    forward,
    latency_backward,
    latency_forward,
    launch,
    layout,
    operands,
    scan,
    sync,
    throughput_backward,
    throughput_forward,
)
from fused_lstm.kernels.choice import choose_kernel, choose_narrow, projects
from fused_lstm.kernels.limits import class_of, target
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.tiles import AMD, DEVICES, H100, Device, Problem, Tiles, without_exchange

from . import limits, model, simulate
from .absent import gpu_target
from .sass import disassemble, parse, time_loop, tool, width
from .sources import hash_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "offline"
Row = dict[str, Any]

# A torch dtype, and whether its products are in full precision.
DTYPES = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, False),
    "fp32": (torch.float32, True),
}
# By a kernel's argument the record that it is.
RECORDS: dict[str, Any] = {"layout": layout.LayoutTensors, "stack": layout.Stack, "sync": sync.Sync}
# With W_hh in shared memory, in registers, and for row tiles in turn.
KERNELS = {
    "forward": (
        forward.forward_kernel,
        latency_forward.latency_forward_kernel,
        throughput_forward.throughput_forward_kernel,
    ),
    "backward": (
        backward.backward_kernel,
        latency_backward.latency_backward_kernel,
        throughput_backward.throughput_backward_kernel,
    ),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
NARROW_POINTERS = {"int8": "*i8", "fp8": "*fp8e4nv"}
# The products, and the directions, layers, features of a projection and weights of a launch that the table covers: fp16
# has the tiles of bf16, fp8 those of int8, and other numbers of layers have no others.
PRODUCTS = ("bf16", "tf32", "fp32")
LaunchOf = tuple[int, int, int, str]
LAUNCHES: tuple[LaunchOf, ...] = ((1, 1, 0, ""), (1, 2, 0, ""), (1, 4, 0, ""), (1, 1, 0, "int8"))
# Of projections in the kernel: H, and P.
PROJECTIONS = tuple(pairs((1800, 2560, 4096), (136, 512, 1024)))
# The phase of a kernel that projects, by the column `half`.
PHASES = {"": "", "CELL": "cell", "PROJECT": "projection"}
TENSOR_MEMORY = 512  # columns that a multiprocessor with tcgen05 has
IN_ACCUMULATOR = {"cn", "c", "c0", "dc0", "c_reset", "dc_reset", "products", "keep", "keep_prob"}
INTEGER_POINTERS = {
    "flags": "*i32",
    "team_flags": "*i32",
    "timeout_info": "*i32",
    "lengths": "*i64",
    "offsets": "*i64",
    "order": "*i64",
    "seed": "*i64",
    "starts": "*i1",
}

# Every size to 130, and beyond those around which the plans may change: what fits in whole chunks on a multiprocessor,
# and in 8 or 16 units each on all of a device. Beside each bound the largest of each class below it.
BOUNDS = {*range(192, 2049, 64), *(units * device.multiprocessors for units in (8, 16) for device in DEVICES.values())}
SIZES = [*range(1, 131), *sorted(bound - less for bound in BOUNDS if bound <= 2048 for less in (0, 1, 2, 4, 8))]
BATCHES = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 8192)

# What makes two rows of one Triton the same compile, and what names a group in the table.
COMPILE = ("target", "dtype", "weights", "kernel", "mode", "precision", "tiles", "stack", "H", "proj", "half")
GROUP = (*COMPILE, "devices", "class", "H_range", "B_range")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. In the time loop: of the step form's inner loop, one turn."""

    registers: int  # a thread
    shared: int  # bytes a program
    tensor: int  # columns of tensor memory a program, which tcgen05 sums in
    spills: int  # loads and stores of spilled registers in the time loop
    matrix: dict[str, int]  # matrix instructions in the time loop: HMMA, HGMMA (wgmma), UTCHMMA (tcgen05)
    barriers: int  # in the time loop
    instructions: int  # in the time loop
    loaded: int  # bytes of global memory, by all threads of a program in the time loop if no mask hides any
    stored: int
    resident: int  # tiles laid out in shared memory before the time loop
    loads: int  # tiles loaded in the time loop
    acquires: int  # of a flag, with a barrier between it and the loads that it allows
    releases: int  # of a flag, with a barrier between it and the stores that it publishes
    early: int  # polled loads in the time loop, of 16 bytes, that stand before the first store in it
    read_only: int  # loads past the coherent caches, which may miss what another program has just written


def place_of(tiles: Tiles, mode: str) -> int:
    """Where in KERNELS the kernel of a pass stands that runs under its tiles."""
    return 2 if tiles.in_turn else int(launch.weight_in_registers(mode, tiles))


def compile_kernel(
    name: str,
    plan: Plan,
    H: int,
    dtype: torch.dtype,
    device: Device,
    *,
    reverse: bool = False,
    packed: bool = False,
    lengths: bool = False,
    reset: bool = False,
    drop: bool = False,
    save: bool = True,
    out: int = 0,
    half: str = "",
) -> CompiledKernel:
    """Compiles a kernel of KERNELS as its launcher would, for a device that need not be there."""
    tiles = getattr(plan, name)
    place = place_of(tiles, plan.mode)
    in_registers, kernel = place == 1, KERNELS[name][place]
    stack = plan.layers > 1
    form = {"PHASE": PHASES[half], "DIRECTIONS": plan.directions, "REVERSE": reverse}
    form["PAIRS"] = launch.compares_pairs(device.capability)
    made = launch.specialized(kernel, plan, tiles, H, out or H, **form)
    ragged = packed or lengths or reset
    taken = {
        ("c", "gates"): (save and not plan.weights) or name == "backward",
        ("scale",): plan.weights != "",
        ("lengths",): packed or lengths,
        ("offsets",): packed,
        ("order",): lengths and not packed,
        ("weight_ih", "bias"): stack,
        ("seed", "keep", "dropped"): drop,
        ("starts", "c_reset", "dc_reset"): reset,
        ("dc_steps",): False,
        ("flags",): plan.mode == "grid" and not tiles.poll,
        ("products",): tiles.team > 1,
        ("weight_hr", "unprojected", "dh_steps"): bool(out),
        ("team_flags",): tiles.team > 1 and not tiles.poll,
        ("timeout_info",): made.constants["MAX_SPINS"] > 0,
        ("zeros",): in_registers and (ragged or stack or plan.mode == "step"),
    }
    absent = [name for names, is_taken in taken.items() if not is_taken for name in names]
    in_accumulator = IN_ACCUMULATOR - ({"c0"} if name == "forward" else set())
    if in_registers:
        in_accumulator -= {"products"}
    narrow = {"weight_hh": NARROW_POINTERS[plan.weights]} if plan.weights else {}
    return compile_for(device, kernel, dtype, made.constants, absent, made.options, in_accumulator, narrow)


def compile_for(
    device: Device,
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    absent: Iterable[str],
    options: dict[str, Any],
    in_accumulator: Iterable[str] = IN_ACCUMULATOR,
    others: Mapping[str, str] = MappingProxyType({}),
) -> CompiledKernel:
    """Compiles any kernel, with its constexpr arguments; absent: the pointers that are None, of those it has and of
    those in its records. others: the types of some."""

    def pointer(name: str) -> str | None:
        default = "*fp32" if name in in_accumulator else "*i64" if name == "products" else POINTERS[dtype]
        return None if name in absent else others.get(name) or INTEGER_POINTERS.get(name, default)

    types: dict[str, Any] = {name: pointer(name) for name in kernel.arg_names}
    types |= {name: record(*map(pointer, record._fields)) for name, record in RECORDS.items()}
    return compile_typed(device, kernel, types, constants, options)


def compile_typed(
    device: Device, kernel: Any, types: dict[str, Any], constants: dict[str, Any], options: dict[str, Any]
) -> CompiledKernel:
    """Compiles any kernel, with its constexpr arguments; types: by a pointer argument its type, or a tuple of those of
    its tensors; None: it is None."""
    given: dict[Any, Any] = dict(constants)
    signature, attributes = {}, {}

    def typed(kind: str | None, path: tuple[int, ...]) -> str:
        if kind is None:
            given[path] = None
            return "constexpr"
        # torch allocates at least this aligned, and the launcher tells the compiler so.
        attributes[path] = [["tt.divisibility", 16]]
        return kind

    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in (*launch.SIZES, "layer"):
            signature[argument] = "i32"
        elif isinstance(of := types[argument], tuple):
            kinds = [typed(kind, (index, at)) for at, kind in enumerate(of)]
            signature[argument] = type(of)(*kinds) if hasattr(of, "_fields") else tuple(kinds)
        else:
            signature[argument] = typed(of, (index,))
    of_device = gpu_target(device.capability, device.gcn)
    return triton.compile(ASTSource(kernel, signature, given, attributes), target=of_device, options=options)


# Of recompute's scan: the direction, and what it takes: of a packed sequence in reverse, and of rows with lengths and
# resets.
SCANS = ((True, {"lengths", "offsets"}), (False, {"lengths", "starts", "c_reset"}))


def beside(device: str, dtype: str, H: int) -> Iterator[Row]:
    """What the kernels beside the recurrence take, which have tiles of their own: the scans, and dropout of packed
    rows. Those of one step are in steps.py."""
    (torch_dtype, _), of_device = DTYPES[dtype], ALL[device]
    row = {"device": device, "dtype": dtype, "H": H}
    for reverse, taken in SCANS:
        absent = {"lengths", "offsets", "starts", "order", "c_reset"} - taken
        constants = {"H": H, "REVERSE": reverse, "BLOCK": scan.BLOCK}
        kernel = compile_for(of_device, scan.scan_kernel, torch_dtype, constants, absent, {"num_warps": 1})
        yield row | {"kernel": "scan", "reverse": reverse, "takes": sorted(taken), "usage": usage(kernel)}
    constants = {"H": H, "BLOCK": dropout.BLOCK}
    kernel = compile_for(of_device, dropout.drop_kernel, torch_dtype, constants, (), {})
    yield row | {"kernel": "dropout", "takes": ["lengths", "offsets"], "usage": usage(kernel)}


def usage(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and bytes of spilled ones that a thread takes anywhere in a kernel; bytes of shared memory."""
    if "amdgcn" in kernel.asm:
        found = of_amd(kernel)
        return {"registers": found["registers"], "stack": 4 * found["spills"], "shared": found["shared"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        found = dict(re.findall(r"(REG|STACK):(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name)))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": kernel.metadata.shared}


def of_amd(kernel: CompiledKernel) -> dict[str, Any]:
    """What a kernel for AMD takes anywhere, as far as its assembly says so: of Resources those that do not ask for the
    time loop. What is kept in lanes of vector registers instead of scalar ones is no spill."""
    text = kernel.asm["amdgcn"]
    registers, spills = (int(re.findall(rf"\.vgpr_{name}:\s+(\d+)", text)[0]) for name in ("count", "spill_count"))
    matrix = Counter(re.findall(r"\bv_(mfma|wmma)_", text))
    return {
        "registers": registers,
        "shared": kernel.metadata.shared,
        "tensor": 0,
        "spills": spills,
        "matrix": {name.upper(): count for name, count in sorted(matrix.items())},
    }


def resources(kernel: CompiledKernel) -> Resources:
    """Reads a compiled kernel's resources from its cubin and its intermediate form."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    code = parse(disassemble(kernel.asm["cubin"]))
    loop = time_loop(code)
    instructions = [code[place].opcode for place in loop.members] if loop else []
    ttgir = kernel.asm["ttgir"]
    # The text of the loop over the steps, which is the first one: to the brace at its own indentation.
    steps = re.search(r"^( *)(?:%\S+ = )?scf\.for .*?^\1}", ttgir, re.DOTALL | re.MULTILINE)
    assert steps, kernel.metadata.name
    ptx = kernel.asm["ptx"]
    # Neighbours among the barriers and the accesses to global memory.
    pairs = list(pairwise(re.findall(r"\b(?:bar\.sync|(?:ld|st|atom|red)\.\S*global\S*)", ptx)))
    opcodes = Counter(instruction.partition(".")[0] for instruction in instructions)
    threads = 32 * kernel.metadata.num_warps
    stores = [at for at, instruction in enumerate(instructions) if instruction.startswith("STG")]
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        shared=kernel.metadata.shared,
        tensor=kernel.metadata.tmem_size,
        spills=opcodes["STL"] + opcodes["LDL"],
        matrix={opcode: opcodes[opcode] for opcode in sorted(opcodes) if re.fullmatch(r"HG?MMA|UTC\w*MMA", opcode)},
        barriers=opcodes["BAR"],
        instructions=len(instructions),
        loaded=threads * sum(width(access) for access in instructions if re.match(r"LDG", access)),
        stored=threads * sum(width(access) for access in instructions if access.startswith("STG")),
        resident=ttgir.count("ttg.local_alloc", 0, steps.start()),
        loads=steps[0].count("tt.load"),
        acquires=sum(".acquire" in first and second == "bar.sync" for first, second in pairs),
        releases=sum(first == "bar.sync" and ".release" in second for first, second in pairs),
        early=sum(bool(re.match(r"LDG.*128.*STRONG", one)) for one in instructions[: stores[0] if stores else None]),
        read_only=len(re.findall(r"\bld\.\S*\.nc\b", ptx)),
    )


ALL = DEVICES | AMD
# A device of each target: all that share one have as much shared memory.
TARGETS = {target(device): device for device in ALL.values()}
# Those that the table has, and their devices.
TABULATED = ("sm_80", "sm_90", "sm_100")
TABULATED_DEVICES = [name for name, device in ALL.items() if target(device) in TABULATED]


def choices(
    device: Device,
    dtype: str,
    H: int,
    batches: Iterable[int],
    directions: int = 1,
    layers: int = 1,
    proj: int = 0,
    weights: str = "",
) -> dict[Plan, tuple[int, int]]:
    """The plans for these batches, each with its least and its largest. proj: only where the kernels then project to so
    many features. weights: of 8 bits; only where the kernels multiply them as they are."""
    choose = choose_kernel.__wrapped__  # its cache would keep every plan
    torch_dtype, ieee = DTYPES[dtype]
    found: dict[Plan, tuple[int, int]] = {}
    for B in batches:
        if proj and not projects.__wrapped__(torch_dtype, B, H, proj, device, ieee, directions):
            continue
        if weights:
            plan = choose_narrow.__wrapped__(torch_dtype, B, H, device, ieee, directions, weights)
            if plan is None:
                continue
        else:
            plan = choose(torch_dtype, B, H, device, ieee, directions, layers, proj)
        found[plan] = found.get(plan, (B,))[0], B
    return found


def groups(
    devices: Iterable[str] = TABULATED_DEVICES,
    dtypes: Iterable[str] = PRODUCTS,
    sizes: Iterable[int] = SIZES,
    batches: Iterable[int] = BATCHES,
    launches: Iterable[LaunchOf] = LAUNCHES,
    projections: Iterable[tuple[int, int]] = PROJECTIONS,
) -> list[Row]:
    """What plan.py chooses over sizes H and batches B: a row for each kernel that differs in more than H.

    H is the size that stands for the group and B its smallest batch on the first of its devices; H_range and B_range
    are all that the group has, and sizes those that are compiled alike.
    launches: how many directions and layers they have, to how many features they project, and their weights, "int8" or
    "fp8" of 8 bits. That the members are layers is a constant of the machine code, how many is not: `layers` is the
    fewest of a stack, 1 without.
    projections: further sizes H, of one direction, and features.
    """
    found: dict[tuple[Any, ...], list[tuple[int, int, int, int, str]]] = {}
    shapes = [*pairs(sizes, launches), *((H, (1, 1, P, "")) for H, P in projections)]
    batches = tuple(batches)
    for device, dtype, (H, launch_of) in pairs(devices, dtypes, shapes):
        proj, weights = launch_of[2:]
        for plan, (first, last) in choices(ALL[device], dtype, H, batches, *launch_of).items():
            if plan.mode == "torch" or (plan.layers > 1 and plan.mode != "grid"):
                continue  # they do not fit together
            # Of the step form each launch has a half of the kernel that projects.
            halves = ("CELL", "PROJECT") if proj and plan.mode == "step" else ("",)
            for kernel, half in pairs([name for name in KERNELS if getattr(plan, name)], halves):
                tiles = getattr(plan, kernel)
                several = plan.directions, plan.layers > 1, proj, half, weights
                which = class_of(Problem(dtype, H, proj=proj), tiles, plan.mode)
                same = (target(ALL[device]), dtype, kernel, plan.mode, plan.precision, tiles, *several, which)
                found.setdefault(same, []).append((H, first, last, plan.layers, device))
    rows = []
    for same, members in found.items():
        of_target, dtype, kernel, mode, precision, tiles, directions, stack, proj, half, weights, which = same
        sizes_of, firsts, lasts, layers, on = zip(*members, strict=True)
        demand = partial(demanding, tiles.chunk, which)
        H = max(sizes_of, key=demand)
        rows.append(
            {
                "target": of_target,
                "devices": list(dict.fromkeys(on)),
                "dtype": dtype,
                "weights": weights,
                "kernel": kernel,
                "mode": mode,
                "precision": precision,
                "tiles": asdict(tiles),
                "stack": stack,
                "proj": proj,
                "half": half,
                "class": which,
                "H": H,
                "B": min(first for size, first, _, _, device in members if size == H),
                "directions": directions,
                "layers": min(layers),
                "H_range": [min(sizes_of), max(sizes_of)],
                "B_range": [min(firsts), max(lasts)],
                "sizes": sorted({size for size in sizes_of if demand(size)[0] == demand(H)[0]}),
            }
        )
    return rows


def demanding(chunk: int, which: str, H: int) -> tuple[bool, int]:
    """By what a size stands for the others of its class: those with masks, or with the narrowest loads, then H."""
    return {"power": True, "whole": True, "masked": H % chunk > 0, "even": H % 4 == 2, "odd": H % 2 == 1}[which], H


def compiled(group: Row, simulate: bool = False, **flags: bool) -> Row:
    """A group's row with what its compiled kernel takes, or with the error of its compilation. simulate: with what
    simulated() says."""
    dtype, device = DTYPES[group["dtype"]][0], TARGETS[group["target"]]
    tiles = Tiles(**group["tiles"])
    several = group["directions"], group["layers"], group["weights"]
    plan = Plan(group["mode"], tiles, tiles, 0, group["precision"], "", *several)
    try:
        halves = {"out": group["proj"], "half": group["half"]}
        kernel = compile_kernel(group["kernel"], plan, group["H"], dtype, device, **flags, **halves)
        if tiles.poll:
            # In another order than the kernel's the operands pass through shared memory; where the parts of a row are
            # too short for it, Triton 3.6 and 3.7 then multiply what they should not.
            widths = set(re.findall(r"kWidth = (\d+)", kernel.asm["ttgir"]))
            width = operands.operand_width(tiles.batch, dtype.itemsize)
            assert widths == {str(width)}, f"operands of kWidth {widths}, not {width}"
        found = of_amd(kernel) if device.gcn else asdict(resources(kernel))
        row = group | {"resources": found}
        if simulate:
            row["simulated"] = simulated(group, kernel, plan)
    except Exception:  # the other rows are still worth having
        return group | {"error": traceback.format_exc(limit=0)}
    options = {
        "stages": kernel.metadata.num_stages,
        "cooperative": getattr(kernel.metadata, "launch_cooperative_grid", False),
    }
    return row | {"options": options}


def simulated(group: Row, kernel: CompiledKernel, plan: Plan) -> Row:
    """What bench.simulate makes of one step of a group's least B: the cycles of all launches that follow one another,
    and the wavefronts of a program in the pipe to memory; or why it says nothing."""
    name, device = group["kernel"], H100
    if group["target"] != target(device):
        return {"why": "the simulation has an H100's clocks"}
    timing, why = simulate.simulate_plan(kernel, name, plan, group["H"], group["B"], device=device)
    if timing is None:
        return {"why": why}
    _, launches = simulate.launches_of(plan, name, group["H"], group["B"], device)
    return {"cycles": round(launches * timing.cycles), "launches": launches, "wavefronts": round(timing.wavefronts)}


def fails(row: Row) -> bool:
    """Whether a row's kernel was not compiled, spills in the time loop or does not fit on chip."""
    return why_failed(row) != ""


def why_failed(row: Row) -> str:
    """What happens to a kernel that fails(), in words."""
    if "error" in row:
        return "Triton compiles no kernel"
    found, shared = row["resources"], TARGETS[row["target"]].shared
    if found["shared"] > shared:
        return "too little shared memory"
    if found["tensor"] > TENSOR_MEMORY:
        return "too little tensor memory"
    return "registers spill" if found["spills"] else ""


def predicted(row: Row) -> Row:
    """The model's time for one step of a row's H and B under its tiles, the floor, both in microseconds, and the term
    that sets the first."""
    tiles, backward = Tiles(**row["tiles"]), row["kernel"] == "backward"
    several = row["directions"], row["layers"], row["weights"]
    plan = Plan(row["mode"], tiles, tiles, 0, row["precision"], "", *several)
    sizes = row["H"], row["B"], backward
    device = row["devices"][0]
    planned = model.predicted(device, row["dtype"], plan, *sizes, row["proj"])
    bound = None
    if not row["proj"] and not row["weights"]:  # of these there is no floor
        bound = round(model.floor(device, row["dtype"], row["mode"], *sizes, layers=row["layers"]).us, 2)
    return {"us": round(planned.us, 2), "floor": bound, "binds": planned.binds}


@cache
def source_at(kernel: str, place: int) -> str:
    """A hash of what a kernel of KERNELS is compiled of; the plans are in the rows."""
    return hash_of(KERNELS[kernel][place])


def source_of_row(row: Row) -> str:
    return source_at(row["kernel"], place_of(Tiles(**row["tiles"]), row["mode"]))


@cache
def source_of(limit: str) -> str:
    """The source of what a limit, or an answer about all of a target, is about."""
    if limit in TARGETS:
        return hash_of(*(kernel for kernels in KERNELS.values() for kernel in kernels))
    kernel = "backward" if " backward, " in limit else "forward"
    return source_at(kernel, 2 if " in turn, " in limit else " polled" in limit or " local, " in limit)


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = sorted(json.dumps(row, separators=(",", ":")) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def key(row: Row, fields: Iterable[str]) -> str:
    return json.dumps([row[field] for field in fields])


def tabulate(asked: limits.Asked, fresh: bool, devices: list[str]) -> bool:
    """Brings the installed Triton's file, as far as it is of some devices, and the table up to date; returns whether
    what is compiled passes."""
    results = asked.path.parent
    path = results / f"triton-{triton.__version__}.jsonl"
    targets = {target(ALL[device]) for device in devices}
    # A row that failed is compiled again: the failure may have been the machine's.
    old = [row for row in read(path) if row["source"] == source_of_row(row) and not fails(row)]
    others = [row for row in old if row["target"] not in targets]
    known = {key(row, COMPILE): row for row in old if row["target"] in targets and not fresh}
    wanted = {key(group, COMPILE): planned(group) for group in groups(devices)}
    for at, (name, group) in enumerate(wanted.items(), 1):
        # A simulation is of one B.
        if name in known and ("cycles" not in known[name].get("simulated", {}) or known[name]["B"] == group["B"]):
            known[name] |= group | predicted(group)
            continue
        known[name] = compiled(group, simulate=True) | predicted(group) | {"source": source_of_row(group)}
        asked.answered(group, why_failed(known[name]))
        write(path, [*others, *known.values()])  # each at once: a run that is cut short goes on here
        print(f"{at}/{len(wanted)} {name} {known[name].get('resources') or known[name]['error']}", flush=True)
    rows = [*others, *(known[name] for name in wanted)]
    write(path, rows)
    from . import cells, steps  # which compile as this does

    passed = [part.tabulate(results) for part in (cells, steps)]
    (results / "README.md").write_text(table(results), encoding="utf-8")
    return all(passed) and not any(map(fails, rows))


def is_in_turn(row: Row) -> bool:
    return row["tiles"]["part"] > 0


def planned(group: Row) -> Row:
    """A group without what only limits.py asks for."""
    return {name: value for name, value in group.items() if name != "sizes"}


def table(results: Path) -> str:
    """The Markdown table of all files of a folder, made from these alone."""
    from . import cells, steps

    files = {path.stem.removeprefix("triton-"): read(path) for path in sorted(results.glob("triton-*.jsonl"))}
    rows: dict[str, dict[str, Row]] = {}
    for version, found in files.items():
        for row in found:
            rows.setdefault(key(row, GROUP), {})[version] = row
    count = sum(len(found) for found in files.values())
    failures = sum(fails(row) for found in files.values() for row in found)
    lines = [
        "# The planned kernels, compiled without a GPU",
        "",
        "Compile-time facts of machine code, and a model's predictions: **no GPU gave any number here.** Made by",
        f"`python -m bench.offline` with Triton {', '.join(files)}: {count} kernels, of which {failures} spill",
        "registers in the time loop, exceed the device's shared or tensor memory or do not compile.",
        "",
        "A line is a group of sizes that `kernels/plan.py` treats alike on the devices that have this compute",
        "capability, with the figures of the largest H of its class: those that the chunk divides, powers of two",
        "apart; those that it does not, with masks (marked `+`); and, where no 16-byte load divides a row, even and",
        "odd ones (`*`, `**`). What is not planned because it spills or does not fit is in `kernels/limits.json`.",
        f"Where Tritons differ, their figures stand in the order {' / '.join(files)}. Tiles:",
        "batch rows and units of a program, chunk of the product, warps; how many chunks",
        "of W_hh are kept on chip, if not all; whether the programs are in teams, into how many parts each product is",
        "split among warps, to how many features of a projection one program comes, of how many rows the cells are",
        "computed at once where row tiles follow in turn, and whether h (dgates) is polled.",
        "The kernels that project stand for the H and features that are given. In the time loop, for one step of",
        "one program (an inner loop over chunks that are not kept counted once): matrix instructions (HMMA; HGMMA is",
        "wgmma, UTCHMMA tcgen05), barriers, instructions, KiB of global memory that are loaded and stored if no mask",
        "hides any. On an H100, of a step at this H and its smallest B in the group: the wavefronts of a program in",
        "the pipe to memory, and the time of all its launches, or tiles in turn, by `bench/simulate.py` at 1.83 GHz;",
        "of tiles in turn also how many times that of the bare products at the device's full rate it is. Model: the",
        "time of the same step, and its floor, by `kernels/model.py` and `bench/model.py`, and the term that takes",
        "most of the first. Layers: the fewest that run in one launch under these tiles, a step behind each other;",
        "the time is that of a step of all of them. One direction of a layer; both have the same tiles, and addresses",
        "that take a few registers more (`--directions 2`). fp16 has the tiles of bf16, and W_hh of fp8 those of int8.",
    ]
    head = (
        "devices | dtype | pass | form | tiles | H | of H | of B | registers | spills | shared KiB | matrix | barriers"
    )
    head += (
        " | instructions | loads KiB | stores KiB | wavefronts | simulated µs | x bare | model µs | floor µs | binds"
    )
    for of_target in TABULATED:
        lines += ["", f"## {of_target}", "", f"| {head} |", "| --- " * (head.count("|") + 1) + "|"]
        lines += [f"| {' | '.join(cells_of(row))} |" for row in rows.values() if first(row)["target"] == of_target]
    return "\n".join([*lines, *cells.table(results), *steps.table(results)]) + "\n"


def bare(row: Row) -> float:
    """Microseconds that the products alone of a step of a row's H and B take at the full rate of its device."""
    terms = model.TERMS[row["devices"][0]]
    return 8 * row["H"] ** 2 * row["B"] / (terms.matrix[row["dtype"]] * terms.multiprocessors)


CLASSES = {"power": "", "whole": "", "masked": "+", "even": "*", "odd": "**"}


def first(versions: dict[str, Row]) -> Row:
    return next(iter(versions.values()))


def cells_of(versions: dict[str, Row]) -> Iterator[str]:
    """The cells of a line of the table, from the rows of one group by Triton's version."""
    row = first(versions)
    tiles, found = row["tiles"], [version.get("resources") for version in versions.values()]
    dtype = f"{row['dtype']}, W_hh {row['weights']}" if row["weights"] else row["dtype"]
    yield from (", ".join(row["devices"]), dtype, row["kernel"], ", ".join(filter(None, forms(row))))
    shape = [str(tiles[name]) for name in ("batch", "units", "chunk", "warps")]
    shape += [
        f"{name} {tiles[name]}"
        for name, plain in (("kept", 0), ("team", 1), ("split", 1), ("features", 0), ("part", 0))
        if tiles[name] != plain
    ]
    yield ", ".join(shape + ["polled"] * tiles["poll"])
    yield f"{row['H']}{CLASSES[row['class']]}"
    yield from (f"{low}-{high}" for low, high in (row["H_range"], row["B_range"]))
    for name in ("registers", "spills", "shared", "matrix", "barriers", "instructions", "loaded", "stored"):
        yield side_by_side(figure(name, each[name]) if each else "error" for each in found)
    times = [version.get("simulated", {}) for version in versions.values()]
    clock = model.TERMS[row["devices"][0]].clock
    yield side_by_side(str(each.get("wavefronts", "-")) for each in times)
    us = [each["cycles"] / clock if "cycles" in each else None for each in times]
    yield side_by_side("-" if each is None else f"{each:.2f}" for each in us)
    yield side_by_side("-" if each is None or not is_in_turn(row) else f"{each / bare(row):.1f}" for each in us)
    yield from (f"{row['us']:.2f}", "-" if row["floor"] is None else f"{row['floor']:.2f}", row["binds"])


def side_by_side(figures: Iterable[str]) -> str:
    """The figures of several Tritons; one if they are the same."""
    every = list(figures)
    return every[0] if len(set(every)) == 1 else " / ".join(every)


def forms(row: Row) -> Iterator[str]:
    """The form of a row's kernel, in words."""
    yield row["mode"]
    yield f"{row['layers']} layers" if row["stack"] else ""
    yield f"to {row['proj']} features" if row["proj"] else ""
    yield {"CELL": "the cells", "PROJECT": "the projection", "": ""}[row["half"]]


def figure(name: str, value: Any) -> str:
    if name in ("shared", "loaded", "stored"):
        return f"{value / 1024:.4g}"
    return " + ".join(f"{count} {opcode}" for opcode, count in value.items()) if name == "matrix" else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the planned kernels without a GPU.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files that are brought up to date")
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TABULATED), help="of these alone")
    parser.add_argument("--explore", action="store_true", help="find the limits, also of --H, and make no table")
    parser.add_argument("--fresh", action="store_true", help="compile again what is in the file")
    printed = parser.add_argument_group("print JSON lines instead, without a file")
    printed.add_argument("--groups", type=int, nargs="+", help="of these places in groups()")
    printed.add_argument("--H", type=int, nargs="+", help="of the kernels that are chosen for these sizes")
    printed.add_argument("--beside", nargs="+", help="of the scan and of one step, by device:dtype:H")
    printed.add_argument("--B", type=int, nargs="+", default=[1, 64])
    printed.add_argument("--device", choices=ALL, nargs="+", default=["H100"])
    printed.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    printed.add_argument("--directions", type=int, default=1)
    printed.add_argument("--layers", type=int, default=1, help="in one launch")
    printed.add_argument("--proj", type=int, default=0, help="features of a projection in the kernel")
    printed.add_argument("--weights", choices=["", *NARROW_POINTERS], default="", help="of 8 bits, for inference")
    printed.add_argument("--reverse", action="store_true")
    printed.add_argument("--packed", action="store_true")
    printed.add_argument("--lengths", action="store_true")
    printed.add_argument("--reset", action="store_true")
    printed.add_argument("--drop", action="store_true", help="dropout between the layers")
    printed.add_argument("--refused", action="store_true", help="as after a refused cooperative launch: by steps")
    printed.add_argument("--inference", action="store_true", help="save nothing for backward")
    printed.add_argument("--simulate", action="store_true", help="and the simulated cycles of a step")
    args = parser.parse_args()
    if not args.explore and not set(args.target) <= {*TABULATED}:
        parser.error(f"the table has {', '.join(TABULATED)} alone: --explore")
    if args.beside:
        for case in args.beside:
            device, dtype, H = case.split(":")
            print(*map(json.dumps, beside(device, dtype, int(H))), sep="\n", flush=True)
        return
    if args.explore or (args.groups is None and args.H is None):
        devices = [name for name, device in ALL.items() if target(device) in args.target]
        args.results.mkdir(parents=True, exist_ok=True)
        asked = limits.Asked(args.results, triton.__version__, source_of, lambda group: why_failed(compiled(group)))
        limits.explore(partial(groups, devices, sizes=args.H or SIZES), asked, whole=args.H is None)
        sys.exit(not (args.explore or tabulate(asked, args.fresh, devices)))
    if args.H is None:
        every = groups()
        chosen = [every[place] for place in args.groups]
    else:  # each size a group of its own
        launches = [(args.directions, args.layers, args.proj, args.weights)]
        chosen = [
            group for H in args.H for B in args.B for group in groups(args.device, args.dtype, [H], [B], launches, ())
        ]
    if args.refused:
        of_grid = [group for group in chosen if group["mode"] == "grid"]
        chosen = [
            group | {"mode": "step", "tiles": asdict(without_exchange(Tiles(**group["tiles"])))} for group in of_grid
        ]
    flags = {name: getattr(args, name) for name in ("reverse", "packed", "lengths", "reset", "drop")}
    flags["save"] = not args.inference
    failed = False
    for group in chosen:
        began = time.perf_counter()
        row = compiled(planned(group), args.simulate, **flags) | predicted(group) | flags
        failed |= fails(row)
        print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
