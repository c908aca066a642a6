"""What machine code says without a GPU: compiles the kernels for a compute capability and reads their resources."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from fused_lstm.kernels.forward import forward_kernel
from fused_lstm.kernels.launch import specialization
from fused_lstm.kernels.plan import Plan
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
IN_ACCUMULATOR = {"c_state", "c", "c0", "dc_state"}
INTEGERS = {"T": "i32", "B": "i32", "row_begin": "i32", "step_begin": "i32", "step_end": "i32"}
INTEGER_POINTERS = {"flags": "*i32", "lengths": "*i64", "offsets": "*i64"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    registers: int  # a thread
    shared: int  # bytes a program
    spills: int  # loads and stores of spilled registers inside the time loop
    resident: int  # tiles laid out in shared memory before the time loop
    loads: int  # tiles loaded in the time loop


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
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        spills=sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in instructions),
        resident=before.count("ttg.local_alloc"),
        loads=loop.count("tt.load"),
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
