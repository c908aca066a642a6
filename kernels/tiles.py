"""The tiles that a kernel can have: a table of them. limits.py says which of them a recurrence can have on a device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple


@dataclass(frozen=True)
class Tiles:
    """How one kernel divides its work.

    batch, units: batch rows and hidden units of a program. chunk: units of a gate that one product reduces over.
    warps: of a program.
    kept: chunks of W_hh that stay on chip where not all do (0: all); the others are loaded at every step.
    team: programs that share the products of all their units in backward, a gate for each (4), or do not (1).
    split: with W_hh in registers, parts of a chunk, each of which a warp sums for itself; in the local form of all of
        W_hh. Otherwise 1.
    poll: the kernels for few rows: W_hh stays in registers, and a program looks whether h (dgates) is there, element by
        element, instead of at a step flag. Each warp then has a part of every chunk, of 64 bytes.
    features: of a projection that a program computes in the launch that has it; 0: the projection is not in the kernel.
    part: of the kernels for large batches, batch rows of a part, whose cells are computed at once; in forward it has 32
        bytes of units. `batch` are then the rows of a tile, and a program goes over several tiles at every step, one
        after another. 0: of the other kernels.
    """

    batch: int
    units: int
    chunk: int
    warps: int
    kept: int = 0
    team: int = 1
    split: int = 1
    poll: bool = False
    features: int = 0
    part: int = 0

    @property
    def in_turn(self) -> bool:
        """Whether the kernels for large batches have them."""
        return self.part > 0

    def __str__(self) -> str:
        of_weight = f", {self.kept} of them on chip" if self.kept else ""
        text = f"{self.batch} rows x {self.units} units, chunks of {self.chunk}{of_weight}, {self.warps} warps"
        text += ", teams of 4" if self.team > 1 else ""
        text += ", polled" if self.poll else ""
        return text + (f", in turn, the cells of {self.part} rows at once" if self.in_turn else "")


@dataclass(frozen=True)
class Device:
    """What a plan depends on: multiprocessors, bytes of shared memory that a program may use, compute capability; gcn:
    AMD's name for a device of its own, such as "gfx942", whose capability says nothing."""

    multiprocessors: int
    shared: int
    capability: tuple[int, int]
    gcn: str = ""


A100 = Device(108, 163 * 1024, (8, 0))
H100 = Device(132, 227 * 1024, (9, 0))  # and H200
B200 = Device(148, 227 * 1024, (10, 0))
DEVICES = {
    "A100": A100,
    "H100": H100,
    "B200": B200,
    "RTX 3090": Device(82, 99 * 1024, (8, 6)),
    "A10": Device(72, 99 * 1024, (8, 6)),
    "RTX 4090": Device(128, 99 * 1024, (8, 9)),
    "L4": Device(58, 99 * 1024, (8, 9)),
    "RTX 5090": Device(170, 99 * 1024, (12, 0)),
    "RTX PRO 6000": Device(188, 99 * 1024, (12, 0)),
}
# Compute units, and the capability that torch gives them.
AMD = {
    "MI300X": Device(304, 64 * 1024, (9, 4), "gfx942"),
    "RX 7900 XTX": Device(96, 64 * 1024, (11, 0), "gfx1100"),
}


class Problem(NamedTuple):
    """What one pass of a launch multiplies.

    kind: of products, "bf16", "fp16", "tf32" or "fp32". H: hidden units. backward: the pass.
    directions, layers: in the launch. proj: features of a projection in the kernel.
    weights: "int8" or "fp8" of a W_hh whose numbers have 8 bits on chip; "" of another.
    """

    kind: str
    H: int
    backward: bool = False
    directions: int = 1
    layers: int = 1
    proj: int = 0
    weights: str = ""

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory."""
        return 2 if self.kind in ("bf16", "fp16") else 4

    @property
    def size(self) -> int:
        """Bytes of a weight on chip: in full precision it is two TF32 numbers."""
        if self.weights:
            return 1
        return 8 if self.kind == "fp32" else self.itemsize

    @property
    def wide(self) -> bool:
        """Whether 16-byte loads divide every row."""
        return self.H * self.itemsize % 16 == 0 and self.proj * self.itemsize % 16 == 0


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes microseconds on the host."""
    return -(-a // b)


def programs_of(tiles: Tiles, H: int, B: int) -> tuple[int, int]:
    """How many programs hold H units, in whole teams, and how many batch groups B rows are."""
    return tiles.team * ceil_div(H, tiles.team * tiles.units), ceil_div(B, tiles.batch)


def max_coresident(slots: int, recurrences: int, batch_groups: int, stacked: bool) -> tuple[int, int]:
    """How many recurrences and batch groups a launch has where `slots` groups of a recurrence can be resident; the
    others follow in further launches. Layers of a stack wait for each other, so all are in each launch."""
    both = recurrences, max(1, min(batch_groups, slots // recurrences))
    single = 1, max(1, min(batch_groups, slots))
    if stacked or (
        slots >= recurrences and ceil_div(batch_groups, both[1]) <= recurrences * ceil_div(batch_groups, single[1])
    ):
        return both
    return single


def in_turn(slots: int, recurrences: int, row_tiles: int) -> tuple[int, int]:
    """How many recurrences a launch has, and groups of each to which all row tiles are dealt as evenly as can be."""
    at_once = recurrences if slots >= recurrences else 1
    groups = max(1, slots // at_once)
    return at_once, ceil_div(row_tiles, ceil_div(row_tiles, groups))


def without_exchange(tiles: Tiles) -> Tiles:
    """The tiles of a program that waits for no other one."""
    return replace(tiles, team=1, part=0)


# The table. By the bytes of a weight on chip, and whether loads are wide: rows of forward and of backward. A row has
# batch rows, units, bytes of a chunk for each row of the weight, warps and, in backward, the programs of a team. Where
# the model finds no difference the first one is taken. Narrow loads keep their many addresses: they have small tiles.
Rows = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]

# Behind flags, with all of W_hh in shared memory.
FLAGS: dict[tuple[int, bool], Rows] = {
    (2, True): (
        [(32, 16, 128, 4), (32, 16, 128, 8), (16, 16, 128, 4), (64, 16, 64, 8)]
        + [(16, 32, 128, 8), (32, 32, 128, 8), (64, 32, 64, 8)],
        [(64, 16, 128, 8, 4), (16, 16, 128, 4, 4), (32, 16, 128, 8, 4), (64, 32, 256, 8)],
    ),
    (2, False): (
        [(16, 16, 256, 4), (16, 16, 128, 4), (16, 16, 128, 8), (32, 16, 128, 8)],
        [(16, 16, 256, 4, 4), (16, 16, 128, 4, 4), (16, 16, 256, 8), (32, 16, 128, 8, 4)],
    ),
    (4, True): (
        [(32, 16, 128, 4), (32, 16, 128, 8), (32, 16, 256, 8), (16, 16, 256, 4), (64, 16, 64, 8)]
        + [(32, 8, 256, 8), (16, 32, 128, 8), (32, 32, 128, 8), (64, 32, 64, 8)],
        [(64, 16, 256, 8), (16, 16, 128, 4, 4), (32, 16, 128, 8, 4)],
    ),
    (4, False): (
        [(16, 16, 128, 4), (16, 8, 128, 8), (32, 16, 128, 8)],
        [(16, 16, 128, 4, 4), (32, 16, 128, 8, 4)],
    ),
    (8, True): ([(16, 16, 256, 4), (16, 16, 256, 8), (16, 16, 128, 16)], [(64, 16, 256, 8), (32, 16, 256, 8)]),
    (8, False): ([(16, 16, 128, 8)], [(32, 16, 256, 8), (32, 16, 256, 4)]),
}
# Behind flags, with a part of W_hh in shared memory, of so many KiB, and the rest loaded at every step.
KEPT = (136, 96, 80, 64, 48, 32, 24)
STREAMED: dict[tuple[int, bool], Rows] = {
    (2, True): (
        [(32, 16, 128, 8), (16, 16, 128, 4), (16, 32, 128, 8)],
        [(32, 16, 128, 8, 4), (16, 16, 128, 4, 4), (32, 32, 256, 8)],
    ),
    (4, True): (
        [(32, 16, 128, 8), (16, 16, 128, 4), (16, 32, 128, 8)],
        [(32, 16, 128, 8, 4), (32, 16, 128, 4, 4), (16, 16, 128, 4, 4), (64, 16, 256, 8), (32, 32, 256, 8)],
    ),
    (4, False): ([], [(16, 8, 128, 4, 4)]),
    (8, True): ([(16, 16, 128, 4)], [(16, 16, 128, 4, 4), (16, 16, 256, 8, 4), (64, 16, 256, 8)]),
}
# Behind flags, of several layers, each with W_ih beside W_hh.
STACKED: dict[tuple[int, bool], Rows] = {
    (2, True): (
        [(32, 16, 128, 4), (32, 16, 64, 8), (16, 16, 128, 4), (64, 16, 64, 8), (16, 32, 128, 8), (32, 32, 128, 8)],
        [(16, 16, 128, 8, 4)],
    ),
    (4, True): (
        [(32, 16, 128, 4), (32, 16, 256, 8), (16, 16, 256, 4), (64, 16, 64, 8), (16, 32, 128, 8), (32, 32, 128, 8)],
        [(16, 16, 128, 8, 4)],
    ),
    (8, True): ([(16, 16, 256, 4)], [(16, 16, 256, 8)]),
}
# In turn, of large batches: batch rows, units, bytes of a chunk, warps, chunks that stay on chip (0: all) and the batch
# rows of a part.
IN_TURN: dict[tuple[int, bool], Rows] = {
    (2, True): (
        [(128, 64, 128, 8, 0, 64), (64, 64, 128, 4, 0, 32), (128, 32, 128, 8, 0, 64), (128, 64, 64, 8, 5, 64)]
        + [(256, 32, 64, 8, 1, 64), (128, 32, 128, 8, 1, 64)],
        [(128, 128, 128, 8, 5, 16), (128, 128, 128, 8, 1, 16), (128, 64, 128, 8, 1, 32)],
    ),
    (4, True): (
        [(128, 32, 128, 8, 0, 64), (256, 32, 64, 8, 6, 64), (128, 32, 128, 8, 1, 64)],
        [(128, 128, 128, 8, 1, 8), (128, 64, 128, 8, 1, 32)],
    ),
}
# Polled: batch rows, units and warps; in backward, teams. Of 8 units without a team half of a matrix instruction is
# padding; and with four warps they take, simulated, up to a seventh more than the model says.
POLLED = (*product(((8, 16), (8, 32), (16, 16)), (4, 8)), ((8, 8), 8))
# One launch a step.
STEP: dict[tuple[int, bool], Rows] = {
    **dict.fromkeys(((2, True), (4, True), (8, True)), ([(32, 16, 128, 4)], [(32, 16, 128, 4)])),
    **dict.fromkeys(((2, False), (4, False)), ([(32, 16, 128, 8)], [(32, 16, 128, 8)])),
    (8, False): ([(16, 16, 128, 8)], [(16, 16, 128, 8)]),
}
# On AMD, whose matrix instructions begin at 16 rows: a gfx11 has half of a gfx9's registers for a row.
STEP_AMD = [(32, 16, 128, 4), (16, 16, 128, 4), (16, 16, 64, 4), (16, 16, 128, 8), (16, 16, 64, 8)]
# With a projection in the kernel, of any size; a chunk of h, in units.
PROJECTING: Rows = ([(16, 16, 128, 4)], [(16, 16, 256, 4)])
# Local: units and warps; each for 8 batch rows and for 16.
LOCAL: dict[tuple[int, bool], Rows] = {
    (2, True): ([(16, 4), (32, 4), (64, 8), (128, 8)], [(16, 4), (32, 4), (64, 4), (128, 8)]),
    (4, True): ([(16, 4), (32, 4), (64, 8)], [(16, 4), (32, 4), (64, 8)]),
    (8, True): ([(16, 4), (32, 4), (64, 8)], [(16, 4), (32, 8), (64, 8)]),
    **dict.fromkeys(((2, False), (4, False)), ([(16, 4), (32, 8), (64, 8)], [(16, 4), (32, 8), (64, 8)])),
    (8, False): ([(16, 4), (32, 8)], [(16, 4), (32, 8)]),
}


def rows_of(table: dict[tuple[int, bool], Rows], problem: Problem) -> list[tuple[int, ...]]:
    return table.get((problem.size, problem.wide), ([], []))[problem.backward]


def listed(mode: str, problem: Problem, device: Device) -> Iterator[Tiles]:
    """The tiles of the table for a form, "local", "grid" or "step"."""
    size, several = problem.size, problem.layers > 1
    if mode == "local":
        for (units, warps), batch in product(rows_of(LOCAL, problem), (8, 16)):
            yield Tiles(batch, units, units, warps, split=warps)
    elif mode == "step":
        features = 16 if problem.proj else 0
        rows = rows_of(STEP, problem)
        if device.gcn:  # which multiplies float32 as it is
            rows, size = STEP_AMD, problem.itemsize
        if problem.proj:
            rows, size = PROJECTING[problem.backward], 1
        for batch, units, chunk, warps in rows:
            yield Tiles(batch, units, chunk // size, warps, features=features)
    else:
        teams = (1, 4) if problem.backward else (1,)
        for ((batch, units), warps), team in product(POLLED if problem.wide else (), teams):
            if units > 8 or team > 1 or not problem.backward:
                yield Tiles(batch, units, 64 // problem.itemsize * warps, warps, team=team, split=warps, poll=True)
        for batch, units, chunk, warps, *team in rows_of(STACKED if several else FLAGS, problem):
            yield Tiles(batch, units, chunk // size, warps, team=team[0] if team else 1)
        for (batch, units, chunk, warps, *team), kept in product([] if several else rows_of(STREAMED, problem), KEPT):
            of_team = team[0] if team else 1
            rows = (of_team if problem.backward else 4) * units
            yield Tiles(batch, units, chunk // size, warps, kept * 1024 // (rows * chunk), of_team)
        for batch, units, chunk, warps, kept, part in [] if several else rows_of(IN_TURN, problem):
            yield Tiles(batch, units, chunk // size, warps, kept, part=part)
