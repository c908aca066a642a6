"""Which kernel form runs a recurrence, with which tiles, and why."""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel: batch rows and hidden units of a program, reduction chunk of a product; its warps; and
    how many chunks of W_hh stay on chip where not all do (0: all), the others being loaded at every step; and how many
    programs share the products of their units in backward, a gate for each (4), or do not (1)."""

    batch: int
    units: int
    chunk: int
    warps: int
    kept: int = 0
    team: int = 1


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

    @property
    def evidence(self) -> str:
        """What stands behind the choice: a measurement of these tiles on this device, or the model."""
        return "no choice" if self.mode == "torch" else "cost(), a model of an H100; no GPU has measured these tiles"

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


def choose(
    dtype: torch.dtype, B: int, H: int, device: torch.device, ieee: bool, directions: int = 1, layers: int = 1
) -> Plan:
    """Returns the plan for a recurrence of H hidden units over B rows of `dtype` on `device`.

    ieee: float32 products in full precision. directions, layers: in one launch; layers as layers_together() says.
    """
    why = why_torch(dtype, device)
    if why is not None:
        return Plan("torch", None, None, 0, "ieee", why)
    if device.type == "cuda":
        plan = choose_kernel(dtype, B, H, cuda_device(device), ieee, directions, layers)
        if plan.mode == "grid" and device in _refused:
            return by_steps(plan, _refused[device])
        return plan
    plan = replace(choose_kernel(dtype, B, H, H100, ieee, directions, layers), precision="ieee")
    if plan.mode == "grid":
        # Programs run one after another in the interpreter: one that waits for another would wait for ever.
        return by_steps(plan, "the interpreter runs programs one after another")
    return plan


def layers_together(dtype: torch.dtype, B: int, H: int, layers: int, device: torch.device, ieee: bool) -> list[int]:
    """How many layers each launch of a stack of `layers` has, the first launch first."""
    if why_torch(dtype, device) is not None:
        return [1] * layers
    return grouped(dtype, B, H, layers, cuda_device(device) if device.type == "cuda" else H100, ieee)


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


def keeping(plan: Plan, dtype: torch.dtype, H: int, P: int, chunk: int) -> Plan:
    """A plan that says what it keeps for backward; P: proj_size; chunk: 0 without recompute."""
    if plan.mode == "torch":
        return plan
    size, cell = dtype.itemsize, 8 if dtype == torch.float64 else 4
    if chunk:
        return replace(plan, chunk=chunk, saved_bytes=-(-((P or H) * size + H * cell) // chunk))
    return replace(plan, saved_bytes=(4 * size + cell) * H)


# Steps of a chunk: the states between them are then below 1% of what is kept without recompute.
CHUNK = 128


def chunk_for(dtype: torch.dtype, B: int, H: int, memory: int) -> int:
    """How many steps recompute takes at a time on a device of so many bytes of memory: a power of two, 16 to 1024.

    A step's workspace is its gates and their gradients, c and h. Where a chunk's would be more than a sixteenth of the
    memory, the chunk is shorter. Where it is below a thousandth it is longer: the host's part in a chunk, some dozen
    launches, is that of a hundred short steps.
    """
    step = B * H * (9 * dtype.itemsize + (8 if dtype == torch.float64 else 4))
    chunk = CHUNK
    while chunk > 16 and 16 * chunk * step > memory:
        chunk //= 2
    while chunk < 1024 and 2000 * chunk * step <= memory:
        chunk *= 2
    return chunk


def memory_of(device: torch.device) -> int | None:
    """The bytes that a device has in all, and not what is free: that changes from call to call, and results with it by
    the order of their sums. None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


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


def weight_size(dtype: torch.dtype, ieee: bool) -> int:
    """Bytes that a weight takes on chip: in full precision it is two TF32 numbers."""
    return 8 if dtype == torch.float32 and ieee else dtype.itemsize


@cache
def grouped(dtype: torch.dtype, B: int, H: int, layers: int, device: Device, ieee: bool) -> list[int]:
    """layers_together() on a device: the sizes, as even as can be, whose launches cost least by cost()."""
    size = weight_size(dtype, ieee)

    def step(layers: int) -> float:
        plan = choose_kernel(dtype, B, H, device, ieee, 1, layers)
        if plan.mode != "grid":
            return 0.0 if layers == 1 else float("inf")  # alone, these need no flags
        passes = (plan.forward, H), (plan.backward, 4 * H)
        return sum(cost(tiles, B, H, width, size, device, 1, layers) for tiles, width in passes if tiles)

    def sizes(launches: int) -> list[int]:
        return [layers // launches + (k < layers % launches) for k in range(launches)]

    return min(map(sizes, range(1, layers + 1)), key=lambda sizes: sum(map(step, sizes)))


@cache
def choose_kernel(
    dtype: torch.dtype, B: int, H: int, device: Device, ieee: bool, directions: int = 1, layers: int = 1
) -> Plan:
    """Returns the plan among the kernels' three forms.

    ieee: float32 products in full precision, which take three TF32 products and so hold the weights twice.
    directions, layers: in one launch; layers that do not fit together have a plan in mode "step".
    """
    size = weight_size(dtype, ieee)
    precision = "ieee" if dtype != torch.float32 else "tf32x3" if ieee else "tf32"
    chunk = 128 if size == 2 else 64 if size == 4 else 32

    # Whether 16-byte loads divide a row.
    wide = H * dtype.itemsize % 16 == 0

    # tcgen05 would split W_hh in two TF32 numbers again at every step; with sixteen warps a product is mma.sync's.
    split = device.capability[0] == 10 and size == 8

    # Local: all of W_hh on one multiprocessor, with a fifth of its memory left to the layout conversions of a step.
    padded = max(16, triton.next_power_of_2(H))
    largest = 0 if layers > 1 else 32 if split else 64 if H % 4 else 128
    if padded <= largest and 4 * padded * padded * size <= 0.8 * device.shared:
        # At 64 units eight warps spill in TF32 (Triton 3.7, A100), four in 16 bit (Triton 3.7, B200).
        warps = min(8, padded // 8) if (padded, size) != (64, 4) else 4
        tiles = Tiles(batch=16, units=padded, chunk=padded, warps=warps)
        # On a B200 eight warps spill at 128 units (Triton 3.6).
        sixteen = (split and padded > 16) or (device.capability[0] == 10 and padded == 128)
        forward = replace(tiles, warps=16) if sixteen else tiles
        why = f"W_hh of H {H} in {name(dtype)} fits on one multiprocessor"
        return Plan("local", forward, tiles, 0, precision, why, directions)

    # Grid: a slice of W_hh on each of the multiprocessors.
    forward, backward = grid_tiles(H, size, chunk, wide, split, device, layers)
    if forward and backward:
        best, back = (
            cheapest(candidates, B, H, width, size, device, directions, layers)
            for candidates, width in ((forward, H), (backward, 4 * H))
        )
        why = (
            f"W_hh of H {H} in {name(dtype)} is spread over {ceil_div(H, best.units)} multiprocessors, "
            f"{best.units} units on each{'; what does not fit is loaded at every step' if best.kept else ''}"
        )
        if layers > 1:
            why += f"; so are W_hh and W_ih of all {layers} layers, each a step behind the one that it takes from"
        return Plan("grid", best, back, device.multiprocessors, precision, why, directions, layers)

    tiles = Tiles(batch=32, units=16, chunk=chunk // 2, warps=4 if wide else 8)
    why = f"W_hh of H {H} in {name(dtype)} does not fit on {device.multiprocessors} multiprocessors: one launch a step"
    return Plan("step", tiles, tiles, 0, precision, why, directions, layers)


def grid_tiles(
    H: int, size: int, chunk: int, wide: bool, split: bool, device: Device, layers: int = 1
) -> tuple[list[Tiles], list[Tiles]]:
    """The tiles of the grid form, forward and backward, that keep registers and shared memory under every Triton of
    bench/results/offline; none where too few multiprocessors are there.

    size: bytes that an element of W_hh takes on chip. chunk: units of a plain chunk. wide, split: of choose_kernel().
    layers: all of them at once, with W_ih beside W_hh of all but the first.
    """
    forward: list[Tiles] = []
    backward: list[Tiles] = []
    columns = ceil_div(H, chunk) * chunk
    capability = device.capability[0]
    weights = 1 if layers == 1 else 2  # that a program has
    in_1k, in_2k = H * size <= 1024, H * size <= 2048

    def fits(units: int) -> bool:
        programs = layers * ceil_div(H, units)
        if split and not wide:
            return False  # spills at any tile
        share = 0.8 if size < 8 else 0.65 if capability == 8 and wide else 0.75  # full precision over more spills
        share = min(share, 0.8 if layers == 1 else 0.7)  # and so do two products a step
        return programs <= device.multiprocessors and weights * 4 * units * columns * size <= share * device.shared

    if not wide or size == 8:
        # Narrow loads keep their many addresses, and full precision two numbers for one: the smallest tiles.
        for units in (16,) if size == 8 else (16, 8):
            if fits(units) and not forward:
                four = wide and capability == 9
                warps = 16 if split else 4 if four else 8
                forward.append(Tiles(16, units, min(64, chunk) if wide and not split else chunk // 2, warps))
                # Four warps repeat nothing of a product, but only of float32 do they hold narrow loads without spills,
                # and in full precision only of the shorter rows that fit an A100.
                four = not wide and (size == 4 or (size == 8 and capability == 8))
                batch = 64 if wide else 16 if (capability, size) == (10, 4) else 32
                backward.append(Tiles(batch, units, chunk, 4 if four else 8))
    else:
        # The loads of a step are all in flight together and keep registers: eight warps share them. wgmma's 64 rows are
        # the work of four, each with twice the loads, so that a larger batch tile takes shorter chunks there.
        # A B200's tensor memory takes no shorter chunks of 64 rows, and elsewhere longer ones spill (Triton 3.9).
        tall = chunk // 2 if capability == 10 else chunk // 4
        if fits(16):
            wgmma = capability == 9
            forward.append(Tiles(16, 16, min(64, chunk), 4 if wgmma else 8))
            forward.append(Tiles(32, 16, chunk // 2 if wgmma else min(64, chunk), 4 if wgmma else 8))
            backward.append(Tiles(32, 16, 2 * chunk, 8))
            if (in_1k and size == 2) or (in_2k and capability < 10):
                forward.append(Tiles(64, 16, tall, 8))
            if in_2k:
                backward.append(Tiles(64, 16, 2 * chunk if size == 2 else chunk, 8))
                backward += [Tiles(16, 16, chunk // 2, 4, team=4), Tiles(32, 16, chunk // 2, 8, team=4)]
                if size == 2:
                    backward.append(Tiles(64, 16, chunk // 2, 8, team=4))
        elif fits(8):
            # Over the longest rows that a B200 spreads, eight warps spill one register (Triton 3.7).
            four = capability == 10
            forward.append(Tiles(16, 8, min(64, chunk), 8))
            forward.append(Tiles(32, 8, chunk // 2 if four else min(64, chunk), 4 if four else 8))
            # In TF32 over the longest rows a doubled chunk makes the compiler settle for 128 registers and spill some.
            short = size == 4 and capability >= 9
            backward.append(Tiles(16 if short and four else 32, 8, chunk if short else 2 * chunk, 8))
        if fits(32):
            forward.append(Tiles(16, 32, chunk // 2, 8))
            if capability < 10 or (in_1k and size == 2):
                forward.append(Tiles(32, 32, chunk // 2, 8))
            if in_1k and (capability < 10 or size == 2):
                forward.append(Tiles(64, 32, tall, 8))
            backward.append(Tiles(16, 32, chunk, 8))
            if size == 2:
                backward += [Tiles(batch, 32, chunk, 8) for batch in (32, 64)]
    if layers > 1:
        # Two products a step leave less room for the rows of large tiles, and an A100's four warps none.
        forward = [t for t in forward if t.units >= 16 and (t.batch < 64 or (in_1k and capability == 9))]
        backward = [t for t in backward if t.units >= 16]
        small = [t for t in backward if t.batch == 16 or (t.batch == 32 and t.units < 32 and t.team == 1)]
        small = [replace(t, batch=16, chunk=min(t.chunk, chunk)) for t in small]
        backward = [replace(t, warps=8) for t in small] if capability == 8 else small
        if size == 8:
            backward = [Tiles(16, 16, chunk, 8)] if capability > 8 else []
        if not wide or capability == 10:
            return [], []  # the addresses of two products spill, and on a B200 the products themselves
    if layers > 1 or fits(16) or not wide or split:
        return forward, backward

    # A part of W_hh for which there is no place is loaded at every step, from L2 if that holds it. Two fifths of the
    # memory are left to what streams through and to the step's own tiles; of full precision 32 units spill.
    units = 16 if ceil_div(H, 16) <= device.multiprocessors else 32
    if ceil_div(H, units) <= device.multiprocessors and (units == 16 or size < 8):
        room = int(0.6 * device.shared)
        kept = room // (4 * units * (chunk // 2) * size)
        if size == 8:
            forward.append(Tiles(16, units, chunk // 2, 4, kept))
        else:
            kept = min(kept, 12)  # the loads of more chunks spill
            forward.append(Tiles(32, units, chunk // 2, 8, kept))
            if units == 16:
                backward.append(Tiles(16, 16, chunk // 2, 4, kept, team=4))
                backward.append(Tiles(32, 16, chunk // 2, 8, kept, team=4))
        backward.append(Tiles(64 if units == 16 else 32, units, chunk, 8, room // (units * chunk * size)))
    return forward, backward


# What L2 of an H100 delivers while a step flag is exchanged, in bytes; how many it delivers to all multiprocessors
# while each reads one from its shared memory, and multiplies two 16-bit numbers: as bench/model.py derives them.
EXCHANGE, SHARED, PRODUCT = 5e6, 23, 1.5


def cheapest(
    candidates: list[Tiles], B: int, H: int, width: int, size: int, device: Device, directions: int, layers: int
) -> Tiles:
    """The candidate of the least cost()."""
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda tiles: cost(tiles, B, H, width, size, device, directions, layers))


def cost(
    tiles: Tiles, B: int, H: int, width: int, size: int, device: Device, directions: int = 1, layers: int = 1
) -> float:
    """What a step of the grid form costs, as bytes that L2 would have delivered in the time.

    width: of what a program gathers, h (H) or dgates (4H). size: as in grid_tiles(). directions, layers: in one launch.
    """
    programs = layers * tiles.team * ceil_div(H, tiles.team * tiles.units)
    at_once = max(1, device.multiprocessors // programs)
    if programs > device.multiprocessors:
        return float("inf")
    groups = directions * ceil_div(B, tiles.batch)
    together = min(groups, at_once)
    sources = 1 if layers == 1 else 2  # a layer above another gathers from that too, and multiplies it by W_ih
    weights = sources * 4 * tiles.units * H * size
    streamed = 1 - tiles.kept * tiles.chunk * tiles.team / width if tiles.kept else 0
    slowest = max(
        sources * programs * min(directions * B, together * tiles.batch) * width // tiles.team * size,
        programs * together * weights * streamed,
        SHARED * weights * (1 - streamed),
        PRODUCT * (size / 2) * sources * 4 * tiles.batch * tiles.units * H,
    )
    # Groups that do not fit beside the others follow them; a team exchanges twice.
    return ceil_div(groups, at_once) * ((2 if tiles.team > 1 else 1) * EXCHANGE + slowest)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes microseconds on the host."""
    return -(-a // b)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
