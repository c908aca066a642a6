"""Which kernel form runs a recurrence, with which tiles, and why."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch

from . import plan_of_step
from .choice import candidates, choose_kernel, choose_narrow, grouped, kind_of, plans, precision_of, projects, ranked
from .environment import ROCM, WHY_NO_TRITON, interpreted
from .findings import Candidate, Findings, Refused, file_for, findings_on, rounded, shipped_for, warn
from .limits import checked
from .planned import Plan, as_per_step, name, on_torch
from .tiles import H100, Device, Problem, Tiles


def why_torch(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's own LSTM serves tensors of `dtype` on `device`; None where the kernels do."""
    if WHY_NO_TRITON is not None:
        return f"{WHY_NO_TRITON}: torch's own LSTM"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"{device.type} tensors: torch's own LSTM; the kernels run on CUDA"
    if device.type == "cuda" and torch.version.hip is not None and not ROCM:
        return "ROCm: torch's own LSTM; FUSED_LSTM_ROCM=1 takes the kernels, which no AMD GPU has run yet"
    if dtype == torch.float64 and device.type == "cuda":
        return "float64 on CUDA: torch's own LSTM"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"{name(dtype)}: torch's own LSTM"
    if not (hardware := hardware_of(device)).gcn and (capability := hardware.capability) < (8, 0):
        major, minor = capability
        return f"compute capability {major}.{minor}: torch's own LSTM; Triton has no matrix instructions below 8.0"
    return None


@lru_cache(1024)
def choose(
    dtype: torch.dtype,
    B: int,
    H: int,
    device: torch.device,
    ieee: bool,
    directions: int = 1,
    layers: int = 1,
    proj: int = 0,
    weights: str = "",
) -> Plan:
    """Returns the plan for a recurrence of H hidden units over B rows of `dtype` on `device`.

    ieee: float32 products in full precision. directions, layers: in one launch; layers as layers_together() says. proj:
    features of a projection in the kernel, as in_kernel() says.
    weights: "int8" or "fp8" of a W_hh of 8 bits: of inference by one layer without a projection. Where the plan has
        none it takes a wide W_hh.
    """
    why = why_torch(dtype, device)
    if why is not None:
        return on_torch(why)
    hardware, problem = hardware_of(device), Problem(kind_of(dtype, ieee), H, False, directions, layers, proj)
    about = findings_on(hardware).about(problem)
    if weights:
        if (plan := narrow_plan(dtype, B, H, device, ieee, directions, weights)) is not None:
            return plan
        about += findings_on(hardware).about(problem._replace(weights=weights))
    if device.type == "cuda":
        plan = choose_kernel(dtype, B, H, hardware, ieee, directions, layers, proj)
    else:
        plan = choose_interpreted(dtype, B, H, ieee, directions, layers, proj)
    if plan.mode == "grid" and device in _grid_disabled:
        reason, passes = _grid_disabled[device], (problem, problem._replace(backward=True))
        in_turn = any(plan.tiles(of.backward).in_turn for of in passes)  # whose tiles no launch a step has
        plan = as_per_step(plan, reason)
        if in_turn or not all(findings_on(hardware).usable(of, "step", [plan.tiles(of.backward)]) for of in passes):
            plan = choose_kernel(dtype, B, H, hardware, ieee, directions, layers, proj, grid=False)
            plan = replace(plan, why=f"{reason}: {plan.why}")
    if plan.mode != "torch":
        plan = fastest(plan, dtype, B, problem, device)
    return replace(plan, refused=about) if about else plan


def narrow_plan(
    dtype: torch.dtype, B: int, H: int, device: torch.device, ieee: bool, directions: int, weights: str
) -> Plan | None:
    """choose() of a W_hh of 8 bits; None where a wide one serves."""
    hardware = hardware_of(device)
    if device in _grid_disabled or not takes_narrow(weights, device, hardware):
        return None
    plan = choose_narrow(dtype, B, H, hardware, ieee, directions, weights)
    if plan is None:
        return None
    problem = Problem(kind_of(dtype, ieee), H, directions=directions, weights=weights)
    if device.type != "cuda":
        tiles = [each for each in interpreted_tiles(problem, dtype, plan.forward) if each.poll]
        if not tiles:
            return None
        plan = replace(as_per_step(plan, IN_INTERPRETER), forward=tiles[0], precision="ieee")
    return replace(plan, refused=findings_on(hardware).about(problem))


def takes_narrow(weights: str, device: torch.device, hardware: Device) -> bool:
    """Whether a device multiplies weights of 8 bits."""
    return weights == "int8" or device.type != "cuda" or (not hardware.gcn and hardware.capability >= (8, 9))


IN_INTERPRETER = "the interpreter runs programs one after another"


@cache
def choose_interpreted(dtype: torch.dtype, B: int, H: int, ieee: bool, directions: int, layers: int, proj: int) -> Plan:
    """choose() in the interpreter: an H100's plan, as far as it can run there."""
    plan = replace(choose_kernel(dtype, B, H, H100, ieee, directions, layers, proj), precision="ieee")
    if plan.mode != "grid":
        return plan
    problem = Problem(kind_of(dtype, ieee), H, False, directions, layers, proj)
    forward, backward = (
        interpreted_tiles(problem._replace(backward=back), dtype, plan.tiles(back)) for back in (False, True)
    )
    if not (forward and backward):
        return replace(choose_kernel(dtype, B, H, H100, ieee, directions, layers, proj, grid=False), precision="ieee")
    steps = as_per_step(plan, IN_INTERPRETER)
    return replace(steps, forward=forward[0], backward=backward[0])


def interpreted_tiles(problem: Problem, dtype: torch.dtype, like: Tiles) -> list[Tiles]:
    """Those that stand in for the grid form's in the interpreter, of the kernel of `like` first. There a program that
    waits for another would wait for ever, and a few take less time than many."""
    many = Tiles(batch=32, units=32, chunk=128, warps=4)
    few = replace(many, chunk=4 * 64 // dtype.itemsize, split=4, poll=True)
    found = [few, many] if like.poll else [many, few]
    if like.in_turn:
        found.insert(0, Tiles(batch=128, units=64, chunk=128, warps=4, part=64))
    return findings_on(H100).usable(problem, "step", found)


def alternatives(dtype: torch.dtype, B: int, problem: Problem, device: torch.device, most: int) -> list[Plan]:
    """Plans for one pass of a problem, in each form those with the best few tiles by the model."""
    found: list[Plan] = []
    for plan in plans(dtype, B, problem, hardware_of(device)):
        tiles = ranked(plan.mode, problem, B, hardware_of(device))
        if device.type != "cuda":
            plan = replace(plan, precision="ieee")
            if plan.mode == "grid":
                plan, tiles = as_per_step(plan, "the interpreter"), interpreted_tiles(problem, dtype, tiles[0])
        if plan.mode != "grid" or device not in _grid_disabled:
            found += [replace(plan, forward=each, backward=each) for each in tiles[:most]]
    return found


def fastest(plan: Plan, dtype: torch.dtype, B: int, problem: Problem, device: torch.device) -> Plan:
    """What has been measured to be the fastest for a problem; the plan itself where nothing has been."""
    for found in findings_on(hardware_of(device)).measured():
        if whole := timed(found, B, problem, device):
            break
    else:
        return plan
    mode = min(whole, key=lambda mode: sum(min(times.values()) for times in whole[mode] if times))
    forward, backward = (min(times, key=times.__getitem__, default=None) for times in whole[mode])
    if backward is None:
        by_model = alternatives(dtype, B, problem._replace(backward=True), device, 1)
        backward = next((made.backward for made in by_model if made.mode == mode), None)
        if backward is None:  # none of that form runs
            return plan
    resident = hardware_of(device).multiprocessors if mode == "grid" else 0
    why = f"the fastest of {sum(map(len, whole[mode]))} kernels that were timed in this form; {plan.why}"
    return replace(plan, mode=mode, forward=forward, backward=backward, resident=resident, why=why)


def timed(
    found: Findings, B: int, problem: Problem, device: torch.device
) -> dict[str, tuple[dict[Tiles, float], dict[Tiles, float]]]:
    """By form the microseconds of the kernels of a problem, forward and backward, that run on a device; of forms whose
    backward pass was not timed only if no form's was: the model's choice serves it then."""
    of_mode: dict[str, tuple[dict[Tiles, float], dict[Tiles, float]]] = {}
    hardware = hardware_of(device)
    here = findings_on(hardware)
    for of, us in found.times.items():
        if (of.problem._replace(backward=False), of.B) != (problem, rounded(B)):
            continue
        runs = of.candidate not in here.refused and not (of.mode == "grid" and device in _grid_disabled)
        # What is shipped was timed under one Triton, and another may not compile it.
        if runs and (found is here or of.tiles in candidates(of.mode, of.problem, hardware)):
            of_mode.setdefault(of.mode, ({}, {}))[of.problem.backward][of.tiles] = us
    trains = any(backward for _, backward in of_mode.values())
    return {mode: both for mode, both in of_mode.items() if both[0] and bool(both[1]) == trains}


def layers_together(dtype: torch.dtype, B: int, H: int, layers: int, device: torch.device, ieee: bool) -> list[int]:
    """How many layers each launch of a stack of `layers` has, the first launch first."""
    if why_torch(dtype, device) is not None:
        return [1] * layers
    return grouped(dtype, B, H, layers, hardware_of(device), ieee)


def in_kernel(dtype: torch.dtype, B: int, H: int, P: int, device: torch.device, ieee: bool, directions: int) -> bool:
    """Whether the kernels are to project to P features; otherwise W_hr is folded into W_hh."""
    if why_torch(dtype, device) is not None:
        return False
    return projects(dtype, B, H, P, hardware_of(device), ieee, directions)


@lru_cache(256)
def choose_one_step(
    dtype: torch.dtype,
    B: int,
    H: int,
    device: torch.device,
    ieee: bool,
    directions: int = 1,
    layers: int = 1,
    proj: int = 0,
    weights: str = "",
) -> Plan:
    """Returns the plan for one step of inference of a stack, the input's product included.

    Args: as in choose(); layers: of the stack; weights: as kind_of_weights() says.
    """
    why = why_torch(dtype, device)
    if why is not None:
        return on_torch(why)
    hardware = hardware_of(device)
    if weights and not takes_narrow(weights, device, hardware):
        return on_torch("weights of fp8 take a GPU of NVIDIA's of compute capability 8.9 and more")
    problem, found = Problem(kind_of(dtype, ieee), H, False, directions, layers, proj), findings_on(hardware)
    precision = "ieee" if device.type == "cpu" else precision_of(dtype, ieee, hardware)
    for most in (layers, 1):
        plan = plan_of_step.plan_for(precision, problem, B, dtype.itemsize, hardware, most)
        if plan.mode == "torch":
            return plan
        if found.usable(problem._replace(layers=plan.layers), step_mode(weights), [plan.tiles(False)]):
            return plan
    return replace(on_torch("the kernel of one step does not run here"), refused=found.about(problem))


def kind_of_weights(dtype: torch.dtype) -> str:
    """ "int8" or "fp8" of weights of 8 bits, "" of others."""
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(dtype, "")


def step_mode(weights: str) -> str:
    """The mode of a candidate for one step, with weights as kind_of_weights() says: other kernels each."""
    return f"one step, weights of {weights}" if weights else "one step"


_grid_disabled: dict[torch.device, str] = {}


def disable_grid(device: torch.device, reason: str) -> None:
    """Records that a device does not run all programs of a grid plan at once, as when it is shared with others."""
    _grid_disabled[device] = reason
    forget_plans()


def grid_disabled(device: torch.device) -> str | None:
    """Why a device does not run all programs of a grid plan at once; None where it does, as far as is known."""
    return _grid_disabled.get(device)


def refuse(device: torch.device, candidate: Candidate, refused: Refused) -> None:
    """Records that a kernel does not run on a device: from now on plans do without it."""
    if refused.cooperative and candidate.mode == "grid":
        return disable_grid(device, str(refused))
    findings_on(hardware_of(device)).refuse(candidate, str(refused), refused.lasts)
    warn(candidate, str(refused))
    forget_plans()


def note_spills(device: torch.device, candidate: Candidate, compiled: Any) -> None:
    """Has later plans do without a kernel that keeps registers in memory, where there is one that does not. Of those
    that were checked before they were shipped it is only before the first step."""
    hardware = hardware_of(device)
    if checked(hardware) or not compiled.n_spills:
        return
    if findings_on(hardware).note_spills(candidate, compiled.n_spills):
        forget_plans()


def hardware_of(device: torch.device) -> Device:
    """What plans for a device go by; the interpreter is to do what an H100 does."""
    return cuda_device(device) if device.type == "cuda" else H100


@cache
def cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    capability, gcn = (properties.major, properties.minor), ""
    if torch.version.hip is not None:
        gcn, shared = properties.gcnArchName.partition(":")[0], properties.shared_memory_per_block
    else:
        shared = properties.shared_memory_per_block_optin
    hardware = Device(properties.multi_processor_count, shared, capability, gcn)
    found = findings_on(hardware)
    found.attach(file_for(properties.name), properties.name)
    found.shipped = Findings()
    found.shipped.attach(shipped_for(properties.name), properties.name)
    return hardware


_CACHED = choose, choose_one_step, choose_interpreted, choose_narrow, grouped, projects, choose_kernel
_followers: list[Callable[[], None]] = []


def follow(forget: Callable[[], None]) -> None:
    """Has a function called whenever plans may have changed."""
    _followers.append(forget)


def forget_plans() -> None:
    """Plans are chosen anew."""
    for cached in _CACHED:
        cached.cache_clear()
    for forget in _followers:
        forget()
