"""Kernels of which it is known what a turn of their loop takes, compiled and simulated: `python -m tests.known` prints
their timings as JSON, by name."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import micro, offline, sass
from bench.simulate import simulate, simulate_plan
from fused_lstm.kernels.plan import choose_kernel


@triton.jit
def chain_kernel(x, y, steps, N: tl.constexpr):
    """Multiply-adds that each take what the last one gives, 32 a turn."""
    a = tl.load(x + tl.arange(0, N))
    for _ in range(0, steps):
        for _ in tl.static_range(32):
            a = a * 1.0001 + 0.5
    tl.store(y + tl.arange(0, N), a)


@triton.jit
def copy_kernel(x, y, steps, N: tl.constexpr):
    """N words a turn, of global memory."""
    places = tl.arange(0, N)
    for step in range(0, steps):
        tl.store(y + step * N + places, tl.load(x + step * N + places))


@triton.jit
def products_kernel(x, y, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr):
    """Four products a turn, each of PARTS parts in warps of their own, summed one after another."""
    part, row, column = (
        tl.arange(0, PARTS)[:, None, None],
        tl.arange(0, M)[None, :, None],
        tl.arange(0, N)[None, None, :],
    )
    k = tl.arange(0, K)
    a = tl.load(x + part * (M * K) + row * K + k[None, None, :])
    b = tl.load(x + part * (N * K) + k[None, :, None] * N + column)
    sum = tl.dot(a, b, tl.zeros((PARTS, M, N), tl.float32))
    for _ in range(0, steps):
        for _ in tl.static_range(4):
            sum = tl.dot(a, b, sum)
    tl.store(y + part * (M * N) + row * N + column, sum.to(y.dtype.element_ty))


def timing(kernel: Any, types: str, constants: dict[str, Any], warps: int, **options: Any) -> dict[str, Any]:
    """A timing, and the opcodes of the loop with their number. types: of the arguments that are no constants."""
    signature = dict(zip(kernel.arg_names, types.split(), strict=False)) | dict.fromkeys(constants, "constexpr")
    attributes = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, constants, attributes)
    given = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)
    found = simulate(compiled, {"steps": 100}, options.pop("programs", (1, 1, 1)), **options)
    code = sass.parse(sass.disassemble(compiled.asm["cubin"]))
    return asdict(found) | {"opcodes": Counter(code[place].opcode for place in sass.time_loop(code).members)}


def known() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "one chain", timing(chain_kernel, "*fp32 *fp32 i32", {"N": 32}, 1)
    yield "many chains", timing(chain_kernel, "*fp32 *fp32 i32", {"N": 2048}, 16)
    yield "copy", timing(copy_kernel, "*fp32 *fp32 i32", {"N": 1024}, 8)
    yield "one product", timing(products_kernel, "*bf16 *bf16 i32", {"M": 16, "N": 8, "K": 64, "PARTS": 4}, 4)
    yield "many products", timing(products_kernel, "*bf16 *bf16 i32", {"M": 64, "N": 64, "K": 32, "PARTS": 8}, 8)
    for name, exchange in (("", True), (" alone", False)):
        given = {"programs": (32, 1, 1), "exchange": exchange}
        yield f"counter{name}", timing(micro.counter_kernel, "*i32 *i32 i32", {"MAX_SPINS": 0}, 4, **given)
        sizes = {"B": 1, "H": 256, "MAX_SPINS": 1000, "BLOCK_H": 8, "WIDTH": 256}
        yield f"poll{name}", timing(micro.poll_kernel, "*i16 *i32 i32", sizes, 8, handed={"h"}, **given)


def planned() -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each form of a plan a timing, or why there is none."""
    sizes = {"grid": (256, 16), "local": (30, 4), "step": (4864, 16)}
    for device, mode in (("H100", "grid"), ("A100", "grid"), ("B200", "grid"), ("H100", "local"), ("H100", "step")):
        H, B = sizes[mode]
        hardware, (dtype, ieee) = offline.DEVICES[device], offline.DTYPES["bf16"]
        plan = choose_kernel(dtype, B, H, hardware, ieee, 1, 1, 0)
        compiled = offline.compile_kernel("forward", plan, H, dtype, hardware)
        found, why = simulate_plan(compiled, "forward", plan, H, B, device=hardware)
        yield f"{device} {mode}", {"mode": plan.mode, "why": why, "timing": asdict(found) if found else None}


def main() -> None:
    print(json.dumps(dict(known()) | dict(planned())))


if __name__ == "__main__":
    main()
