"""What keeps a recurrence from having tiles on a device: what can be counted, and what compiling has found."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from .environment import TRITON
from .tiles import A100, DEVICES, Device, Problem, Tiles, ceil_div, programs_of

# The compute capabilities for which limits.json says what compiling has found. Machine code for 8.9 takes what that for
# 8.6 takes, in every kernel of a sample.
CAPABILITIES = sorted({device.capability for device in DEVICES.values()} - {(8, 9)})
# Of a thread's 255 registers those that what is multiplied may take. Addresses and a cell take the others, and so do
# lengths and resets, without which limits.json was made.
MOST_REGISTERS = 192


def target(device: Device) -> str:
    """What is compiled for a device, in limits.json: "sm_90", of the nearest capability below its own, or "gfx942"."""
    if device.gcn:
        return device.gcn
    major, minor = max(each for each in CAPABILITIES if each <= device.capability)
    return f"sm_{major}{minor}"


def why_not(tiles: Tiles, mode: str, problem: Problem, device: Device) -> list[str]:
    """What keeps a pass from having these tiles in a form on a device, in words; nothing: it can have them.

    What is counted here is the least that a kernel takes. Where compiling has found that it takes more, limits.json has
    the largest H at which it does not.
    """
    if device.gcn and (mode != "step" or problem.layers > 1 or problem.proj):
        # And the flags of a grid would have to pass between dies that share no cache.
        return ["on AMD one layer runs step by step: the other kernels have instructions of NVIDIA's"]
    if not device.gcn and device.capability < CAPABILITIES[0]:
        major, minor = device.capability
        return [f"compute capability {major}.{minor}: Triton has no matrix instructions for it"]
    reasons = {"local": why_not_local, "grid": why_not_grid, "step": why_not_step}[mode](tiles, problem, device)
    most, why = limits().get(limit_name(tiles, mode, problem, target(device)), (problem.H, ""))
    return reasons if most >= problem.H else [*reasons, f"{why} from H {most + 1} on"]


def registers_of_whole(tiles: Tiles, problem: Problem, gates: int) -> int:
    """Registers of a thread that W_hh takes in one program with all units."""
    return gates * tiles.units * tiles.units * problem.size // (128 * tiles.warps)


def registers_of_polled(tiles: Tiles, problem: Problem, rows: int, columns: int, matrices: int = 1) -> int:
    """Registers of a thread that take so many rows and columns of as many weights, what is polled and the sums."""
    weights, polled = matrices * rows * columns * problem.size, tiles.batch * columns * problem.itemsize
    # A warp has all sums, or two of them for each batch row.
    return (weights + polled) // (128 * tiles.warps) + max(rows * tiles.batch // 32, 2 * tiles.batch)


def why_not_local(tiles: Tiles, problem: Problem, device: Device) -> list[str]:
    """One program has all units, and all of W_hh in its registers."""
    registers = registers_of_whole(tiles, problem, 4)
    checks = {
        f"H {problem.H}, a program has {tiles.units} units": tiles.units < problem.H,
        f"W_hh takes {registers} of {MOST_REGISTERS} registers": registers > MOST_REGISTERS,
        "one program has no several layers": problem.layers > 1,
        "a projection is a launch of its own at every step": problem.proj > 0,
    }
    return [why for why, is_so in checks.items() if is_so]


def why_not_step(tiles: Tiles, problem: Problem, device: Device) -> list[str]:
    """A launch streams W_hh, on any number of programs: nothing that could be counted."""
    return []


def why_not_grid(tiles: Tiles, problem: Problem, device: Device) -> list[str]:
    """All programs run at once, and hold W_hh, or a part of it, between them."""
    programs = problem.layers * programs_of(tiles, problem.H, 1)[0]
    matrices = 2 if problem.layers > 1 else 1  # W_hh, and W_ih
    rows = (tiles.team if problem.backward else 4) * tiles.units  # of each that a program multiplies
    gates = 4 // tiles.team if problem.backward else 1  # that it sums over
    columns = gates * ceil_div(problem.H, tiles.chunk) * tiles.chunk
    chunks = columns // tiles.chunk
    checks = {
        f"{programs} programs, {device.multiprocessors} multiprocessors": programs > device.multiprocessors,
        "a projection is a launch of its own at every step": problem.proj > 0,
        f"W_hh has {chunks} chunks, of which {tiles.kept} would be kept": 0 < chunks <= tiles.kept,
        "row tiles in turn are for devices with 160 KB of shared memory": (
            tiles.in_turn and device.shared < A100.shared
        ),
    }
    if tiles.poll:
        registers = registers_of_polled(tiles, problem, rows, columns, matrices)
        checks[f"W_hh, what is polled and sums take {registers} of {MOST_REGISTERS} registers"] = (
            registers > MOST_REGISTERS
        )
    else:
        of_chunk = rows * tiles.chunk * problem.size
        # All chunks; or those that are kept and one that streams through.
        weights = matrices * chunks * of_chunk if not tiles.kept else (tiles.kept + 1) * of_chunk
        taken = weights + tiles.batch * tiles.chunk * problem.itemsize  # and a chunk of h (dgates)
        checks[f"W_hh takes {taken} of {device.shared} bytes of shared memory"] = taken > device.shared
        # With sixteen warps the product is mma.sync's.
        splits = problem.size == 8 and rows >= 64 and tiles.warps < 16 and target(device) == "sm_100"
        checks["tcgen05 would split W_hh in two TF32 numbers at every step"] = splits
    return [why for why, is_so in checks.items() if is_so]


def limit_name(tiles: Tiles, mode: str, problem: Problem, target: str) -> str:
    """What a limit in limits.json is called: a compile without its H."""
    kind = "16 bit" if problem.itemsize == 2 else problem.kind
    kind += " by 8 bits" if problem.weights else ""
    launch = f"{mode}{', layers' if problem.layers > 1 else ''}{', projection' if problem.proj else ''}"
    shape = f"{tiles.batch}x{tiles.units} chunk {tiles.chunk} warps {tiles.warps}"
    shape += f" kept {tiles.kept}" if tiles.kept else ""
    shape += f" team {tiles.team}" if tiles.team > 1 else ""
    shape += " polled" if tiles.poll else ""
    shape += f" in turn, parts of {tiles.part}" if tiles.in_turn else ""
    which = "backward" if problem.backward else "forward"
    return f"{target} {kind} {which}, {launch}, {shape}, {class_of(problem, tiles, mode)}"


def class_of(problem: Problem, tiles: Tiles, mode: str) -> str:
    """The class of sizes among which a longer row takes more: "whole" in whole chunks and "masked", where 16-byte loads
    divide a row; narrow ones, "even" and "odd". In the grid form "power" has those of the whole ones that are powers of
    two, whose addresses take fewer registers; outside it "masked" stands for all wide ones, and "odd" for narrow ones.
    """
    H, grid = problem.H, mode == "grid"
    if not problem.wide:
        return "even" if grid and H % 2 == 0 else "odd"
    if not grid or H % tiles.chunk:
        return "masked"
    return "whole" if H & (H - 1) else "power"


def checked(device: Device) -> bool:
    """Whether this Triton has compiled what is planned for devices of a device's kind: then no step loads spilled
    registers, whatever a kernel spills before the first one."""
    known = bool(device.gcn) or device.capability in {each.capability for each in DEVICES.values()}
    return known and TRITON is not None and target(device) in shipped()["checked"].get(minor(TRITON), ())


def minor(version: str) -> str:
    """The part of a Triton's version that decides what it compiles: "3.7" of "3.7.1"."""
    return ".".join(version.split(".")[:2])


def limits() -> dict[str, tuple[int, str]]:
    """By limit_name() the largest H at which a kernel was found to keep registers and shared memory under every Triton
    that was asked, and what happens beyond."""
    return shipped()["limits"]


@cache
def shipped() -> dict[str, Any]:
    """limits.json: "checked", by a Triton the targets whose plans it has compiled, and "limits". Only python -m
    bench.offline writes the file."""
    return json.loads(Path(__file__).with_name("limits.json").read_text(encoding="utf-8"))
