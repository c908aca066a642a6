"""Which kernel form runs a recurrence, with which tiles, and why."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel launch: batch rows, hidden units and reduction chunk of one program; warps."""

    batch: int
    units: int
    chunk: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """How one layer and direction runs.

    mode: "local", "grid" or "step" (the three forms of the Triton kernels), or "torch" (torch's own LSTM).
    forward, backward: the tiles of each pass; None in mode "torch".
    why: the reason, in words.
    """

    mode: str
    forward: Tiles | None
    backward: Tiles | None
    why: str


def choose(dtype: torch.dtype, B: int, H: int, device: torch.device) -> Plan:
    """Returns the plan for a recurrence of H hidden units over B rows of `dtype` on `device`."""
    return Plan("torch", None, None, "CPU tensors without TRITON_INTERPRET=1: torch's own LSTM")
