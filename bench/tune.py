"""The part of bench.lab that times the recurrence kernels with tiles around the plan's own choice.

A candidate's result is held to the equations in plain PyTorch (float64) first; a wrong one is refused, and its time is
given with the reason: it tells what the tiles take, and is never the best.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import combinations, product
from multiprocessing import get_context, parent_process
from operator import itemgetter
from threading import Thread
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fused_lstm import reference
from fused_lstm.kernels.backward import backward
from fused_lstm.kernels.choice import choose_kernel
from fused_lstm.kernels.forward import forward
from fused_lstm.kernels.layout import accumulator
from fused_lstm.kernels.plan import choose
from fused_lstm.kernels.planned import Plan, as_per_step
from fused_lstm.kernels.tiles import Device, Tiles, programs_of

from .absent import Compiler
from .cases import DTYPES
from .micro import Lab, Measured, timed

# Each list in the order of worth: the middle sizes first.
SIZES = (512, 256, 1024, 128, 650, 100)
BATCHES = (16, 64, 1, 256)
NAMES = ("bf16", "fp16", "tf32", "fp32")
# One local plan and one of steps, whose tiles vary; in a dry run of the interpreter.
DRY = [("bf16", 8, 2), ("tf32", 24, 2)]
DRY_HARDWARE = Device(multiprocessors=132, shared=12 * 1024, capability=(9, 0))
FIELDS = {
    "batch": (8, 16, 32, 64),
    "units": (8, 16, 32),
    "chunk": (32, 64, 128, 256),
    "warps": (2, 4, 8),
    "split": (1, 4, 8),
    "poll": (False, True),
}
T = 64
# Of the largest value of a result. A kernel that reads a wrong or an old element is off by far more.
TOLERANCE = {"bf16": 2**-5, "fp16": 2**-8, "tf32": 2**-8, "fp32": 2**-13}


def plan_for(lab: Lab, dtype: str, H: int, B: int) -> Plan:
    """The plan's own choice; in a dry run, by steps instead of a grid, which the interpreter cannot run."""
    plan = choose_kernel(DTYPES[dtype], B, H, DRY_HARDWARE if lab.dry else lab.hardware, dtype == "fp32")
    if not lab.dry:
        return plan
    plan = replace(plan, precision="ieee")
    return as_per_step(plan, "dry run") if plan.mode == "grid" else plan


def candidates(plan: Plan, own: Tiles, dtype: str, H: int, B: int, hardware: Device) -> list[Tiles]:
    """The plan's own tiles first, then those that differ from them in one field, then in two, as far as they fit."""
    size = 8 if dtype == "fp32" else DTYPES[dtype].itemsize  # full precision holds W_hh twice
    fields = {name: {getattr(own, name), *values} for name, values in FIELDS.items()}
    if plan.mode == "local":
        # One program holds all of W_hh as one chunk, in parts of four warps or eight.
        fields |= {"units": {own.units}, "chunk": {own.chunk}, "split": {4, 8}}
    if plan.mode != "grid":
        fields |= {"poll": {False}}

    def fits(tiles: Tiles) -> bool:
        columns = triton.cdiv(H, tiles.chunk) * tiles.chunk
        if plan.mode == "local":
            return tiles.batch <= 16 and tiles.split == tiles.warps and 4 * tiles.units >= 16 * tiles.split
        return (
            tiles.batch <= max(own.batch, 16, triton.next_power_of_2(B))
            and tiles.split == (tiles.warps if tiles.poll else 1)
            and tiles.chunk >= 16 * tiles.split
            and not (tiles.poll and tiles.kept)
            and tiles.chunk <= max(own.chunk, triton.next_power_of_2(H))
            and (plan.mode != "grid" or programs_of(tiles, H, B)[0] <= hardware.multiprocessors)
            and (plan.mode != "grid" or tiles.kept or 4 * tiles.units * columns * size <= hardware.shared)
        )

    every = dict.fromkeys(
        replace(own, **dict(zip(names, values, strict=True)))
        for names in combinations(fields, 2)
        for values in product(*(sorted(fields[name]) for name in names))
    )
    return sorted(filter(fits, every), key=partial(distance, own))


def distance(own: Tiles, tiles: Tiles) -> int:
    """In how many fields that are tried they differ."""
    return sum(getattr(tiles, name) != getattr(own, name) for name in FIELDS)


def items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plan's own tiles of all sizes, by which the model is calibrated; then those that differ from them in one
    field, at all sizes, then in two."""
    ranked = product(enumerate(SIZES), enumerate(BATCHES), enumerate(NAMES))
    by_worth = sorted(ranked, key=lambda case: sum(rank for rank, _ in case))
    cases = [(dtype, H, B) for (_, H), (_, B), (_, dtype) in by_worth]
    found: list[tuple[int, str, dict[str, Any]]] = []
    for dtype, H, B in DRY if lab.dry else cases:
        plan = plan_for(lab, dtype, H, B)
        for name, own in [("forward", plan.forward), ("backward", plan.backward)]:
            tried = candidates(plan, own, dtype, H, B, DRY_HARDWARE if lab.dry else lab.hardware)
            # Dry: the own tiles, and some that differ from them in two fields.
            for tiles in [tried[0], tried[-1]] if lab.dry else tried:
                case = {"dtype": dtype, "H": H, "B": B, "T": 3 if lab.dry else T, "mode": plan.mode}
                found.append((distance(own, tiles), name, case | {"tiles": asdict(tiles), "chosen": tiles == own}))
    yield from ((name, params) for _, name, params in sorted(found, key=itemgetter(0)))


@dataclass(frozen=True)
class Problem:
    """What both passes read, and what they must give, by the name of the pass."""

    inputs: dict[str, tuple[Tensor, ...]]
    gold: dict[str, tuple[Tensor, ...]]


def inputs(device: torch.device, dtype: torch.dtype, H: int, B: int, T: int) -> tuple[tuple[Tensor, ...], ...]:
    """input_gates, weight_hh, h0 and c0 of the forward pass; dy, dhn and dcn of the backward pass."""
    torch.manual_seed(0)
    sizes = [(T, B, 4 * H), (4 * H, H), (B, H), (B, H), (T, B, H), (B, H), (B, H)]
    # Drawn on the device: a CPU would take longer for them than all that is measured with them.
    input_gates, weight_hh, *rest = (torch.randn(size, device=device).to(dtype) for size in sizes)
    weight_hh.uniform_(-(H**-0.5), H**-0.5)  # as nn.LSTM begins; with larger ones the errors of a step could grow
    return (input_gates, weight_hh, *rest[:2]), tuple(rest[2:])


@lru_cache(maxsize=1)
def problem(device: torch.device, dtype: torch.dtype, H: int, B: int, T: int) -> Problem:
    first, cotangents = inputs(device, dtype, H, B, T)
    *ends, c, gates = reference.forward(*(tensor.double() for tensor in first))
    _, weight_hh, _, c0 = first
    second = (*cotangents, weight_hh, c0.to(accumulator(dtype)), c.to(accumulator(dtype)), gates.to(dtype))
    gold = reference.backward(*(tensor.double() for tensor in second))[:2]
    return Problem({"forward": first, "backward": second}, {"forward": (*ends, c, gates), "backward": gold})


def recurrence(name: str, inputs: tuple[Tensor, ...], plan: Plan, T: int) -> tuple[Tensor, ...]:
    """Runs the first T steps of a pass."""
    if name == "forward":
        input_gates, *rest = inputs
        return forward(input_gates[:T], *rest, plan=plan)
    dy, dhn, dcn, weight_hh, c0, c, gates = inputs
    return backward(dy[:T], dhn, dcn, weight_hh, c0, c[:T], gates[:T], plan=plan)[:2]


@contextmanager
def poisoned() -> Iterator[None]:
    """torch fills fresh memory with NaN: an element that a kernel leaves out is not found right by chance."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def with_tiles(lab: Lab, name: str, params: dict[str, Any]) -> Plan:
    plan = plan_for(lab, params["dtype"], params["H"], params["B"])
    return replace(plan, **{name: Tiles(**params["tiles"])})


def mismatch(name: str, results: tuple[Tensor, ...], gold: tuple[Tensor, ...], tolerance: float) -> str:
    """What is wrong with the results of a pass, in words; "" if nothing is."""
    for number, (result, right) in enumerate(zip(results, gold, strict=True)):
        try:
            torch.testing.assert_close(result.double(), right, rtol=0, atol=tolerance * right.abs().max().item())
        except AssertionError as error:
            return f"result {number} of {name}: {error}"
    return ""


def measure(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    dtype, H, B, T = (params[size] for size in ("dtype", "H", "B", "T"))
    plan = with_tiles(lab, name, params)
    task = problem(lab.device, DTYPES[dtype], H, B, T)
    with poisoned():
        results = recurrence(name, task.inputs[name], plan, T)
    wrong = mismatch(name, results, task.gold[name], TOLERANCE[dtype])

    def measure() -> Measured:
        if plan.mode == "grid" and choose(DTYPES[dtype], B, H, lab.device, dtype == "fp32").mode != "grid":
            raise RuntimeError("the device does not run all programs of a grid at once")
        times = lab.slope(lambda T: recurrence(name, task.inputs[name], plan, T), T)
        return times, times.median, "us a step"

    return timed(wrong, measure)


def compile_ahead(capability: tuple[int, int], name: str, plan: Plan, dtype: torch.dtype, H: int, B: int) -> None:
    """Compiles the kernel of a pass under a plan as its launch does, in a process that launches nothing else."""
    driver.set_active(Compiler(capability))
    (input_gates, *first), second = inputs(torch.device("cpu"), dtype, H, B, T=1)
    c = torch.zeros(1, B, H, dtype=accumulator(dtype))
    tensors = {"forward": (input_gates, *first), "backward": (*second, first[0], c[0], c, input_gates)}
    with suppress(AttributeError):  # what the driver lacks to launch
        recurrence(name, tensors[name], plan, T=1)


def _end_with_parent() -> None:
    """A pool's process would outlive a parent that is killed."""

    parent = parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def compiling(lab: Lab, work: list[tuple[str, dict[str, Any]]]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Compiles candidates, (name, params), in other processes; yields a function that waits for one of them.

    One after another they would take longer than all measurements. What fails here fails again at the launch.
    """
    if lab.dry:  # the interpreter compiles nothing
        yield lambda name, params: None
        return
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), get_context("spawn"), _end_with_parent)
    jobs: dict[str, Future] = {}

    def submit(name: str, params: dict[str, Any]) -> Future:
        plan = with_tiles(lab, name, params)
        sizes = (DTYPES[params["dtype"]], params["H"], params["B"])
        return pool.submit(compile_ahead, lab.hardware.capability, name, plan, *sizes)

    def ready(name: str, params: dict[str, Any]) -> None:
        # Begun with the first that is waited for: what is measured before them shall have the machine to itself.
        if not jobs:
            jobs.update((repr(item), submit(*item)) for item in work)
        with suppress(Exception):
            jobs[repr((name, params))].result()

    try:
        yield ready
    finally:
        pool.shutdown(cancel_futures=True)
