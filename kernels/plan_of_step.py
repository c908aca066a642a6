"""Which tiles the kernel of one step has, and how many layers a launch."""

from functools import cache

from .planned import Plan, on_torch
from .tiles import Device, Problem, Tiles, ceil_div

# Batch rows up to which the layers of a stack run in one launch: with more, a layer keeps a device busy by itself.
FEW_ROWS = 64
# Registers of a thread that awaited rows may take.
MOST_REGISTERS = 64
# Layers and directions of a launch: each has weights among the arguments of the kernel.
MOST_LAYERS = 32


def tiles_for(problem: Problem, B: int, itemsize: int, device: Device) -> Tiles:
    """The tiles of one step; itemsize: bytes of an element."""
    widest = itemsize * max(problem.H, problem.directions * (problem.proj or problem.H))  # bytes of a row
    # Full precision, of which each operand becomes two, and narrow loads of float32 take the registers of more rows.
    small = problem.kind == "fp32" or (problem.kind == "tf32" and not problem.wide)
    batch = 8 if (B <= 8 or small) and not device.gcn else 16
    programs = problem.layers * problem.directions * ceil_div(problem.H, 8) * ceil_div(B, batch)
    warps, units = 4 if widest <= 4 * 128 else 8, 8
    if device.gcn.startswith("gfx11"):  # which has half of the registers of a thread
        warps, units = 4 if itemsize > 2 else 16 if widest <= 4096 else 8, 4
    elif device.gcn:
        warps = 8
    elif 2 * programs <= device.multiprocessors and widest >= 1024:
        # What each program loads sets the time of large layers: half as much of it, where there are as many to spare.
        units = 4
    return Tiles(batch, units, warps * 64 // itemsize, warps, split=warps, features=16 if problem.proj else 0)


def chunks_at_once(precision: str, device: Device) -> int:
    """How many chunks of a weight a program has on their way together."""
    if device.gcn.startswith("gfx11"):
        return 1
    return {"tf32": 3, "tf32x3": 2}.get(precision, 4)  # of tf32x3 each operand becomes two


def can_await(columns: int, tiles: Tiles) -> bool:
    """Whether a program has registers for rows of so many columns."""
    return ceil_div(columns, tiles.chunk) * tiles.batch // 2 <= MOST_REGISTERS


def at_once(problem: Problem, tiles: Tiles, B: int, device: Device) -> int:
    """How many layers a launch has; 0: not even one."""
    # Awaiting takes instructions of NVIDIA's.
    alone = B > FEW_ROWS or bool(device.gcn)
    if problem.proj and (alone or not can_await(problem.H, tiles)):
        return 0
    if alone or not can_await(problem.directions * (problem.proj or problem.H), tiles):
        return 1
    return min(problem.layers, MOST_LAYERS // problem.directions)


def plan_for(precision: str, problem: Problem, B: int, itemsize: int, device: Device, most: int = MOST_LAYERS) -> Plan:
    """The plan of one step of a stack, problem.layers; itemsize: bytes of an element; most: layers of a launch."""
    tiles = tiles_for(problem, B, itemsize, device)
    layers = min(at_once(problem, tiles, B, device), most)
    if layers == 0:
        return on_torch("the kernel of one step has no registers for the rows of this projection")
    return plan_on(precision, tiles, problem.directions, layers, problem.layers)


@cache
def plan_on(precision: str, tiles: Tiles, directions: int, layers: int, of_stack: int) -> Plan:
    """The plan of one step; one object, with which launch.py keeps what it has prepared."""
    if of_stack == 1:
        why = "one step without gradients: one launch, which writes the new state alone"
    elif layers >= of_stack:
        why = f"one step without gradients: one launch for all {of_stack} layers, each of which waits for the one below"
    elif layers == 1:
        why = "one step without gradients: one launch a layer, which writes the new state alone"
    else:
        why = f"one step without gradients: one launch for {layers} layers, each of which waits for the one below"
    return Plan("one step", tiles, None, 0, precision, why, directions, layers)
