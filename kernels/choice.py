"""Which form runs a recurrence on a device, with which tiles: the first that has tiles for both passes, and of these
the ones that take least by the model."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import chain

import torch

from . import model
from .findings import findings_on
from .limits import why_not
from .planned import Plan, name, on_torch
from .tiles import Device, Problem, Tiles, ceil_div, listed


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
    """in_kernel() on a device: whether a step of both passes then takes less by the model. Not where narrow rows leave
    no registers for a second product, nor in float32, whose products of few rows take three times as long."""
    problem = Problem(kind_of(dtype, ieee), H, directions=directions)
    within = problem._replace(proj=P)
    folded, projecting = (choose_kernel(dtype, B, H, device, ieee, directions, 1, proj) for proj in (0, P))
    if folded.mode == "local" or projecting.mode == "torch" or within.size > 2 or not within.wide:
        return False
    taken = of_passes(projecting, within, B, device)
    return folded.mode == "torch" or taken < of_passes(folded, problem, B, device)


def of_passes(plan: Plan, problem: Problem, B: int, device: Device, backward: bool = True) -> float:
    """The model's microseconds of a step of a plan for a problem; backward: with the backward pass."""
    terms, passes = model.terms_for(device), (False, True)[: 1 + backward]
    return sum(model.step(terms, plan.mode, plan.tiles(b), problem._replace(backward=b), B).us for b in passes)


def why_cudnn(plan: Plan, problem: Problem, B: int, device: Device, trains: bool) -> str | None:
    """Why cuDNN's LSTM should be faster than a plan with a large batch, by estimates of both; None where it should not.
    trains: with the backward pass."""
    ours, terms = of_passes(plan, problem, B, device, trains), model.terms_for(device)
    passes = (False, True)[: 1 + trains]
    theirs = sum(model.cudnn_step(terms, problem._replace(backward=back), B) for back in passes)
    if theirs >= ours or device.gcn:  # what MIOpen takes nobody has estimated
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


@cache
def choose_narrow(
    dtype: torch.dtype, B: int, H: int, device: Device, ieee: bool, directions: int, weights: str
) -> Plan | None:
    """The plan by which a layer's forward pass multiplies a W_hh of 8 bits, "int8" or "fp8", as it is: in the grid
    form, from registers. None where no such kernel runs, where a wide W_hh fits on one multiprocessor, and where one
    takes less by the model."""
    problem = Problem(kind_of(dtype, ieee), H, directions=directions, weights=weights)
    forward = ranked("grid", problem, B, device)
    if not forward:
        return None
    why = why_mode("grid", forward[0], f"W_hh of H {H} in {weights}", problem, device)
    precision = precision_of(dtype, ieee, device)
    plan = Plan("grid", forward[0], None, device.multiprocessors, precision, why, directions, weights=weights)
    wide = choose_kernel(dtype, B, H, device, ieee, directions)
    if wide.mode == "local" or (wide.mode != "torch" and not narrow_pays(plan, wide, problem, B, device)):
        return None
    return plan


def narrow_pays(plan: Plan, wide: Plan, problem: Problem, B: int, device: Device) -> bool:
    """Whether a step of the first plan takes less than one of the second by the model."""
    ours, theirs = (
        of_passes(each, problem._replace(weights=each.weights), B, device, backward=False) for each in (plan, wide)
    )
    return ours < theirs


def precision_of(dtype: torch.dtype, full: bool, device: Device) -> str:
    """Plan.precision; full: of float32 products. AMD has matrix instructions of float32 itself."""
    return "ieee" if dtype != torch.float32 or device.gcn else "tf32x3" if full else "tf32"


def plans(dtype: torch.dtype, B: int, problem: Problem, device: Device) -> Iterator[Plan]:
    """Of each form that has tiles for both passes, the plan that takes least by the model."""
    precision = precision_of(dtype, problem.kind == "fp32", device)
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
    if tiles.in_turn:
        why += f"; each goes over tiles of {tiles.batch} batch rows in turn"
    if problem.layers > 1:
        why += f"; so are W_hh and W_ih of all {problem.layers} layers, each a step behind the one that it takes from"
    return why


def why_no_form(problem: Problem, device: Device) -> str:
    """Why not even a launch a step runs a recurrence."""
    passes = problem, problem._replace(backward=True)
    kept_from = (why_not(tiles, "step", each, device) for each in passes for tiles in listed("step", each, device))
    return "; ".join(dict.fromkeys([*chain.from_iterable(kept_from), *findings_on(device).about(problem)]))


@cache
def candidates(mode: str, problem: Problem, device: Device) -> list[Tiles]:
    """The tiles among which a pass chooses in a form, "local", "grid" or "step": those of the table that nothing
    keeps it from having."""
    return [tiles for tiles in listed(mode, problem, device) if not why_not(tiles, mode, problem, device)]


def ranked(mode: str, problem: Problem, B: int, device: Device) -> list[Tiles]:
    """The candidates that run, as far as is known, that whose step takes least by the model first; of several alike the
    first of the table. Not those that are not for so many rows."""
    usable = findings_on(device).usable(problem, mode, candidates(mode, problem, device))
    terms = model.terms_for(device) if usable else None
    times = [(model.step(terms, mode, tiles, problem, B).us, at) for at, tiles in enumerate(usable)]
    return [usable[at] for us, at in sorted(times) if us < math.inf]
