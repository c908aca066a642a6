"""Which kernel form runs a recurrence, with which tiles, and why."""

from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any

import torch

from . import model
from .environment import WHY_NO_TRITON, interpreted
from .tiles import (
    H100,
    Device,
    Tiles,
    aligned,
    ceil_div,
    grid_tiles,
    latency_tiles,
    next_power_of_2,
    projectable,
    without_exchange,
)


@dataclass(frozen=True)
class Plan:
    """How a layer runs, or several.

    mode: "local", "grid" or "step" (the three forms of the recurrence's kernels), "one step" (a kernel of its own for
        one step of inference), or "torch" (torch's own LSTM).
    forward, backward: the tiles of each pass; None in mode "torch", backward also in "one step".
    resident: programs that the device runs at once, one a multiprocessor; 0 where the mode does not depend on it.
    precision: of float32 products, "tf32", "tf32x3" (three TF32 products, as exact as float32) or "ieee".
    why: the reason, in words.
    directions, layers: how many of them run in one launch; layers one step behind the other.
    chunk: steps between the states that are kept under recompute; 0: gates and cells of every step are kept.
    saved_bytes: what a step, row, layer and direction keeps for backward, beside its input and output; None: unknown.
    """

    mode: str
    forward: Tiles | None
    backward: Tiles | None
    resident: int
    precision: str
    why: str
    directions: int = 1
    layers: int = 1
    chunk: int = 0
    saved_bytes: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what launch.py keeps with a plan belongs to this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def evidence(self) -> str:
        """What stands behind the choice: a measurement of these tiles on this device, or the model."""
        if self.mode == "torch":
            return "no choice"
        return "kernels/model.py, a model of the device; no GPU has measured these tiles"

    @property
    def higher_derivatives(self) -> str:
        """How derivatives of gradients, and forward mode, are computed."""
        if self.mode == "torch":
            return "as torch's own LSTM has them; forward mode composed of torch operations, step by step"
        return "composed of torch operations, step by step: slow beside the kernels"


def why_torch(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's own LSTM serves tensors of `dtype` on `device`; None where the kernels do."""
    if WHY_NO_TRITON is not None:
        return f"{WHY_NO_TRITON}: torch's own LSTM"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"{device.type} tensors: torch's own LSTM; the kernels run on CUDA"
    if device.type == "cuda" and torch.version.hip is not None:
        return "ROCm: torch's own LSTM; the kernels have instructions of NVIDIA's alone"
    if dtype == torch.float64 and device.type == "cuda":
        return "float64 on CUDA: torch's own LSTM"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"{name(dtype)}: torch's own LSTM"
    return None


def on_torch(why: str) -> Plan:
    """The plan of a call that torch's own LSTM serves."""
    return Plan("torch", None, None, 0, "ieee", why)


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
) -> Plan:
    """Returns the plan for a recurrence of H hidden units over B rows of `dtype` on `device`.

    ieee: float32 products in full precision. directions, layers: in one launch; layers as layers_together() says. proj:
    features of a projection in the kernel, as in_kernel() says.
    """
    why = why_torch(dtype, device)
    if why is not None:
        return on_torch(why)
    if device.type == "cuda":
        plan = choose_kernel(dtype, B, H, cuda_device(device), ieee, directions, layers, proj)
        if plan.mode == "grid" and device in _grid_disabled:
            return as_per_step(plan, _grid_disabled[device])
        return plan
    return choose_interpreted(dtype, B, H, ieee, directions, layers, proj)


@cache
def choose_interpreted(dtype: torch.dtype, B: int, H: int, ieee: bool, directions: int, layers: int, proj: int) -> Plan:
    """choose() in the interpreter: an H100's plan, as far as it can run there."""
    plan = replace(choose_kernel(dtype, B, H, H100, ieee, directions, layers, proj), precision="ieee")
    if plan.mode == "grid":
        # Programs run one after another in the interpreter: one that waits for another would wait for ever, and a few
        # take less time than many.
        many = Tiles(batch=32, units=32, chunk=128, warps=4)
        few = replace(many, chunk=4 * 64 // dtype.itemsize, split=4, poll=True)
        steps = as_per_step(plan, "the interpreter runs programs one after another")
        forward, backward = (few if tiles.poll else many for tiles in (plan.forward, plan.backward))
        return replace(steps, forward=forward, backward=backward)
    return plan


def layers_together(dtype: torch.dtype, B: int, H: int, layers: int, device: torch.device, ieee: bool) -> list[int]:
    """How many layers each launch of a stack of `layers` has, the first launch first."""
    if why_torch(dtype, device) is not None:
        return [1] * layers
    return grouped(dtype, B, H, layers, cuda_device(device) if device.type == "cuda" else H100, ieee)


def in_kernel(dtype: torch.dtype, B: int, H: int, P: int, device: torch.device, ieee: bool, directions: int) -> bool:
    """Whether the kernels are to project to P features; otherwise W_hr is folded into W_hh."""
    if why_torch(dtype, device) is not None:
        return False
    return projects(dtype, B, H, P, cuda_device(device) if device.type == "cuda" else H100, ieee, directions)


def choose_one_step(dtype: torch.dtype, device: torch.device, ieee: bool) -> Plan:
    """Returns the plan for one step of inference, the input's product included.

    ieee: as in choose().
    """
    why = why_torch(dtype, device)
    if why is not None:
        return on_torch(why)
    return one_step_in("ieee" if dtype != torch.float32 or device.type == "cpu" else "tf32x3" if ieee else "tf32")


@cache
def one_step_in(precision: str) -> Plan:
    """The plan of one step in a precision; one object, with which launch.py keeps what it has prepared."""
    tiles = Tiles(batch=16, units=16, chunk=64, warps=4)
    why = "one step without gradients: one launch a layer, which writes the new state alone"
    return Plan("one step", tiles, None, 0, precision, why)


def with_memory_estimate(plan: Plan, dtype: torch.dtype, H: int, P: int, chunk: int) -> Plan:
    """A plan that says what it keeps for backward; P: proj_size; chunk: 0 without recompute."""
    if plan.mode == "torch":
        return plan
    size, cell = dtype.itemsize, 8 if dtype == torch.float64 else 4
    if chunk:
        return replace(plan, chunk=chunk, saved_bytes=-(-((P or H) * size + H * cell) // chunk))
    return replace(plan, saved_bytes=(4 * size + cell) * H)


@cache
def as_per_step(plan: Plan, reason: str) -> Plan:
    """A grid plan with one launch a step instead."""
    why = f"one launch a step, because {reason}; {plan.why}"
    return replace(
        plan,
        mode="step",
        forward=without_exchange(plan.forward),
        backward=without_exchange(plan.backward),
        resident=0,
        why=why,
    )


_grid_disabled: dict[torch.device, str] = {}


def disable_grid(device: torch.device, reason: str) -> None:
    """Records that a device does not run all programs of a grid plan at once, as when it is shared with others."""
    _grid_disabled[device] = reason
    choose.cache_clear()


@cache
def cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        (properties.major, properties.minor),
    )


def kind_of(dtype: torch.dtype, ieee: bool) -> str:
    """The kind of product, as model.py names it; float64, which only the interpreter has, as float32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32" if ieee else "tf32")


@cache
def grouped(dtype: torch.dtype, B: int, H: int, layers: int, device: Device, ieee: bool) -> list[int]:
    """layers_together() on a device: the sizes, as even as can be, whose launches take least by the model."""
    kind, terms = kind_of(dtype, ieee), model.terms_for(device)

    def step(layers: int) -> float:
        plan = choose_kernel(dtype, B, H, device, ieee, 1, layers)
        if plan.mode != "grid" or plan.forward is None or plan.backward is None:
            return 0.0 if layers == 1 else float("inf")  # alone, these need no flags
        passes = (plan.forward, False), (plan.backward, True)
        return sum(model.step(terms, kind, "grid", tiles, H, B, back, 1, layers).us for tiles, back in passes)

    def sizes(launches: int) -> list[int]:
        return [layers // launches + (k < layers % launches) for k in range(launches)]

    return min(map(sizes, range(1, layers + 1)), key=lambda sizes: sum(map(step, sizes)))


@cache
def projects(dtype: torch.dtype, B: int, H: int, P: int, device: Device, ieee: bool, directions: int) -> bool:
    """in_kernel() on a device: whether a step of both passes then takes less by the model."""
    kind, terms = kind_of(dtype, ieee), model.terms_for(device)

    def step(proj: int) -> float:
        plan = choose_kernel(dtype, B, H, device, ieee, directions, 1, proj)
        passes = (plan.forward, False), (plan.backward, True)
        return sum(
            model.step(terms, kind, plan.mode, tiles, H, B, back, directions, 1, proj).us for tiles, back in passes
        )

    size = 8 if kind == "fp32" else dtype.itemsize
    local = choose_kernel(dtype, B, H, device, ieee, directions).mode == "local"
    return not local and projectable(H, P, size, device) and step(P) < step(0)


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
) -> Plan:
    """Returns the plan among the kernels' three forms.

    ieee: float32 products in full precision, which take three TF32 products and so hold the weights twice.
    directions, layers: in one launch; layers that do not fit together have a plan in mode "step".
    proj: features of a projection in the kernel, which then runs in the step form.
    """
    kind = kind_of(dtype, ieee)
    size = 8 if kind == "fp32" else dtype.itemsize  # of a weight on chip: in full precision it is two TF32 numbers
    precision = "ieee" if dtype != torch.float32 else "tf32x3" if ieee else "tf32"
    # Local: all of W_hh in the registers of one program, beside the addresses of its rows, which narrow ones have more
    # of: more units spill.
    padded, wide = max(16, next_power_of_2(H)), aligned(H, size)
    most = 128 if size == 2 and wide else 64 if size < 8 or wide else 32
    if padded <= most and layers == 1 and not proj:
        # Eight rows a program, as long as all run at once, and where more would spill.
        few = directions * ceil_div(B, 8) <= device.multiprocessors or size > 2 or padded > 64 or not wide
        forward_warps = 4 if padded == 16 or (padded == 32 and wide) else 8
        backward_warps = 4 if padded == 16 or (padded * size <= 128 and wide) else 8
        forward, backward = (
            Tiles(8 if few else 16, padded, padded, warps, split=warps) for warps in (forward_warps, backward_warps)
        )
        why = f"W_hh of H {H} in {name(dtype)} fits on one multiprocessor"
        return Plan("local", forward, backward, 0, precision, why, directions)

    # Grid: a slice of W_hh on each of the multiprocessors.
    forward, backward = candidates(H, size, device, layers)
    if forward and backward and not proj:
        best, back = (
            cheapest(tiles, kind, B, H, device, is_backward, directions, layers)
            for tiles, is_backward in ((forward, False), (backward, True))
        )
        why = (
            f"W_hh of H {H} in {name(dtype)} is spread over {ceil_div(H, best.units)} multiprocessors, "
            f"{best.units} units on each{'; what does not fit is loaded at every step' if best.kept else ''}"
        )
        if layers > 1:
            why += f"; so are W_hh and W_ih of all {layers} layers, each a step behind the one that it takes from"
        return Plan("grid", best, back, device.multiprocessors, precision, why, directions, layers)

    rows = 16 if size == 8 and not aligned(H, size) else 32  # more spill
    forward = backward = Tiles(rows, units=16, chunk=128 // size, warps=4 if aligned(H, size) else 8)
    if proj:
        forward, backward = (Tiles(16, 16, chunk, 4, features=16) for chunk in (128, 256))
    why = f"W_hh of H {H} in {name(dtype)} does not fit on {device.multiprocessors} multiprocessors: one launch a step"
    if proj:
        why = f"{why}, and one for its projection to {proj} features, whose weights are less than W_hh W_hr"
    return Plan("step", forward, backward, 0, precision, why, directions, layers)


def candidates(H: int, size: int, device: Device, layers: int = 1) -> tuple[list[Tiles], list[Tiles]]:
    """The tiles among which the grid form chooses, forward and backward. Args: as choose_kernel() has them."""
    few, many = latency_tiles(H, size, device, layers), grid_tiles(H, size, device, layers)
    return few[0] + many[0], few[1] + many[1]


def cheapest(candidates: list[Tiles], kind: str, B: int, H: int, device: Device, backward: bool, *launch: int) -> Tiles:
    """The candidate whose step takes least by the model; launch: as model.step() takes them."""
    if len(candidates) == 1:
        return candidates[0]
    terms = model.terms_for(device)
    return min(candidates, key=lambda tiles: model.step(terms, kind, "grid", tiles, H, B, backward, *launch).us)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
