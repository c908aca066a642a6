"""The tiles that a kernel can have: what divides a recurrence among programs, and which of it a device can hold."""

from dataclasses import dataclass, replace
from functools import cache
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

    def __str__(self) -> str:
        of_weight = f", {self.kept} of them on chip" if self.kept else ""
        text = f"{self.batch} rows x {self.units} units, chunks of {self.chunk}{of_weight}, {self.warps} warps"
        return text + (", teams of 4" if self.team > 1 else "") + (", polled" if self.poll else "")


@dataclass(frozen=True)
class Device:
    """What a plan depends on: multiprocessors, bytes of shared memory that a program may use, compute capability."""

    multiprocessors: int
    shared: int
    capability: tuple[int, int]


A100 = Device(108, 163 * 1024, (8, 0))
H100 = Device(132, 227 * 1024, (9, 0))
B200 = Device(148, 227 * 1024, (10, 0))


class Problem(NamedTuple):
    """What one pass of a launch multiplies.

    kind: of products, "bf16", "fp16", "tf32" or "fp32". H: hidden units. backward: the pass.
    directions, layers: in the launch. proj: features of a projection in the kernel.
    """

    kind: str
    H: int
    backward: bool = False
    directions: int = 1
    layers: int = 1
    proj: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of an element in memory."""
        return 2 if self.kind in ("bf16", "fp16") else 4

    @property
    def size(self) -> int:
        """Bytes of a weight on chip: in full precision it is two TF32 numbers."""
        return 8 if self.kind == "fp32" else self.itemsize


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; as triton.next_power_of_2, where there is no Triton too."""
    return 1 << (n - 1).bit_length()


def programs_of(tiles: Tiles, H: int, B: int) -> tuple[int, int]:
    """How many programs hold H units, in whole teams, and how many batch groups B rows are."""
    return tiles.team * ceil_div(H, tiles.team * tiles.units), ceil_div(B, tiles.batch)


def without_exchange(tiles: Tiles) -> Tiles:
    """The tiles of a program that waits for no other one."""
    return replace(tiles, team=1)


@cache
def latency_tiles(H: int, size: int, device: Device, layers: int = 1) -> tuple[list[Tiles], list[Tiles]]:
    """The tiles of the kernels for few rows, forward and backward, as grid_tiles(): those whose registers have room for
    W_hh, for what is polled and for the sums."""
    itemsize = min(size, 4)
    if not aligned(H, size) or device.capability < (8, 0):  # which has other matrix instructions
        return [], []

    def fits(tiles: Tiles, backward: bool) -> bool:
        threads, over_chunks = 32 * tiles.warps, ceil_div(H, tiles.chunk) * tiles.chunk
        weights = (1 if layers == 1 else 2) * tiles.units * over_chunks * size // threads
        rows = tiles.batch * over_chunks * itemsize // (4 * threads) * (4 // tiles.team if backward else 1)
        of_warp = (tiles.team if backward else 4) * tiles.units * tiles.batch // 32
        sums = max(of_warp, tiles.batch * 2)  # as many as a warp makes beside each other
        sums *= 2 if backward and layers > 1 else 1  # dropout comes between two products
        programs = layers * tiles.team * ceil_div(H, tiles.team * tiles.units)
        # In full precision both weights of a stack are split in two TF32 numbers at every step.
        room = REGISTERS if size < 8 or layers == 1 else REGISTERS - 20
        if layers == 1 and H % tiles.chunk == 0:
            room += 12  # without masks
        # Of full precision more of a weight spills on a B200 (Triton 3.7).
        most = 96 if backward and size == 8 and device.capability[0] == 10 else 128
        return programs <= device.multiprocessors and weights <= most and weights + rows + sums <= room

    both: tuple[list[Tiles], list[Tiles]] = [], []
    shapes = (8, 16), (8, 32), (16, 16), (8, 8)
    for (batch, units), (backward, team) in product(shapes, ((False, 1), (True, 1), (True, 4))):
        if units == 8 and (both[backward] or (backward and team == 1)):
            continue  # for where nothing else fits; without a team backward has half of a matrix instruction's rows
        of_warps = [Tiles(batch, units, 64 // itemsize * n, n, team=team, split=n, poll=True) for n in (4, 8)]
        both[backward].extend([tiles for tiles in of_warps if fits(tiles, backward)][:1])  # the fewest that hold it
    return both


# Of a thread's 255 those that latency_tiles() counts; the others hold addresses and a cell.
REGISTERS = 180


@cache
def grid_tiles(H: int, size: int, device: Device, layers: int = 1) -> tuple[list[Tiles], list[Tiles]]:
    """The tiles of the grid form, forward and backward, that keep registers and shared memory under every Triton of
    bench/results/offline; none where too few multiprocessors are there.

    size: bytes that an element of W_hh takes on chip: 8 in full precision, of two TF32 numbers.
    layers: all of them at once, with W_ih beside W_hh of all but the first.
    """
    if layers > 1:
        return stack_tiles(H, size, device, layers)
    if not aligned(H, size) or size == 8:
        return narrow_tiles(H, size, device)
    fits = [units for units in (32, 16, 8) if fit(units, H, size, device)]
    forward: list[Tiles] = []
    backward: list[Tiles] = []
    chunk = 256 // size
    wgmma, tcgen05 = device.capability[0] == 9, device.capability[0] == 10
    row_bytes = H * size

    # All loads of a step are outstanding at once and hold registers.
    # wgmma's 64 rows are the work of four warps, each with twice the loads, so that a larger batch tile takes shorter
    # chunks there. A B200's tensor memory takes no shorter chunks of 64 rows, elsewhere longer ones spill (Triton 3.9).
    tall = chunk // 2 if tcgen05 else chunk // 4
    if 16 in fits:
        # Four warps take TF32's W_hh into registers, which hold no more of it (Triton 3.9).
        few = wgmma and (size == 2 or H * size <= 2688)
        forward.append(Tiles(32, 16, chunk // 2 if wgmma else min(64, chunk), 4 if few else 8))
        if few and row_bytes > 1024 and (size == 2 or row_bytes <= 2048):
            forward.append(Tiles(16, 16, min(64, chunk), 4))
        # The longest rows of TF32 on an A100 spill (Triton 3.9 forward, 3.6 backward).
        longest = size == 4 and not (wgmma or tcgen05) and H >= 512
        if row_bytes <= 2048 and not (tcgen05 or longest):
            forward.append(Tiles(64, 16, tall, 8))
        if size == 4 and row_bytes <= 1024 and not wgmma:
            backward.append(Tiles(64, 16, chunk, 8))
        if size == 2 and row_bytes <= 2048:
            backward.append(Tiles(64, 16, chunk // 2, 8, team=4))
        backward.append(Tiles(16, 16, chunk // 2, 4, team=4))
        if row_bytes <= 2048 or size == 4:  # in 16 bit others spill
            backward.append(Tiles(32, 16, chunk // 2, 8, team=4))
    elif 8 in fits:
        # Over the longest rows that a B200 spreads, eight warps spill one register (Triton 3.7).
        if size == 2 or not tcgen05:  # in TF32 its longest rows spill (Triton 3.9)
            forward.append(Tiles(32, 8, chunk // 2 if tcgen05 else min(64, chunk), 4 if tcgen05 else 8))
    if 32 in fits:
        forward.append(Tiles(16, 32, chunk // 2, 8))
        if not tcgen05 or (row_bytes <= 1024 and size == 2):
            forward.append(Tiles(32, 32, chunk // 2, 8))
        if row_bytes <= 1024 and (wgmma or (size == 2 and not tcgen05)):
            forward.append(Tiles(64, 32, tall, 8))
        if size == 2:
            backward.append(Tiles(64, 32, chunk, 8))
    if 16 not in fits:
        streaming_tiles(forward, backward, H, size, device)
    return forward, backward


def aligned(H: int, size: int) -> bool:
    """Whether 16-byte loads divide a row."""
    return H * min(size, 4) % 16 == 0


def mma_only(size: int, device: Device) -> bool:
    """Whether a product must not be tcgen05's, which would split W_hh in two TF32 numbers again at every step; with
    sixteen warps it is mma.sync's."""
    return device.capability[0] == 10 and size == 8


def fit(units: int, H: int, size: int, device: Device, layers: int = 1) -> bool:
    """Whether all of W_hh fits on chip with so many units a program, beside what a step lays out there."""
    capability = device.capability[0]
    if mma_only(size, device) and not aligned(H, size):
        return False  # spills at any tile
    chunk = 256 // size
    columns = ceil_div(H, chunk) * chunk
    # Full precision over more spills, and so do two products a step.
    share = 0.8 if size < 8 else 0.65 if capability == 8 and aligned(H, size) else 0.75
    weights = 1
    if layers > 1:
        share, weights = min(share, 0.7), 2
    held = weights * 4 * units * columns * size
    return layers * ceil_div(H, units) <= device.multiprocessors and held <= share * device.shared


def narrow_tiles(H: int, size: int, device: Device) -> tuple[list[Tiles], list[Tiles]]:
    """grid_tiles() of narrow loads, which keep their many addresses, and of full precision, which has two numbers for
    one: the smallest tiles."""
    wide, capability, chunk = aligned(H, size), device.capability[0], 256 // size
    forward: list[Tiles] = []
    backward: list[Tiles] = []
    units = next((units for units in ((16,) if size == 8 else (16, 8)) if fit(units, H, size, device)), 0)
    if units and size < 8:
        # The addresses of longer rows spill in four warps and beside a team's second exchange: an odd H has two for one
        # of another. TF32 leaves less room.
        most = 1280 if H % 2 == 0 else 1024
        longest = size == 2 and most < H
        in_pairs = size == 2 and H % 2 == 0 and not longest and capability != 10
        length = chunk if in_pairs else chunk // 2
        forward.append(Tiles(16, units, length, 8 if longest or units == 8 else 4))
        if longest:
            backward.append(Tiles(16, units, chunk, 8))
        elif units == 8 or (size == 4 and H > 512 and capability == 10):
            backward.append(Tiles(16, 8, chunk // 2, 4, kept=6 if capability == 10 else 12, team=4))
        else:
            backward.append(Tiles(16, units, length, 4, team=4))
        if H * size <= 1344 and capability != 8:
            forward.append(Tiles(32, units, chunk // 2, 8))
            backward.append(Tiles(32, units, chunk // 2, 8, team=4))
    elif units:
        warps = 16 if mma_only(size, device) else 4 if wide and capability == 9 else 8
        forward.append(Tiles(16, units, min(64, chunk) if wide and capability != 10 else chunk // 2, warps))
        # Four warps repeat nothing of a product, but hold only the shorter rows that fit an A100 without spills.
        rows = 64 if wide and capability != 8 else 32
        backward.append(Tiles(rows, units, chunk, 4 if not wide and capability == 8 else 8))
    if wide and not units and not mma_only(size, device):
        streaming_tiles(forward, backward, H, size, device)
    return forward, backward


def streaming_tiles(forward: list[Tiles], backward: list[Tiles], H: int, size: int, device: Device) -> None:
    """Adds the tiles that keep a part of W_hh on chip and load the rest at every step, from L2 if that holds it."""
    # Two fifths of the memory are left to what streams through and to the step's own tiles; of full precision 32 units
    # spill.
    chunk = 256 // size
    units = 16 if ceil_div(H, 16) <= device.multiprocessors else 32
    if ceil_div(H, units) > device.multiprocessors or (units == 32 and size == 8):
        return
    room = int(0.6 * device.shared)
    kept = room // (4 * units * (chunk // 2) * size)
    if kept == 0:  # which would mean all
        return
    if size < 8:
        kept = min(kept, 12 if device.capability[0] != 10 else 10 if size == 2 else 8)  # the loads of more chunks spill
        forward.append(Tiles(32 if units == 16 else 16, units, chunk // 2, 8, kept))
        if units == 16:
            backward.append(Tiles(32, 16, chunk // 2, 8, kept, team=4))
    if units == 16:
        if size > 2 and device.capability[0] == 8:
            kept = min(kept, 8)
        forward.append(Tiles(16, 16, chunk // 2, 4, kept))
        backward.append(Tiles(16, 16, chunk // 2, 4, kept, team=4))
    if units == 32 or size > 2:
        backward.append(Tiles(64 if units == 16 else 32, units, chunk, 8, room // (units * chunk * size)))


def projectable(H: int, P: int, size: int, device: Device) -> bool:
    """Whether kernels may project to P features: narrow rows and a B200's registers leave no room for a second product,
    and in TF32 a product of few rows takes three times as long."""
    return aligned(H, size) and aligned(P, size) and size == 2 and device.capability[0] != 10


def stack_tiles(H: int, size: int, device: Device, layers: int) -> tuple[list[Tiles], list[Tiles]]:
    """grid_tiles() of several layers. Two products a step leave no room for the addresses of narrow rows, and a B200's
    registers none for the products themselves."""
    if not aligned(H, size) or device.capability[0] == 10 or not fit(16, H, size, device, layers):
        return [], []
    chunk, wgmma = 256 // size, device.capability[0] == 9
    if size == 8:
        if not wgmma:
            return [], []
        return [Tiles(16, 16, min(64, chunk), 4)], [Tiles(16, 16, chunk, 8)]
    # On an A100 longer chunks in 16 bit spill.
    forward = [Tiles(32, 16, chunk // 2, 4) if wgmma else Tiles(32, 16, chunk // 4 if size == 2 else chunk, 8)]
    backward = [Tiles(16, 16, chunk // 2, 8, team=4)]
    if wgmma:
        forward.append(Tiles(16, 16, min(64, chunk), 4))
        if H * size <= 1024:
            forward.append(Tiles(64, 16, chunk // 4, 8))
    if fit(32, H, size, device, layers):
        forward += [Tiles(batch, 32, chunk // 2, 8) for batch in (16, 32)]
    return forward, backward
