"""What the kernels are told of a cell: its two device functions, and what these take and give."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Equations:
    """A cell, as a constant of a kernel.

    name: of the cell, and a hash of all of its code; what is compiled is found again by it.
    forward, backward: device functions, as fused_lstm/cells/printing.py prints them.
    gates: G. states: how many, h among them. vectors: of one number a unit. kept: values that backward takes of
        forward, beside the states.
    apart: the gates whose two parts, x and r, have gradients of their own.
    before, after: the states that backward takes, before the step and after it.
    """

    name: str
    forward: Any = field(compare=False)
    backward: Any = field(compare=False)
    gates: int
    states: int
    vectors: int
    kept: int
    apart: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __repr__(self) -> str:
        return self.name  # by which Triton keeps what it has compiled
