"""What both launchers share: the flags, the launch shape of each mode, and the tensor's device."""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .environment import DEBUG, VERSION, interpreted
from .layout import Layout
from .plan import Plan, as_per_step, cuda_device, disable_grid
from .tiles import Tiles, ceil_div, programs_of, without_exchange

# The interpreter multiplies bfloat16 bit patterns as integers: there the operands are widened, which is exact.
DOT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if interpreted() else tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Of every kernel: later Tritons have another default, and other sums.
OPTIONS = {"enable_fp_fusion": True}

# Turns that a wait for a step flag may take under FUSED_LSTM_DEBUG=1, some seconds; without it a wait has no bound.
MAX_SPINS = 10_000_000 if DEBUG else 0


# The integers that both kernels take. None is a constant of theirs: no size but H compiles anything.
SIZES = ["T", "B", "total_rows", "step_stride", "row_stride", "first_recurrence", "row_begin", "step_begin", "step_end"]

# The interpreter keeps the program's position in globals: two threads cannot be in it at once.
_INTERPRETER = threading.RLock()


def on_device(device: torch.device) -> AbstractContextManager:
    """Within it kernels are launched on a device, or one thread at a time has the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else _INTERPRETER


def alloc_exchange_buffer(like: Tensor, shape: tuple[int, ...], tiles: Tiles, layout: Layout) -> Tensor:
    """The buffer of h or dgates of all steps: zero past the rows' lengths, and elsewhere SENTINEL if it is polled."""
    if not tiles.poll:
        return like.new_zeros(shape) if layout.padded else like.new_empty(shape)
    buffer = like.new_empty(shape)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[buffer.itemsize]
    buffer.view(words).fill_(-1)
    return buffer.masked_fill_(layout.past(buffer.shape), 0) if layout.padded else buffer


def weight_in_registers(plan: Plan, tiles: Tiles) -> bool:
    """Whether a pass runs in a kernel of latency_forward.py or latency_backward.py, which has W_hh in registers."""
    return tiles.poll or plan.mode == "local"


def operand_width(rows: int, size: int) -> int:
    """Elements of the reduction that Triton lays side by side in a register operand of so many rows and bytes an
    element; in another order the kernels move it through shared memory, right but slow."""
    wide = VERSION < (3, 8) or (size == 2 and rows == 8)
    return (8 if wide else 4) // size


def compares_pairs(capability: tuple[int, int]) -> bool:
    """Whether a device has an instruction for the larger of two pairs of 16 bits."""
    return capability >= (9, 0)


def some_wait_for_nobody(plan: Plan, flags: dict[str, Any]) -> bool:
    """Whether a polled kernel with these constexpr arguments has steps at which a row waits for no other program."""
    return flags["LENGTHS"] or flags["RESET"] or flags["STACK"] or plan.mode == "step"


def specialization(
    plan: Plan, tiles: Tiles, H: int, dtype: torch.dtype, out: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments, of which a kernel takes those that it has, and the compile options of a plan."""
    constants = {
        "H": H,
        "OUT": out,
        "LOCAL": plan.mode == "local",
        "GRID": plan.mode == "grid",
        "MAX_SPINS": MAX_SPINS if plan.mode == "grid" else 0,
        "DOT": DOT[dtype],
        "PRECISION": plan.precision,
        "BLOCK_B": tiles.batch,
        "BLOCK_H": tiles.units,
        "BLOCK_P": tiles.features,
        "BLOCK_K": tiles.chunk,
        "KEPT": tiles.kept,
        "SPLIT": tiles.split,
        "TEAM": tiles.team,
        "K_WIDTH": operand_width(tiles.batch, dtype.itemsize),
    }
    # One stage: the pipeliner would load h of the next step before its flag is awaited.
    options = {"num_warps": tiles.warps, "num_stages": 1, **OPTIONS}
    if plan.mode == "grid":
        options["launch_cooperative_grid"] = True
    return constants, options


@dataclass(frozen=True, eq=False)
class Specialized:
    """A kernel with its constexpr arguments and compile options.

    compiled: what Triton has made of it so far, by device and by all that it distinguishes in the other arguments.
    """

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, Any]
    compiled: dict[Any, CompiledKernel] = field(default_factory=dict)

    def launch(
        self,
        programs: tuple[int, int, int],
        device: torch.device,
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...],
    ) -> None:
        """Launches it on the current device; tensors, sizes: all that are no constants, in the kernel's order.

        Triton finds out at every call, from all of them, which machine code is meant: here it is asked once.
        """
        # Of tensors the dtype, and whether loads can be wide; of integers whether 32 bits hold them.
        of_tensors = [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
        key = device, *of_tensors, *[size < 2**31 for size in sizes]
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[programs](*tensors, *sizes, *self.constants.values())
            return
        compiled = self.kernel[programs](*tensors, *sizes, **self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.compiled[key] = compiled


def specialized(
    kernel: Any, plan: Plan, tiles: Tiles, H: int, dtype: torch.dtype, out: int, **flags: Any
) -> Specialized:
    """A kernel as a plan runs it. out: features of h; flags: further constexpr arguments."""
    return _specialized(kernel, MAX_SPINS, tuple(flags.items()), plan, tiles, H, dtype, out)


@cache
def _specialized(kernel: Any, spins: int, flags: tuple[tuple[str, Any], ...], *plan: Any) -> Specialized:
    """specialized(); spins: what specialization() reads beside its own."""
    constants, options = specialization(*plan)
    constants |= flags
    # In the kernel's order, of which it has not every one.
    return Specialized(kernel, {name: constants[name] for name in kernel.arg_names if name in constants}, options)


def launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    plan: Plan,
    tiles: Tiles,
    layout: Layout,
    states: Tensor,
    out: int,
    phases: tuple[str, str],
    reverse: bool,
    **flags: bool,
) -> None:
    """Launches a kernel over all recurrences, steps and batch rows, in the plan's mode, on the tensors' device.

    Args:
        tensors: in the kernel's order, but what programs exchange by beside them; the first one lies as `layout` says.
        states: (M, B, H), or (B, H) of a single recurrence. out: features of h.
        phases: of a step behind a projection, "CELL" and "PROJECT" in their order.

    Raises:
        RuntimeError: under FUSED_LSTM_DEBUG=1, a program that waited in vain for another, and at which step.
    """
    device, stacked = states.device, flags["STACK"]
    B, H = states.shape[-2:]
    recurrences = states.shape[0] if states.dim() == 3 else 1
    T = layout.steps(tensors[0].shape)
    unit_blocks, batch_groups = programs_of(tiles, H, B)
    step_flags = timeout_info = None
    in_registers = weight_in_registers(plan, tiles)
    zeros = tensors[0].new_empty(4 * H) if in_registers and some_wait_for_nobody(plan, flags | layout.flags) else None
    at_once = recurrences, batch_groups
    if plan.mode == "grid":
        if not tiles.poll:
            step_flags = torch.zeros((recurrences, batch_groups, T), dtype=torch.int32, device=device)
        timeout_info = torch.zeros(4, dtype=torch.int32, device=device) if MAX_SPINS else None
        at_once = max_coresident(plan.resident // unit_blocks, recurrences, batch_groups, stacked)
    last = T + recurrences - 1 if stacked else T  # each layer is a step behind the one that it takes from
    steps = [(step, step + 1) for step in range(last)] if plan.mode == "step" else [(0, last)]
    directions = 1 if stacked else recurrences
    if in_registers:
        flags["PAIRS"] = device.type == "cuda" and compares_pairs(cuda_device(device).capability)
    flags |= {"DIRECTIONS": directions, "REVERSE": reverse, "CELL": True, "PROJECT": out < H, **layout.flags}
    parts = [(unit_blocks, flags)]  # of a step
    if out < H:
        blocks = {"CELL": unit_blocks, "PROJECT": ceil_div(out, tiles.features)}
        parts = [(blocks[phase], flags | dict.fromkeys(phases, False) | {phase: True}) for phase in phases]
    kernels = [(blocks, specialized(kernel, plan, tiles, H, tensors[0].dtype, out, **part)) for blocks, part in parts]
    sizes = T, B, tensors[0].shape[:-1].numel(), *layout.strides(T, B)
    args = *tensors, zeros if in_registers else step_flags, timeout_info
    with on_device(device):
        for recurrence, group in product(range(0, recurrences, at_once[0]), range(0, batch_groups, at_once[1])):
            programs = min(at_once[1], batch_groups - group), min(at_once[0], recurrences - recurrence)
            for turn, (blocks, part) in product(steps, kernels):
                try:
                    part.launch((blocks, *programs), device, args, (*sizes, recurrence, group * tiles.batch, *turn))
                except RuntimeError as error:
                    if plan.mode != "grid" or (recurrence, group) != (0, 0) or "cooperative" not in str(error):
                        raise
                    # The device refused before anything ran. The form that needs no company takes over for good.
                    disable_grid(device, str(error))
                    plan, tiles = as_per_step(plan, str(error)), without_exchange(tiles)
                    return launch(kernel, tensors, plan, tiles, layout, states, out, phases, reverse, **flags)
    if timeout_info is not None:
        stuck, program, group, step = timeout_info.tolist()
        if stuck:
            raise RuntimeError(
                f"program {program} of batch group {group} waited in vain for step {step - 1} of the others, "
                f"in {kernel.__name__} under {plan}"
            )


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
