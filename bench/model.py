"""How fast a step could be: a lower bound from what the device can do, term by term.

The constants are data-sheet figures and published microbenchmarks, not measurements of ours: a floor made of them is a
prediction. `python -m bench.lab` measures terms on a device, and measured() puts them in the constants' place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fused_lstm.kernels.launch import programs_of
from fused_lstm.kernels.plan import A100, B200, H100, Plan


@dataclass(frozen=True)
class Terms:
    """What a device does in a microsecond (flop, bytes), and what takes it how many (exchange, launch)."""

    multiprocessors: int
    matrix: Mapping[str, float]  # flop of one multiprocessor's tensor cores, by dtype
    shared: float  # bytes that one multiprocessor reads from its shared memory
    on_chip: int  # bytes of W_hh that one multiprocessor can hold: its shared memory
    l2: float  # bytes that all multiprocessors together read from L2
    l2_size: float  # bytes that L2 holds
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
# L2: 40 MB, 50 MB (white papers), 126 MB (Blackwell tuning guide).
# Exchange: a few L2 round trips of 200 to 270 clocks, and launch: an estimate too; the first that bench.lab replaces.
TERMS = {
    "A100": Terms(108, _matrix(312, 156, 108), 128 * 1410, A100.shared, 5120 * 1410, 40e6, 2.04e6, 0.9, 1.3),
    "H100": Terms(132, _matrix(989, 495, 132), 128 * 1830, H100.shared, 5.5e6, 50e6, 3.35e6, 0.9, 1.3),
    "B200": Terms(148, _matrix(2250, 1100, 148), 128 * 1860, B200.shared, 11e6, 126e6, 8e6, 0.9, 1.3),
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


def floor(device: str | Terms, dtype: str, mode: str, H: int, B: int, backward: bool = False, layers: int = 1) -> Floor:
    """Returns the floor of one step of a recurrence, without the products that are parallel over time; of layers in one
    launch a step of all of them, with the products of the layers above the first.

    In "grid" the best split of units and batch rows over the multiprocessors counts, whichever the plan takes.

    Args:
        device: a key of TERMS, a device's name that contains one, or terms.
        dtype: "bf16", "fp16", "tf32" or "fp32".
        mode: "local", "grid" or "step".
        H, B: hidden units, batch rows.
        backward: of the backward pass, which gathers dgates (4H) instead of h (H).
        layers: in one launch, in "grid".

    Raises:
        KeyError: a device that the table lacks.
    """
    terms = known(device)
    share = terms.multiprocessors // layers
    units = [H] if mode == "local" else [u for u in (8, 16, 32, 64, 128) if math.ceil(H / u) <= share]
    best = Floor(math.inf, "")
    for u in units or [math.ceil(H / share)]:
        groups = min(B, max(1, share // math.ceil(H / u)))
        weights = 4 * u * H * BYTES[dtype] * (2 if dtype == "fp32" else 1) * (1 if layers == 1 else 2)
        streamed = {"local": 0.0, "grid": max(0.0, 1 - terms.on_chip / weights), "step": 1.0}[mode]
        for team in (1, 4) if backward and mode == "grid" else (1,):
            one = _step(terms, dtype, mode, H, u, groups, math.ceil(B / groups), streamed, B, backward, team, layers)
            best = min(best, one, key=lambda candidate: candidate.us)
    return best


def predicted(device: str | Terms, dtype: str, plan: Plan, H: int, B: int, backward: bool = False) -> Floor:
    """Returns what the model gives for one step under a plan, of all directions and layers of a launch: its tiles, its
    padding, its launches one after another.

    Args and errors as floor(). Of the floor's optimism it keeps one thing: the parts of a step overlap.
    """
    terms, tiles = known(device), plan.backward if backward else plan.forward
    blocks, groups = programs_of(tiles, H, B)
    groups *= plan.directions
    at_once = min(groups, max(1, terms.multiprocessors // (plan.layers * blocks)))
    chunks = math.ceil(H / tiles.chunk) * (4 // tiles.team if backward else 1)
    streamed = {"local": 0.0, "grid": 1 - (tiles.kept or chunks) / chunks, "step": 1.0}[plan.mode]
    sizes = tiles.units, at_once, tiles.batch, streamed, plan.directions * B
    one = _step(terms, dtype, plan.mode, H, *sizes, backward, tiles.team, plan.layers)
    return replace(one, us=one.us * math.ceil(groups / at_once))


def known(device: str | Terms) -> Terms:
    terms = device if isinstance(device, Terms) else terms_of(device)
    if terms is None:
        raise KeyError(device)
    return terms


def _step(
    terms: Terms,
    dtype: str,
    mode: str,
    H: int,
    units: int,
    groups: int,
    rows: int,
    streamed: float,
    B: int,
    backward: bool,
    team: int = 1,
    layers: int = 1,
) -> Floor:
    """One step of `groups` batch groups at once, of `rows` rows each, with the share `streamed` of W_hh not on chip;
    in teams a program gathers one gate's dgates, and exchanges twice. Of several layers each has two products, W_hh's
    and the W_ih of itself or of the layer above.

    A step begins when the last one has been exchanged; what it then does overlaps at best: its slowest part counts.
    """
    size, width, blocks = BYTES[dtype], 4 * H // team if backward else H, layers * math.ceil(H / units)
    products = 1 if layers == 1 else 2
    before = {"local": 0.0, "grid": terms.exchange * min(team, 2), "step": terms.launch}[mode]
    weights = products * 4 * units * H * size
    real_rows = min(B, groups * rows)
    parts = {
        # On chip, full precision keeps each weight as two TF32 numbers.
        "weights": (1 - streamed) * weights * (2 if dtype == "fp32" else 1) / terms.shared,
        "streaming": streamed * blocks * groups * weights / terms.l2,
        "products": products * 2 * rows * 4 * units * H / terms.matrix[dtype],
        # input_gates and y (backward: gates, c, dy and dgates) pass through device memory once.
        "memory": layers * real_rows * size * (H + 8 * H + 2 * H if backward else 5 * H) / terms.memory,
    }
    if 4 * H * H * size > terms.l2_size:
        parts["streaming"] = max(parts["streaming"], streamed * 4 * H * H * size / terms.memory)
    if mode != "local":
        parts["gather"] = products * blocks * real_rows * width * size / terms.l2
    slowest = max(parts, key=lambda name: parts[name])
    binds = slowest if parts[slowest] > before else {"grid": "exchange", "step": "launch", "local": slowest}[mode]
    return Floor(before + parts[slowest], binds)
