"""What machine code says without a GPU: compiles the kernels for a compute capability and reads their resources.

`python -m bench.offline` compiles what the plans choose over a grid of sizes and prints a JSON line for each kernel.
"""

import argparse
import json
import re
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fused_lstm.kernels.backward import backward_kernel
from fused_lstm.kernels.forward import forward_kernel
from fused_lstm.kernels.launch import specialization
from fused_lstm.kernels.plan import A100, H100, Plan, choose_kernel

DEVICES = {"A100": A100, "H100": H100}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
IN_ACCUMULATOR = {"c_state", "c", "c0", "dc_state"}
INTEGERS = {"T": "i32", "B": "i32", "row_begin": "i32", "step_begin": "i32", "step_end": "i32"}
INTEGER_POINTERS = {"flags": "*i32", "report": "*i32", "lengths": "*i64", "offsets": "*i64"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    registers: int  # a thread
    shared: int  # bytes a program
    spills: int  # loads and stores of spilled registers inside the time loop
    resident: int  # tiles laid out in shared memory before the time loop
    loads: int  # tiles loaded in the time loop
    acquires: int  # of a flag, with a barrier between it and the loads that it allows
    releases: int  # of a flag, with a barrier between it and the stores that it publishes
    read_only: int  # loads past the coherent caches, which may miss what another program has just written


def compile_kernel(
    kernel: Any,
    plan: Plan,
    H: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    reverse: bool = False,
    packed: bool = False,
    save: bool = True,
) -> CompiledKernel:
    """Compiles a recurrence kernel as its launcher would, for a capability such as (9, 0), without a GPU."""
    tiles = plan.forward if kernel is forward_kernel else plan.backward
    constants, options = specialization(plan, tiles, H, dtype)
    constants |= {"REVERSE": reverse, "PACKED": packed}
    if kernel is forward_kernel:
        constants["SAVE"] = save
        if not save:
            constants |= {"c": None, "gates": None}
    if not packed:
        constants |= {"lengths": None, "offsets": None}
    if plan.mode != "grid":
        constants["flags"] = None
    if not constants["TURNS"]:
        constants["report"] = None
    accumulator = "*fp64" if dtype == torch.float64 else "*fp32"
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        else:
            default = accumulator if name in IN_ACCUMULATOR else "*" + NAMES[dtype]
            signature[name] = INTEGER_POINTERS.get(name, default)
            # torch allocates at least this aligned, and the launcher tells the compiler so.
            attributes[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def resources(kernel: CompiledKernel) -> Resources:
    """Reads a compiled kernel's resources from its cubin and its intermediate form."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        instructions = time_loop(tool("nvdisasm", "-c", file.name))
    before, loop = kernel.asm["ttgir"].split("scf.for", 1)
    ptx = kernel.asm["ptx"]
    # Neighbours among the barriers and the accesses to global memory.
    pairs = list(pairwise(re.findall(r"\b(?:bar\.sync|(?:ld|st|atom|red)\.\S*global\S*)", ptx)))
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        spills=sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in instructions),
        resident=before.count("ttg.local_alloc"),
        loads=loop.count("tt.load"),
        acquires=sum(".acquire" in first and second == "bar.sync" for first, second in pairs),
        releases=sum(first == "bar.sync" and ".release" in second for first, second in pairs),
        read_only=len(re.findall(r"\bld\.\S*\.nc\b", ptx)),
    )


def tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def time_loop(sass: str) -> list[str]:
    """The instructions of the longest loop in a disassembly; none where the kernel has no loop."""
    lines = [line for line in sass.splitlines() if line.startswith(".L") or "/*" in line]
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L")}
    longest: list[str] = []
    for at, line in enumerate(lines):
        jump = re.search(r"\bBRA[^`]*`\((\.L\w+)\)", line)
        if jump and labels.get(jump[1], at) < at and at - labels[jump[1]] > len(longest):
            longest = lines[labels[jump[1]] : at + 1]
    return longest


def rows(
    device: str, dtypes: list[torch.dtype], sizes: list[int], batches: list[int], ieee: bool, **flags: bool
) -> Iterator[dict[str, Any]]:
    """Compiles each distinct kernel that the plans choose for a device over a grid of sizes; one row for each."""
    seen = set()
    for dtype, H, B, kernel in product(dtypes, sizes, batches, (forward_kernel, backward_kernel)):
        plan = choose_kernel(dtype, B, H, DEVICES[device], ieee)
        tiles = plan.forward if kernel is forward_kernel else plan.backward
        if (dtype, H, kernel, plan.mode, tiles) in seen:
            continue
        seen.add((dtype, H, kernel, plan.mode, tiles))
        row = {"device": device, "dtype": NAMES[dtype], "precision": plan.precision, "H": H, "B": B}
        row |= {"kernel": kernel.__name__, "mode": plan.mode, "tiles": asdict(tiles), **flags}
        try:
            compiled = compile_kernel(kernel, plan, H, dtype, DEVICES[device].capability, **flags)
        except Exception:  # the other rows are still worth having
            yield row | {"error": traceback.format_exc(limit=0)}
            continue
        options = {"stages": compiled.metadata.num_stages, "cooperative": compiled.metadata.launch_cooperative_grid}
        yield row | {"options": options, "resources": asdict(resources(compiled))}


def main() -> None:
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    parser = argparse.ArgumentParser(description="Compile the planned kernels without a GPU, a JSON line for each.")
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--dtype", choices=dtypes, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--H", type=int, nargs="+", default=[20, 256, 512, 1024, 2048])
    parser.add_argument("--B", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--ieee", action="store_true", help="float32 products in full precision")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--inference", action="store_true", help="save nothing for backward")
    args = parser.parse_args()
    flags = {"reverse": args.reverse, "packed": args.packed, "save": not args.inference}
    for row in rows(args.device, [dtypes[name] for name in args.dtype], args.H, args.B, args.ieee, **flags):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
