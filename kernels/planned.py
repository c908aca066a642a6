"""Plan: what was chosen for a launch, why, and what stands behind it; printed, a short page."""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from .tiles import Tiles, without_exchange

MODES = {
    "local": "each program has all of W_hh; a launch runs the whole sequence",
    "grid": "W_hh is spread over programs, which hand h to each other; a launch runs the whole sequence",
    "step": "a launch runs one step",
    "one step": "a launch runs one step of a layer or of several, the products of their inputs included",
    "torch": "torch's own LSTM",
    "composed": "torch operations, step by step",
}
PRECISIONS = {
    "ieee": "in the dtype of the tensors",
    "tf32": "TF32, as torch.backends.cudnn.rnn.fp32_precision says",
    "tf32x3": "three TF32 products for one of float32, as exact as that",
}


@dataclass(frozen=True)
class Plan:
    """How a layer runs, or several.

    mode: "local", "grid" or "step" (the three forms of the recurrence's kernels), "one step" (a kernel of its own for
        one step of inference), "torch" (torch's own LSTM), or "composed" (torch operations, step by step).
    forward, backward: the tiles of each pass; None in modes "torch" and "composed", backward also in "one step" and
        with weights of 8 bits.
    resident: programs that the device runs at once, one a multiprocessor; 0 where the mode does not depend on it.
    precision: of float32 products, "tf32", "tf32x3" (three TF32 products, as exact as float32) or "ieee".
    why: the reason, in words.
    directions, layers: how many of them run in one launch; layers one step behind the other.
    weights: "int8" or "fp8": the kernel of a quantized module holds W_hh in 8 bits and multiplies them as they are;
        otherwise "".
    chunk: steps between the states that are kept under recompute; 0: gates and cells of every step are kept.
    saved_bytes: what a step, row, layer and direction keeps for backward, beside its input and output; None: unknown.
    peak_bytes: what each of these takes more at the peak, of one layer at a time: the input's part of the gates, or the
        gradients of the gates; under recompute the steps of one chunk alone take it.
    refused: the kernels that another one stands in for, or torch's own LSTM, and why, in words.
    measured: what stands behind the choice where that is not kernels/model.py, such as what fused_lstm.tune() has
        measured, in words; "" for that.
    """

    mode: str
    forward: Tiles | None
    backward: Tiles | None
    resident: int
    precision: str
    why: str
    directions: int = 1
    layers: int = 1
    weights: str = ""
    chunk: int = 0
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    refused: tuple[str, ...] = ()
    measured: str = ""

    def tiles(self, backward: bool) -> Any:
        """Of a pass."""
        return self.backward if backward else self.forward

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what launch.py keeps with a plan belongs to this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        """A page that says what runs, on what, why, and what stands behind it."""
        several = [
            f"{n} {of} in a launch" for n, of in ((self.directions, "directions"), (self.layers, "layers")) if n > 1
        ]
        kept = f"{self.saved_bytes} bytes a step, row, layer and direction, beside input and output"
        recomputed = f"recomputed in chunks of {self.chunk} steps" if self.chunk else None
        if recomputed:
            kept += f"; {recomputed}"
        peak = f"{self.peak_bytes} bytes more, of one layer at a time"
        peak += f" and the {self.chunk} steps of one chunk" if self.chunk else ""
        lines = [
            ("plan", ", ".join([f"{self.mode}: {MODES[self.mode]}", *several])),
            ("why", self.why),
            ("forward", self.forward),
            ("backward", self.backward),
            ("weights", f"W_hh in {self.weights}, half of the bytes on chip" if self.weights else None),
            ("products", PRECISIONS[self.precision] if self.forward else None),
            ("kept", kept if self.saved_bytes is not None else recomputed),
            ("at peak", None if self.peak_bytes is None else peak),
            *(("refused", refused) for refused in self.refused),
            ("evidence", self.evidence),
        ]
        return "\n".join(f"{label:10}{text}" for label, text in lines if text is not None)

    @property
    def evidence(self) -> str:
        """What stands behind the choice: a measurement, or the model."""
        if self.measured:
            return self.measured
        if self.mode in ("torch", "composed"):
            return "no choice"
        return "kernels/model.py, a model of the device; fused_lstm.tune() measures"

    @property
    def higher_derivatives(self) -> str:
        """How derivatives of gradients, and forward mode, are computed."""
        if self.mode == "torch":
            return "as torch's own LSTM has them; forward mode composed of torch operations, step by step"
        if self.mode == "composed":
            return "as the call itself"
        return "composed of torch operations, step by step: slow beside the kernels"


def on_torch(why: str) -> Plan:
    """The plan of a call that torch's own LSTM serves."""
    return Plan("torch", None, None, 0, "ieee", why)


def composed(why: str) -> Plan:
    """The plan of a call that is composed of torch operations."""
    return Plan("composed", None, None, 0, "ieee", why)


@cache
def as_per_step(plan: Plan, reason: str) -> Plan:
    """A grid plan with one launch a step instead."""
    why = f"one launch a step, because {reason}; {plan.why}"
    return replace(
        plan,
        mode="step",
        forward=without_exchange(plan.forward),
        backward=None if plan.backward is None else without_exchange(plan.backward),
        resident=0,
        why=why,
    )


def saved_bytes(dtype: torch.dtype, H: int) -> int:
    """Bytes that a step, row, layer and direction keeps for backward: its gates and cell."""
    return (4 * dtype.itemsize + (8 if dtype == torch.float64 else 4)) * H


def with_memory_estimate(plan: Plan, dtype: torch.dtype, H: int, P: int, chunk: int) -> Plan:
    """A plan that says what it keeps for backward and takes at the peak; P: proj_size; chunk: 0 without recompute."""
    if plan.mode == "torch":
        return plan
    gates, kept = 4 * dtype.itemsize * H, saved_bytes(dtype, H)
    if chunk:
        between = -(-((P or H) * dtype.itemsize + kept - gates) // chunk)
        return replace(plan, chunk=chunk, saved_bytes=between, peak_bytes=gates + kept)
    return replace(plan, saved_bytes=kept, peak_bytes=gates)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
