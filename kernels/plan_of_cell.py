"""Which form and tiles the kernels of any cell run in: what fits, by the model of nn.LSTM's kernels the fastest.

No compiler has been asked ahead about a cell of a user's. So what can be counted decides, and what a device refuses, or
compiles with registers in memory, makes way for the next at the next call.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch

from . import model
from .choice import kind_of, precision_of, why_mode
from .equations import Equations
from .findings import Refused, alike
from .limits import registers_of_polled, registers_of_whole
from .plan import disable_grid, follow, grid_disabled, hardware_of, why_torch
from .planned import Plan, composed, name
from .slots import padded
from .tiles import POLLED, Device, Problem, Tiles, ceil_div

# Behind flags: batch rows, units and warps of a program that shares a step with others; forward, backward.
FLAGS = [(16, 16, 4), (32, 16, 8), (16, 32, 8), (32, 32, 8)], [(16, 16, 4), (16, 16, 8), (32, 16, 8), (32, 32, 8)]
KEPT = (96, 64, 48, 32, 24)  # KiB of W_hh on chip where not all fits
STEP = [(32, 16, 4)]
CHUNK = {"grid": 256, "step": 128}  # bytes of a row of W_hh; in full precision 128
# Chunks that backward keeps on chip in full precision: the loop is written out for these, and takes registers for each.
MOST_KEPT = 24
# Up to so many numbers of a unit backward has registers for the larger tiles of a thread.
FEW = 5
# With W_hh in registers: of all units in one program, units and warps, each for 8 batch rows and for 16.
LOCAL = [(16, 4), (32, 4), (64, 8), (128, 8)]
MOST_UNITS = 64  # ... where programs that poll can have these, which then take less
# Of a thread's 255 registers those that may be counted on for W_hh, what is polled and sums. What a cell takes beside
# them nobody knows ahead.
MOST_REGISTERS = 208


class Use(NamedTuple):
    """A kernel that a device has refused, or might: of a cell, a pass of a problem, in a form with its tiles."""

    cell: str
    problem: Problem
    mode: str
    tiles: Tiles

    @classmethod
    def of(cls, cell: Equations, problem: Problem, mode: str, tiles: Tiles) -> "Use":
        return cls(cell.name, alike(problem), mode, tiles)

    def __str__(self) -> str:
        return f"{self.mode}, {'backward' if self.problem.backward else 'forward'}, {self.tiles}"


_refused: dict[tuple[Device, Use], str] = {}
_spilled: set[tuple[Device, Use]] = set()


def bytes_on_chip(tiles: Tiles, problem: Problem, gates: int) -> int:
    """Of W_hh in a program, and of a chunk of h (dr)."""
    rows = tiles.units * (1 if problem.backward else padded(gates))
    chunks = (gates if problem.backward else 1) * ceil_div(problem.H, tiles.chunk)
    # What does not stay streams through one chunk.
    count = min(chunks, tiles.kept + 1) if tiles.kept else chunks
    return (count * rows * problem.size + tiles.batch * problem.itemsize) * tiles.chunk


def in_registers(tiles: Tiles, problem: Problem, gates: int) -> int:
    """Registers of a thread that W_hh takes; where programs poll, with what is polled and the sums."""
    slots = padded(gates)
    if not tiles.poll:
        return registers_of_whole(tiles, problem, slots)
    rows = tiles.units * (1 if problem.backward else slots)
    columns = (gates if problem.backward else 1) * ceil_div(problem.H, tiles.chunk) * tiles.chunk
    return registers_of_polled(tiles, problem, rows, columns)


def local(problem: Problem, gates: int) -> Iterator[Tiles]:
    """The tiles of one program with all units. Each warp has a part of W_hh, of at least 16 rows, and each slot of the
    gates as many parts."""
    slots = padded(gates)
    for (units, warps), batch in product(LOCAL, (8, 16)):
        split = max(slots, min(warps, slots * units // 16))
        few = units <= MOST_UNITS or not problem.wide
        if few and units >= problem.H and slots * units >= 16 * split:
            yield Tiles(batch, units, units, split, split=split)


def polled(problem: Problem, gates: int) -> Iterator[Tiles]:
    """The tiles of programs that poll h, or dr. Forward has the rows of all gates' slots, backward of one."""
    for (batch, units), warps in POLLED if problem.wide else ():
        units = units if problem.backward else max(8, min(units, units * 4 // padded(gates)))
        if units * (1 if problem.backward else padded(gates)) >= 16:
            yield Tiles(batch, units, 64 // problem.itemsize * warps, warps, split=warps, poll=True)


def behind_flags(mode: str, problem: Problem, cell: Equations) -> Iterator[Tiles]:
    """The tiles of programs that wait for flags, or have a launch a step."""
    gates = cell.gates
    # Masks of a last chunk that is not whole take registers, too.
    masked = problem.H % (CHUNK[mode] // problem.size) > 0
    long = CHUNK[mode] if problem.kind != "fp32" and not (masked and problem.backward) else 128
    many = cell.vectors + cell.states + cell.kept > FEW or problem.kind == "fp32" or masked
    for batch, units, warps in STEP if mode == "step" else FLAGS[problem.backward]:
        if mode == "grid" and problem.backward and many and (warps < 8 or units > 16):
            continue
        chunk = long // problem.size
        if gates > 4:
            units = max(16, units * 4 // padded(gates))  # as many rows of W_hh
        tiles = Tiles(batch, units, chunk, warps)
        kept = [0]
        if mode == "grid":
            of_chunk = units * (1 if problem.backward else padded(gates)) * chunk * problem.size
            chunks = (gates if problem.backward else 1) * ceil_div(problem.H, chunk)
            kept += [count for size in KEPT if 0 < (count := size * 1024 // of_chunk) < chunks]
            if problem.backward and problem.kind == "fp32":
                kept = [count for count in kept if (count or chunks) <= MOST_KEPT]
        for each in dict.fromkeys(kept):
            yield replace(tiles, kept=each)


def listed(mode: str, problem: Problem, cell: Equations, device: Device) -> Iterator[Tiles]:
    """The tiles that a pass can have in a form, as far as can be counted."""
    registers = {"local": local, "grid": polled}
    if mode in registers:
        for tiles in dict.fromkeys(registers[mode](problem, cell.gates)):
            if in_registers(tiles, problem, cell.gates) <= MOST_REGISTERS:
                yield tiles
    if mode != "local":
        for tiles in behind_flags(mode, problem, cell):
            if mode == "step" or bytes_on_chip(tiles, problem, cell.gates) <= device.shared:
                yield tiles


def ranked(mode: str, problem: Problem, B: int, cell: Equations, device: Device) -> list[Tiles]:
    """Those that have not been refused, that which takes least by the model first, what spills last."""
    found = []
    for tiles in listed(mode, problem, cell, device):
        use = device, Use.of(cell, problem, mode, tiles)
        if use in _refused or (mode == "grid" and ceil_div(problem.H, tiles.units) > device.multiprocessors):
            continue
        us = model.step(model.terms_for(device), mode, tiles, problem, B).us
        found.append((use in _spilled, us, tiles.batch, tiles.units, tiles))
    return [tiles for *_, tiles in sorted(found, key=lambda each: each[:-1])]


@lru_cache(1024)
def choose_for(
    cell: Equations, dtype: torch.dtype, B: int, H: int, device: torch.device, ieee: bool, directions: int
) -> Plan:
    """Returns the plan for a recurrence of a cell with H hidden units over B rows; in mode "composed" where no kernel
    runs it, with the reason.

    ieee: float32 products in full precision. directions: in a launch.
    """
    if (why := why_torch(dtype, device)) is not None:
        return composed(why.replace("torch's own LSTM", "torch operations, step by step"))
    hardware = hardware_of(device)
    if hardware.gcn:
        return composed("AMD: torch operations, step by step; the kernels of any cell are for NVIDIA's devices")
    # The interpreter, too, runs one program after another.
    plan = plan_on(hardware, cell, dtype, B, H, ieee, directions, device.type == "cuda" and not grid_disabled(device))
    return plan if device.type == "cuda" else replace(plan, precision="ieee")


def plan_on(
    device: Device, cell: Equations, dtype: torch.dtype, B: int, H: int, ieee: bool, directions: int, grid: bool = True
) -> Plan:
    """choose_for() on a device. grid: whether all programs of a launch run at once there."""
    problem = Problem(kind_of(dtype, ieee), H, False, directions)
    of_cell = ((use, why) for (of, use), why in _refused.items() if (of, use.cell) == (device, cell.name))
    refused = tuple(f"{use}: {why}" for use, why in of_cell)
    for mode in ("local", "grid", "step") if grid else ("local", "step"):
        forward, backward = (ranked(mode, problem._replace(backward=b), B, cell, device) for b in (False, True))
        if forward and backward:
            why = f"the cell {cell.name.split()[0]}: {why_mode(mode, forward[0], weight(H, dtype), problem, device)}"
            resident = device.multiprocessors if mode == "grid" else 0
            tiles = forward[0], backward[0]
            plan = Plan(mode, *tiles, resident, precision_of(dtype, ieee, device), why, directions)
            return replace(plan, refused=refused, measured="a model of the LSTM's kernels; no other cell was measured")
    return replace(composed("no kernel of this cell runs here: torch operations, step by step"), refused=refused)


def weight(H: int, dtype: torch.dtype) -> str:
    return f"W_hh of H {H} in {name(dtype)}"


def refuse(device: torch.device, use: Use, refused: Refused) -> None:
    """Records that a kernel does not run on a device: from now on plans do without it."""
    if refused.cooperative and use.mode == "grid":
        return disable_grid(device, str(refused))
    _refused[hardware_of(device), use] = str(refused)
    choose_for.cache_clear()


def note_spills(device: torch.device, use: Use, compiled: Any) -> None:
    """Has later plans do without a kernel that keeps registers in memory, where there is one that does not."""
    if compiled.n_spills:
        _spilled.add((hardware_of(device), use))
        choose_for.cache_clear()


follow(choose_for.cache_clear)
