"""What both launchers share: the flags, the launch shape of each mode, and the tensor's device."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import Plan, Tiles, interpreted

# The interpreter multiplies bfloat16 bit patterns as integers: there the operands are widened, which is exact.
DOT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if interpreted() else tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Packing(NamedTuple):
    """Where the rows of a packed sequence lie, sorted as torch packs them.

    lengths: (B,) int64, steps of each batch row. offsets: (T,) int64, first packed row of each step.
    """

    lengths: Tensor
    offsets: Tensor


def specialization(plan: Plan, tiles: Tiles, H: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments and the compile options by which a plan enters a kernel."""
    constants = {
        "H": H,
        "LOCAL": plan.mode == "local",
        "GRID": plan.mode == "grid",
        "DOT": DOT[dtype],
        "PRECISION": plan.precision,
        "BLOCK_B": tiles.batch,
        "BLOCK_H": tiles.units,
        "BLOCK_K": tiles.chunk,
    }
    # One stage: the pipeliner would load h of the next step before its flag is awaited.
    options = {"num_warps": tiles.warps, "num_stages": 1}
    if plan.mode == "grid":
        options["launch_cooperative_grid"] = True
    return constants, options


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
    """Launches a recurrence kernel over all steps and batch rows, in the plan's mode, on the tensors' device."""
    device = tensors[0].device
    constants, options = specialization(plan, tiles, H, dtype)
    unit_blocks, batch_groups = triton.cdiv(H, tiles.units), triton.cdiv(B, tiles.batch)
    step_flags = None
    groups_at_once = batch_groups
    if plan.mode == "grid":
        step_flags = torch.zeros((batch_groups, T), dtype=torch.int32, device=device)
        # Only as many batch groups as can be resident together; the others follow in further launches.
        groups_at_once = max(1, plan.resident // unit_blocks)
    turns = [(step, step + 1) for step in range(T)] if plan.mode == "step" else [(0, T)]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for group in range(0, batch_groups, groups_at_once):
            programs = (unit_blocks, min(groups_at_once, batch_groups - group))
            for turn in turns:
                kernel[programs](
                    *tensors, step_flags, T, B, group * tiles.batch, *turn, **constants, **flags, **options
                )
