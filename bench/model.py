"""How fast a step could be: a lower bound from what the device can do, term by term.

The constants are data-sheet figures and published microbenchmarks, not measurements of ours: a floor made of them is a
prediction. `python -m bench.lab` measures terms on a device, and measured() puts them in the constants' place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True)
class Terms:
    """What a device does in a microsecond (flop, bytes), and what takes it how many (exchange, launch)."""

    multiprocessors: int
    matrix: Mapping[str, float]  # flop of one multiprocessor's tensor cores, by dtype
    shared: float  # bytes that one multiprocessor reads from its shared memory
    l2: float  # bytes that all multiprocessors together read from L2
    memory: float  # bytes of device memory
    exchange: float  # a step flag, from its publication until the other programs have seen it
    launch: float  # from one kernel of a CUDA graph to the next

    def measured(self, terms: Mapping[str, float]) -> "Terms":
        """These terms with those that bench.lab has measured, under the names of bench.lab.terms(), in their place."""
        matrix = {name: terms.get(f"matrix_{name}_flop_per_us_per_sm", rate) for name, rate in self.matrix.items()}
        return replace(
            self,
            matrix=MappingProxyType(matrix),
            l2=terms.get("l2_bytes_per_us", self.l2),
            exchange=terms.get("exchange_us", self.exchange),
            launch=terms.get("graph_launch_us", self.launch),
        )


def _matrix(tflops_16bit: float, tflops_tf32: float, multiprocessors: int) -> Mapping[str, float]:
    """Rates of one multiprocessor from dense peaks of the device in Tflop/s (a microsecond has 1e6 flop of each)."""
    bit16, tf32 = (1e6 * tflops / multiprocessors for tflops in (tflops_16bit, tflops_tf32))
    return MappingProxyType({"bf16": bit16, "fp16": bit16, "tf32": tf32, "fp32": tf32 / 3})  # fp32: three TF32 products


# Peaks, clocks and memory: NVIDIA's data sheets of A100 80 GB SXM (1.41 GHz), H100 SXM5 (1.83 GHz) and B200 (1.86 GHz).
# Shared memory: 128 bytes a clock, CUDA programming guide. L2: A100 5,120 bytes a clock, NVIDIA's A100 white paper;
# H100 5.5 TB/s, microbenchmark by Chips and Cheese (July 2023, PCIe board); B200 taken as twice the H100.
# Exchange: a few L2 round trips of 200 to 270 clocks, and launch: an estimate too; the first that bench.lab replaces.
TERMS = {
    "A100": Terms(108, _matrix(312, 156, 108), 128 * 1410, 5120 * 1410, 2.04e6, exchange=0.9, launch=1.3),
    "H100": Terms(132, _matrix(989, 495, 132), 128 * 1830, 5.5e6, 3.35e6, exchange=0.9, launch=1.3),
    "B200": Terms(148, _matrix(2250, 1100, 148), 128 * 1860, 11e6, 8e6, exchange=0.9, launch=1.3),
}

BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Floor:
    """A bound in microseconds, and the term that sets it."""

    us: float
    binds: str


def terms_of(device: str) -> Terms | None:
    """The terms of a device by its name, such as "NVIDIA H100 80GB HBM3"; None for one that the table lacks."""
    return next((terms for name, terms in TERMS.items() if name in device), None)


def floor(device: str | Terms, dtype: str, mode: str, H: int, B: int, backward: bool = False) -> Floor:
    """Returns the floor of one step of a recurrence, without the products that are parallel over time.

    A step begins when the last one has been exchanged; what it then does overlaps at best: its slowest part counts.
    In "grid" the best split of units and batch rows over the multiprocessors counts, whichever the plan takes.

    Args:
        device: a key of TERMS, a device's name that contains one, or terms.
        dtype: "bf16", "fp16", "tf32" or "fp32".
        mode: "local", "grid" or "step".
        H, B: hidden units, batch rows.
        backward: of the backward pass, which gathers dgates (4H) instead of h (H).

    Raises:
        KeyError: a device that the table lacks.
    """
    terms = device if isinstance(device, Terms) else terms_of(device)
    if terms is None:
        raise KeyError(device)
    size, width = BYTES[dtype], 4 * H if backward else H
    before = {"local": 0.0, "grid": terms.exchange, "step": terms.launch}[mode]
    # input_gates and y (backward: gates, c, dy and dgates) pass through device memory once.
    streamed = B * size * (H + 8 * H + 2 * H if backward else 5 * H) / terms.memory
    units = [H] if mode == "local" else [u for u in (8, 16, 32, 64, 128) if math.ceil(H / u) <= terms.multiprocessors]
    best = Floor(math.inf, "")
    for u in units or [math.ceil(H / terms.multiprocessors)]:
        blocks = math.ceil(H / u)
        groups = min(B, max(1, terms.multiprocessors // blocks))
        rows = math.ceil(B / groups)
        weights = 4 * u * H * size
        # On chip, full precision keeps each weight as two TF32 numbers.
        on_chip = weights * (2 if dtype == "fp32" else 1) / terms.shared
        parts = {
            "weights": on_chip if mode != "step" else blocks * groups * weights / terms.l2,
            "products": 2 * rows * 4 * u * H / terms.matrix[dtype],
            "memory": streamed,
        }
        if mode != "local":
            parts["gather"] = blocks * groups * rows * width * size / terms.l2
        slowest = max(parts, key=lambda name: parts[name])
        binds = slowest if parts[slowest] > before else {"grid": "exchange", "step": "launch"}[mode]
        best = min(best, Floor(before + parts[slowest], binds), key=lambda candidate: candidate.us)
    return best
