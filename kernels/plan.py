"""Which kernel form runs a recurrence, with which tiles, and why."""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel: batch rows and hidden units of a program, reduction chunk of a product; its warps."""

    batch: int
    units: int
    chunk: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """How one layer and direction runs.

    mode: "local", "grid" or "step" (the three forms of the recurrence's kernels), "one step" (a kernel of its own for
        one step of inference), or "torch" (torch's own LSTM).
    forward, backward: the tiles of each pass; None in mode "torch", backward also in "one step".
    resident: programs that the device runs at once, one a multiprocessor; 0 where the mode does not depend on it.
    precision: of float32 products, "tf32", "tf32x3" (three TF32 products, as exact as float32) or "ieee".
    why: the reason, in words.
    """

    mode: str
    forward: Tiles | None
    backward: Tiles | None
    resident: int
    precision: str
    why: str

    @property
    def higher_derivatives(self) -> str:
        """How derivatives of gradients, and forward mode, are computed."""
        if self.mode == "torch":
            return "as torch's own LSTM has them"
        return "composed of torch operations, step by step: slow beside the kernels"


@dataclass(frozen=True)
class Device:
    """What a plan depends on: multiprocessors, bytes of shared memory that a program may use, compute capability."""

    multiprocessors: int
    shared: int
    capability: tuple[int, int]


A100 = Device(108, 163 * 1024, (8, 0))
H100 = Device(132, 227 * 1024, (9, 0))
B200 = Device(148, 227 * 1024, (10, 0))


def interpreted() -> bool:
    """True where TRITON_INTERPRET=1 was set before triton was imported: the kernels then run on CPU tensors."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def why_torch(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's own LSTM serves tensors of `dtype` on `device`; None where the kernels do."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"{device.type} tensors: torch's own LSTM; the kernels run on CUDA"
    if dtype == torch.float64 and device.type == "cuda":
        return "float64 on CUDA: torch's own LSTM"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"{name(dtype)}: torch's own LSTM"
    return None


def choose(dtype: torch.dtype, B: int, H: int, device: torch.device, ieee: bool) -> Plan:
    """Returns the plan for a recurrence of H hidden units over B rows of `dtype` on `device`.

    ieee: float32 products in full precision.
    """
    why = why_torch(dtype, device)
    if why is not None:
        return Plan("torch", None, None, 0, "ieee", why)
    if device.type == "cuda":
        plan = choose_kernel(dtype, B, H, cuda_device(device), ieee)
        if plan.mode == "grid" and device in _refused:
            return by_steps(plan, _refused[device])
        return plan
    plan = replace(choose_kernel(dtype, B, H, H100, ieee), precision="ieee")
    if plan.mode == "grid":
        # Programs run one after another in the interpreter: one that waits for another would wait for ever.
        return by_steps(plan, "the interpreter runs programs one after another")
    return plan


def choose_one_step(dtype: torch.dtype, device: torch.device, ieee: bool) -> Plan:
    """Returns the plan for one step of inference, the input's product included.

    ieee: as in choose().
    """
    why = why_torch(dtype, device)
    if why is not None:
        return Plan("torch", None, None, 0, "ieee", why)
    precision = "ieee" if dtype != torch.float32 or device.type == "cpu" else "tf32x3" if ieee else "tf32"
    tiles = Tiles(batch=16, units=16, chunk=64, warps=4)
    why = "one step without gradients: one launch a layer, which writes the new state alone"
    return Plan("one step", tiles, None, 0, precision, why)


def by_steps(plan: Plan, reason: str) -> Plan:
    """A grid plan with one launch a step instead."""
    return replace(plan, mode="step", resident=0, why=f"one launch a step, because {reason}; {plan.why}")


_refused: dict[torch.device, str] = {}


def refuse(device: torch.device, reason: str) -> None:
    """Records that a device does not run all programs of a grid plan at once, as when it is shared with others."""
    _refused[device] = reason


@cache
def cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        (properties.major, properties.minor),
    )


@cache
def choose_kernel(dtype: torch.dtype, B: int, H: int, device: Device, ieee: bool) -> Plan:
    """Returns the plan among the kernels' three forms.

    ieee: float32 products in full precision, which take three TF32 products and so hold the weights twice.
    """
    precision = "ieee"
    size = dtype.itemsize
    if dtype == torch.float32:
        precision = "tf32x3" if ieee else "tf32"
        size = 8 if ieee else 4
    chunk = 128 if size == 2 else 64 if size == 4 else 32

    # Rows that no wide load divides keep registers for their many addresses: smaller tiles there.
    wide = H * dtype.itemsize % 16 == 0

    # tcgen05 would split W_hh in two TF32 numbers again at every step; with sixteen warps a product is mma.sync's.
    split = device.capability[0] == 10 and size == 8

    # Local: all of W_hh on one multiprocessor, with a fifth of its memory left to the layout conversions of a step.
    padded = max(16, triton.next_power_of_2(H))
    if padded <= (32 if split else 64 if H % 4 else 128) and 4 * padded * padded * size <= 0.8 * device.shared:
        # At 64 units eight warps spill in TF32 (Triton 3.7, A100), four in 16 bit (Triton 3.7, B200).
        warps = min(8, padded // 8) if (padded, size) != (64, 4) else 4
        tiles = Tiles(batch=16, units=padded, chunk=padded, warps=warps)
        forward = replace(tiles, warps=16) if split and padded > 16 else tiles
        why = f"W_hh of H {H} in {name(dtype)} fits on one multiprocessor"
        return Plan("local", forward, tiles, 0, precision, why)

    # Grid: a slice of W_hh on each of the multiprocessors. Full precision takes 16 units or spills registers.
    columns = triton.cdiv(H, chunk) * chunk
    for units in (16, 8) if size < 8 else (16,):
        programs = triton.cdiv(H, units)
        if programs <= device.multiprocessors and 4 * units * columns * size <= 0.8 * device.shared:
            # The smallest batch tile with which all groups run at once.
            small = programs * triton.cdiv(B, 16) <= device.multiprocessors or size == 8 or not wide
            # The loads of a step are all in flight together and keep registers: eight warps share them. wgmma's 64 rows
            # are the work of four, each with twice the loads, so that a larger batch tile takes shorter chunks there.
            wgmma = device.capability[0] == 9 and units == 16
            # Over the longest rows that a B200 spreads, eight warps spill one register (Triton 3.7).
            longest = device.capability[0] == 10 and units == 8 and not small
            four = wide and (wgmma or longest)
            shorter = not wide or split or (four and not small)
            forward = Tiles(
                batch=16 if small else 32,
                units=units,
                chunk=chunk // 2 if shorter else min(64, chunk),
                warps=16 if split else 4 if four else 8,
            )
            # In TF32 over the longest rows a doubled chunk makes the compiler settle for 128 registers and spill some.
            short = not wide or (size == 4 and units == 8 and device.capability[0] >= 9)
            backward = Tiles(
                batch=16 if short and wide and device.capability[0] == 10 else 32,
                units=units,
                chunk=chunk if short else 2 * chunk,
                # Four warps repeat nothing of a product, but only of float32 do they hold narrow loads without spills,
                # and in full precision only of the shorter rows that fit an A100.
                warps=4 if not wide and (size == 4 or (size == 8 and device.capability[0] == 8)) else 8,
            )
            why = f"W_hh of H {H} in {name(dtype)} is spread over {programs} multiprocessors, {units} units on each"
            return Plan("grid", forward, backward, device.multiprocessors, precision, why)

    tiles = Tiles(batch=32, units=16, chunk=chunk // 2, warps=4 if wide else 8)
    why = f"W_hh of H {H} in {name(dtype)} does not fit on {device.multiprocessors} multiprocessors: one launch a step"
    return Plan("step", tiles, tiles, 0, precision, why)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
