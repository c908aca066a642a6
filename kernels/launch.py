"""What both launchers share: the flags, the launch shape of each mode, and the tensor's device."""

import os
import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .plan import Plan, Tiles, by_steps, ceil_div, interpreted, refuse

# The interpreter multiplies bfloat16 bit patterns as integers: there the operands are widened, which is exact.
DOT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if interpreted() else tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Turns that a wait for a step flag may take under FUSED_LSTM_DEBUG=1, some seconds; without it a wait has no bound.
DEBUG = os.environ.get("FUSED_LSTM_DEBUG") == "1"
TURNS = 10_000_000 if DEBUG else 0


# The interpreter keeps the program's position in globals: two threads cannot be in it at once.
_INTERPRETER = threading.RLock()


class Layout(NamedTuple):
    """Where sequences lie among the rows of a tensor and where they begin, in the order of their direction.

    lengths: (B,) int64, steps of each batch row; None: every row has all T.
    offsets: (T,) int64, first row of each step of a packed sequence, whose rows are sorted as torch packs them; None: B
        rows a step.
    starts: (rows,) bool, the steps before which the state is set to the reset state; None: none.
    """

    lengths: Tensor | None = None
    offsets: Tensor | None = None
    starts: Tensor | None = None

    @property
    def padded(self) -> bool:
        """Rows of several lengths in a tensor that has all T steps of each."""
        return self.lengths is not None and self.offsets is None

    @property
    def flags(self) -> dict[str, bool]:
        """The constexpr arguments by which a layout enters a kernel."""
        given = {"LENGTHS": self.lengths, "PACKED": self.offsets, "RESET": self.starts}
        return {name: tensor is not None for name, tensor in given.items()}


DENSE = Layout()  # T steps of B rows


def on_device(device: torch.device) -> AbstractContextManager:
    """Within it kernels are launched on a device, or one thread at a time has the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else _INTERPRETER


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of the cell state and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def programs_of(tiles: Tiles, H: int, B: int) -> tuple[int, int]:
    """How many programs hold H units, in whole teams, and how many batch groups B rows are."""
    return tiles.team * ceil_div(H, tiles.team * tiles.units), ceil_div(B, tiles.batch)


def specialization(plan: Plan, tiles: Tiles, H: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments, of which a kernel takes those that it has, and the compile options of a plan."""
    constants = {
        "H": H,
        "LOCAL": plan.mode == "local",
        "GRID": plan.mode == "grid",
        "TURNS": TURNS if plan.mode == "grid" else 0,
        "DOT": DOT[dtype],
        "PRECISION": plan.precision,
        "BLOCK_B": tiles.batch,
        "BLOCK_H": tiles.units,
        "BLOCK_K": tiles.chunk,
        "KEPT": tiles.kept,
        "TEAM": tiles.team if plan.mode == "grid" else 1,
    }
    # One stage: the pipeliner would load h of the next step before its flag is awaited.
    options = {"num_warps": tiles.warps, "num_stages": 1}
    if plan.mode == "grid":
        options["launch_cooperative_grid"] = True
    return constants, options


def specialized(
    kernel: Any, plan: Plan, tiles: Tiles, H: int, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments and the compile options by which a plan enters a kernel."""
    constants, options = specialization(plan, tiles, H, dtype)
    return {name: value for name, value in constants.items() if name in kernel.arg_names}, options


def launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    plan: Plan,
    tiles: Tiles,
    T: int,
    B: int,
    H: int,
    dtype: torch.dtype,
    **flags: Any,
) -> None:
    """Launches a recurrence kernel over all steps and batch rows, in the plan's mode, on the tensors' device.

    Raises:
        RuntimeError: under FUSED_LSTM_DEBUG=1, a program that waited in vain for another, and at which step.
    """
    device = tensors[0].device
    constants, options = specialized(kernel, plan, tiles, H, dtype)
    unit_blocks, batch_groups = programs_of(tiles, H, B)
    step_flags = report = None
    groups_at_once = batch_groups
    if plan.mode == "grid":
        step_flags = torch.zeros((batch_groups, T), dtype=torch.int32, device=device)
        report = torch.zeros(4, dtype=torch.int32, device=device) if TURNS else None
        # Only as many batch groups as can be resident together; the others follow in further launches.
        groups_at_once = max(1, plan.resident // unit_blocks)
    turns = [(step, step + 1) for step in range(T)] if plan.mode == "step" else [(0, T)]
    with on_device(device):
        for group in range(0, batch_groups, groups_at_once):
            programs = (unit_blocks, min(groups_at_once, batch_groups - group))
            for turn in turns:
                arguments = (*tensors, step_flags, report, T, B, group * tiles.batch, *turn)
                try:
                    kernel[programs](*arguments, **constants, **flags, **options)
                except RuntimeError as error:
                    if plan.mode != "grid" or group > 0 or "cooperative" not in str(error):
                        raise
                    # The device refused before anything ran. The form that needs no company takes over for good.
                    refuse(device, str(error))
                    return launch(kernel, tensors, by_steps(plan, str(error)), tiles, T, B, H, dtype, **flags)
    if report is not None:
        stuck, program, group, step = report.tolist()
        if stuck:
            raise RuntimeError(
                f"program {program} of batch group {group} waited in vain for step {step - 1} of the others, "
                f"in {kernel.__name__} under {plan}"
            )
