"""Which form runs a recurrence on a device, with which tiles: the first that has tiles for both passes, and of these
the ones that take least by the model."""

from collections.abc import Iterator
from functools import cache

import torch

from . import model
from .findings import findings_on
from .planned import Plan, name, on_torch
from .tiles import (
    Device,
    Problem,
    Tiles,
    aligned,
    ceil_div,
    grid_tiles,
    latency_tiles,
    next_power_of_2,
    projectable,
)


def kind_of(dtype: torch.dtype, ieee: bool) -> str:
    """The kind of product, as model.py names it; float64, which only the interpreter has, as float32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32" if ieee else "tf32")


@cache
def grouped(dtype: torch.dtype, B: int, H: int, layers: int, device: Device, ieee: bool) -> list[int]:
    """layers_together() on a device: the sizes, as even as can be, whose launches take least by the model."""

    def step(layers: int) -> float:
        plan = choose_kernel(dtype, B, H, device, ieee, 1, layers)
        if plan.mode != "grid":
            return 0.0 if layers == 1 else float("inf")  # alone, these need no flags
        return of_passes(plan, Problem(kind_of(dtype, ieee), H, layers=layers), B, device)

    def sizes(launches: int) -> list[int]:
        return [layers // launches + (k < layers % launches) for k in range(launches)]

    return min(map(sizes, range(1, layers + 1)), key=lambda sizes: sum(map(step, sizes)))


@cache
def projects(dtype: torch.dtype, B: int, H: int, P: int, device: Device, ieee: bool, directions: int) -> bool:
    """in_kernel() on a device: whether a step of both passes then takes less by the model."""
    problem = Problem(kind_of(dtype, ieee), H, directions=directions)
    folded, projecting = (choose_kernel(dtype, B, H, device, ieee, directions, 1, proj) for proj in (0, P))
    if folded.mode == "local" or projecting.mode == "torch" or not projectable(H, P, problem.size, device):
        return False
    taken = of_passes(projecting, problem._replace(proj=P), B, device)
    return folded.mode == "torch" or taken < of_passes(folded, problem, B, device)


def of_passes(plan: Plan, problem: Problem, B: int, device: Device, backward: bool = True) -> float:
    """The model's microseconds of a step of a plan for a problem; backward: with the backward pass."""
    passes = (False, True)[: 1 + backward]
    return sum(step(plan.mode, plan.tiles(back), problem._replace(backward=back), B, device) for back in passes)


def why_cudnn(plan: Plan, problem: Problem, B: int, device: Device, trains: bool) -> str | None:
    """Why cuDNN's LSTM should be faster than a plan with a large batch, by estimates of both; None where it should not.
    trains: with the backward pass."""
    ours, terms = of_passes(plan, problem, B, device, trains), model.terms_for(device)
    passes = (False, True)[: 1 + trains]
    theirs = sum(model.cudnn_step(terms, problem._replace(backward=back), B) for back in passes)
    if theirs >= ours:
        return None
    return f"by the model cuDNN's large products take {theirs:.1f} us a step, the kernels {ours:.1f}"


@cache
def choose_kernel(
    dtype: torch.dtype,
    B: int,
    H: int,
    device: Device,
    ieee: bool,
    directions: int = 1,
    layers: int = 1,
    proj: int = 0,
    grid: bool = True,
) -> Plan:
    """Returns the plan in the first of the kernels' forms that has tiles for both passes; in mode "torch", and why, if
    none has.

    ieee: float32 products in full precision, which take three TF32 products and so hold the weights twice.
    directions, layers: in one launch; layers that do not fit together have a plan in mode "step".
    proj: features of a projection in the kernel, which then runs in the step form.
    grid: whether the grid form may be taken.
    """
    problem = Problem(kind_of(dtype, ieee), H, False, directions, layers, proj)
    for plan in plans(dtype, B, problem, device):
        if grid or plan.mode != "grid":
            return plan
    return on_torch(f"{why_no_form(problem, device)}: torch's own LSTM")


def plans(dtype: torch.dtype, B: int, problem: Problem, device: Device) -> Iterator[Plan]:
    """Of each form that has tiles for both passes, the plan that takes least by the model."""
    precision = "ieee" if dtype != torch.float32 else "tf32x3" if problem.kind == "fp32" else "tf32"
    for mode in ("local", "grid", "step"):
        forward, backward = (ranked(mode, problem._replace(backward=back), B, device) for back in (False, True))
        if forward and backward:
            why = why_mode(mode, forward[0], f"W_hh of H {problem.H} in {name(dtype)}", problem, device)
            resident = device.multiprocessors if mode == "grid" else 0
            several = problem.directions, problem.layers
            yield Plan(mode, forward[0], backward[0], resident, precision, why, *several)


def why_mode(mode: str, tiles: Tiles, weight: str, problem: Problem, device: Device) -> str:
    """Why a recurrence runs in a form, with these tiles forward."""
    if mode == "local":
        return f"{weight} fits on one multiprocessor"
    if mode == "step":
        why = f"{weight} does not fit on {device.multiprocessors} multiprocessors: one launch a step"
        if problem.proj:
            why += f", and one for its projection to {problem.proj} features, whose weights are less than W_hh W_hr"
        return why
    why = f"{weight} is spread over {ceil_div(problem.H, tiles.units)} multiprocessors, {tiles.units} units on each"
    if tiles.kept:
        why += "; what does not fit is loaded at every step"
    if problem.layers > 1:
        why += f"; so are W_hh and W_ih of all {problem.layers} layers, each a step behind the one that it takes from"
    return why


def why_no_form(problem: Problem, device: Device) -> str:
    """Why not even a launch a step runs a recurrence."""
    return "; ".join(findings_on(device).about(problem)) or "no kernel runs"


@cache
def candidates(mode: str, problem: Problem, device: Device) -> list[Tiles]:
    """The tiles among which a pass chooses in a form, "local", "grid" or "step"."""
    H, size = problem.H, problem.size
    if mode == "local":
        return local_tiles(problem)
    if mode == "grid":
        sizes = H, size, device, problem.layers
        if problem.proj:
            return []
        return [*latency_tiles(*sizes)[problem.backward], *grid_tiles(*sizes)[problem.backward]]
    if problem.proj:
        return [Tiles(16, 16, 256 if problem.backward else 128, 4, features=16)]
    wide = aligned(H, size)
    rows = 16 if size == 8 and not wide else 32  # more spill
    return [Tiles(rows, units=16, chunk=128 // size, warps=4 if wide else 8)]


def local_tiles(problem: Problem) -> list[Tiles]:
    """Of the local form: all of W_hh in the registers of one program, beside the addresses of its rows, which narrow
    ones have more of: more units spill. Eight batch rows a program where more would spill, and otherwise sixteen."""
    H, size = problem.H, problem.size
    padded, wide = max(16, next_power_of_2(H)), aligned(H, size)
    most = 128 if size == 2 and wide else 64 if size < 8 or wide else 32
    if padded > most or problem.layers > 1 or problem.proj:
        return []
    spread = padded * size <= 128 if problem.backward else padded == 32
    warps = 4 if padded == 16 or (spread and wide) else 8
    few = size > 2 or padded > 64 or not wide
    return [Tiles(batch, padded, padded, warps, split=warps) for batch in ((8,) if few else (8, 16))]


def ranked(mode: str, problem: Problem, B: int, device: Device) -> list[Tiles]:
    """The candidates that run, as far as is known, that whose step takes least by the model first; of several alike the
    first that is listed."""
    usable = findings_on(device).usable(problem, mode, candidates(mode, problem, device))
    if mode == "local":  # eight rows a program as long as all run at once
        at_once = problem.directions * ceil_div(B, 8) <= device.multiprocessors
        return sorted(usable, key=lambda tiles: tiles.batch, reverse=not at_once)
    return sorted(usable, key=lambda tiles: step(mode, tiles, problem, B, device)) if len(usable) > 1 else usable


def step(mode: str, tiles: Tiles, problem: Problem, B: int, device: Device) -> float:
    """The model's microseconds of a step of a pass."""
    kind, H, backward, *launch = problem
    return model.step(model.terms_for(device), kind, mode, tiles, H, B, backward, *launch).us
