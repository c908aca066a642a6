"""How long a step of the recurrence takes on a device, term by term: by it plan.py chooses among tiles.

The constants of a device are data-sheet figures and published microbenchmarks, the factors of the terms are fitted to
what `bench.simulate` makes of the kernels' machine code (`python -m bench.fit`): none is a measurement of ours, and
what is made of them is a prediction. `python -m bench.lab` measures terms on a device, and measured() puts them in the
constants' place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from .tiles import A100, AMD, DEVICES, Device, Problem, Tiles, ceil_div, programs_of


@dataclass(frozen=True)
class Terms:
    """What a device does in a microsecond (clocks, flop, bytes), and how many microseconds something takes."""

    multiprocessors: int
    clock: float  # clocks
    matrix: Mapping[str, float]  # flop of one multiprocessor's tensor cores, by kind of product
    scalar: float  # flop of one multiprocessor in float32 without them
    shared: float  # bytes that one multiprocessor reads from its shared memory
    on_chip: int  # bytes of W_hh that one multiprocessor can hold: its shared memory
    l2: float  # bytes that all multiprocessors together read from L2
    l2_size: float  # bytes that L2 holds
    memory: float  # bytes of device memory
    exchange: float  # us: a step flag, from its publication until the other programs have seen it
    poll: float  # us: an element, from its store until the other programs that look for it have it
    launch: float  # us: from one kernel of a CUDA graph to the next

    def measured(self, terms: Mapping[str, float]) -> "Terms":
        """These terms with those that bench.lab has measured, under the names of bench.lab.terms(), in their place."""
        matrix = {name: terms.get(f"matrix_{name}_flop_per_us_per_sm", rate) for name, rate in self.matrix.items()}
        return replace(
            self,
            matrix=MappingProxyType(matrix),
            l2=terms.get("l2_bytes_per_us", self.l2),
            exchange=terms.get("exchange_us", self.exchange),
            poll=terms.get("poll_us", self.poll),
            launch=terms.get("graph_launch_us", self.launch),
        )


def _terms(name: str, mhz: float, tflops: tuple[float, float], l2: float, l2_size: float, memory: float) -> Terms:
    """tflops: dense peaks of the device in 16 bit and TF32, of AMD's in 16 bit and float32."""
    device = (DEVICES | AMD)[name]
    bit16, tf32 = (1e6 * peak / device.multiprocessors for peak in tflops)  # a microsecond has 1e6 flop of each
    # In full precision three TF32 products, but for AMD, which has float32's own for both.
    matrix = {"bf16": bit16, "fp16": bit16, "tf32": tf32, "fp32": tf32 if device.gcn else tf32 / 3}
    # Multiplications and sums of a clock: the CUDA programming guide's table of throughputs.
    cores = 64 if device.capability == A100.capability else 128
    rates = MappingProxyType(matrix), 2 * cores * mhz, 128 * mhz, device.shared, l2, l2_size, memory
    return Terms(device.multiprocessors, mhz, *rates, 0.9, 750 / mhz, 1.3)


# Peaks, clocks and memory: NVIDIA's data sheets of A100 80 GB SXM (1.41 GHz), H100 SXM5 (1.83 GHz), B200 (1.86 GHz),
# A10 and L4, and its white papers on GA102 (RTX 3090), Ada (RTX 4090) and RTX Blackwell (RTX 5090, RTX PRO 6000), at
# the boost clock, with sums in float32.
# Shared memory: 128 bytes a clock, CUDA programming guide. L2: A100 5,120 bytes a clock, NVIDIA's A100 white paper;
# H100 5.5 TB/s, microbenchmark by Chips and Cheese (July 2023, PCIe board); B200 taken as twice the H100; the others
# taken as 16 bytes a clock and multiprocessor. AMD: its data sheets of MI300X and RX 7900 XTX; L2 2 KiB a clock and
# die, and 64 bytes a clock and compute unit.
# L2: 40 MB, 50 MB (white papers), 126 MB (Blackwell tuning guide), of the others as their papers say.
# Exchange: a store, a fence, a counter and two loads of L2's latency, poll: a store and a load, 750 clocks, launch:
# estimates too, the first that bench.lab replaces.
TERMS = {
    "A100": _terms("A100", 1410, (312, 156), 5120 * 1410, 40e6, 2.04e6),
    "H100": _terms("H100", 1830, (989, 495), 5.5e6, 50e6, 3.35e6),
    "B200": _terms("B200", 1860, (2250, 1100), 11e6, 126e6, 8e6),
    "RTX 3090": _terms("RTX 3090", 1695, (71, 35.6), 16 * 82 * 1695, 6e6, 0.936e6),
    "A10": _terms("A10", 1695, (125, 62.5), 16 * 72 * 1695, 6e6, 0.6e6),
    "RTX 4090": _terms("RTX 4090", 2520, (165, 82.6), 16 * 128 * 2520, 72e6, 1.008e6),
    "L4": _terms("L4", 2040, (121, 60), 16 * 58 * 2040, 48e6, 0.3e6),
    "RTX 5090": _terms("RTX 5090", 2407, (209.5, 104.8), 16 * 170 * 2407, 96e6, 1.792e6),
    "RTX PRO 6000": _terms("RTX PRO 6000", 2617, (503.8, 251.9), 16 * 188 * 2617, 128e6, 1.792e6),
    "MI300X": _terms("MI300X", 2100, (1307, 163), 2048 * 8 * 2100, 32e6, 5.3e6),
    "RX 7900 XTX": _terms("RX 7900 XTX", 2500, (123, 61), 64 * 96 * 2500, 6e6, 0.96e6),
}

BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Time:
    """Microseconds, and the term that sets them."""

    us: float
    binds: str


@cache
def terms_for(device: Device) -> Terms:
    """The terms of a device of its capability, or of the nearest below it, with as many multiprocessors as it has: of
    several those of the one that has as many, or else of the first. On AMD of its generation."""
    if device.gcn:
        alike = [name for name, each in AMD.items() if each.gcn[:4] == device.gcn[:4]] or [*AMD]
    else:
        nearest = max(each.capability for each in DEVICES.values() if each.capability <= device.capability)
        alike = [name for name, each in DEVICES.items() if each.capability == nearest]
        alike.sort(key=lambda name: DEVICES[name].multiprocessors != device.multiprocessors)
    return replace(TERMS[alike[0]], multiprocessors=device.multiprocessors)


def step(terms: Terms, mode: str, tiles: Tiles, problem: Problem, B: int) -> Time:
    """One step of a pass of B batch rows in the form `mode` under its tiles, of all directions and layers of a launch:
    with their padding, and groups that do not fit beside the others after them."""
    blocks, groups = programs_of(tiles, problem.H, B)
    if mode == "grid" and problem.layers * blocks > terms.multiprocessors:
        return Time(math.inf, "multiprocessors")
    if tiles.in_turn and tiles.batch > B:
        return Time(math.inf, "rows")  # which the other forms have tiles for
    memory = step_in_memory(problem, B) / terms.memory
    groups = max(1, groups) * problem.directions
    at_once = min(groups, max(1, terms.multiprocessors // (problem.layers * blocks)))
    programs = problem.layers * blocks * at_once
    turns = ceil_div(groups, at_once)
    cycles = of_launch(terms, mode, tiles, problem, B * problem.directions, programs)
    if tiles.in_turn:
        # What a tile waits for is written while the others have their turn.
        exposed = sum(handover(terms, mode).values()) - (turns - 1) * sum(cycles.values())
        cycles["exchange"] = max(0.0, exposed) / turns
    us = turns * sum(cycles.values()) / terms.clock
    return Time(us, max(cycles, key=cycles.__getitem__)) if us > memory else Time(memory, "memory")


def step_in_memory(problem: Problem, B: int) -> int:
    """Bytes that a step of a pass moves through device memory, once: forward input_gates in, y, c and gates out;
    backward gates, c and dy in, dgates out."""
    return problem.directions * problem.layers * B * problem.H * (9 * problem.itemsize + 4)


def cudnn_step(terms: Terms, problem: Problem, B: int) -> float:
    """Microseconds of a step of a pass in cuDNN's LSTM with a large batch, an estimate until it is measured.

    A product of matrices at 0.7 of the device's rate, then a kernel that reads the sums of the gates and writes the
    states and what backward needs, 15 numbers a unit and row, in backward 20, through L2 or, where that holds no step,
    memory; and both launches. With few rows cuDNN has other forms, of which this says nothing.
    """
    rate = terms.scalar if problem.kind == "fp32" else terms.matrix[problem.kind]
    product = 8 * problem.H * problem.H * B / (0.7 * rate * terms.multiprocessors)
    moved = (20 if problem.backward else 15) * problem.H * B * problem.itemsize
    cells = moved / (terms.memory if moved > terms.l2_size / 2 else terms.l2)
    return problem.directions * (product + cells + 2 * terms.launch)


def of_launch(terms: Terms, mode: str, tiles: Tiles, problem: Problem, B: int, programs: int) -> dict[str, float]:
    """Cycles of one step of a launch of so many programs at once, by term."""
    if mode == "local":
        return few_units(problem.kind, tiles)
    if problem.proj:
        return projecting(terms, tiles, problem, B, programs)
    if tiles.in_turn:
        return in_turn(terms, tiles, problem, programs)
    if tiles.poll and mode == "grid":
        return few_rows(terms, tiles, problem, B, programs)
    return behind_flags(terms, mode, tiles, problem, B, programs)


def few_units(kind: str, tiles: Tiles) -> dict[str, float]:
    """Cycles of one step of the local form, either pass.

    Fitted as few_rows(), to H 8 to 128. Over the 71 kernels of the table it is off by 13% in the median, 53% at nine of
    ten, and 68% at most (Triton 3.6); the rank correlation is 0.85. What it leaves out is how narrow the rows are.
    """
    instructions = 4 * tiles.units * tiles.units * tiles.batch // 8 * BYTES[kind] // 512
    return {
        "parts": 450,  # and h (dgates) through shared memory
        "cells": 112 * tiles.units * tiles.batch / 128,
        "products": 1.6 * instructions * (3 if kind == "fp32" else 1),
    }


WIDENING = 0.5  # cycles that 32 lanes of each scheduler take for a number, by the bytes that it then has


def few_rows(terms: Terms, tiles: Tiles, problem: Problem, B: int, programs: int) -> dict[str, float]:
    """Cycles of one step of the kernels for few rows, with so many programs at once.

    Fitted to bench.simulate's cycles of every tile that an H100 can have, forward and backward, in all kinds, at H 136
    to 1024 and B 1 to 64, one layer (297 kernels, Triton 3.6; rank correlation 0.96). Over the 132 of the table in
    bench/results/offline it is off by 7% in the median, 20% at nine of ten, and 47% at most (rank correlation 0.89);
    over the 40 with a W_hh of 8 bits by 6%, 17% and 25%. What it leaves out is whether a failed poll comes just before
    the data.
    """
    kind, H, backward = problem.kind, problem.H, problem.backward
    products, gates = 1 if problem.layers == 1 else 2, 4 // tiles.team if backward else 1
    width = products * gates * H * BYTES[kind]  # bytes that a row has
    # Matrix instructions of 16 x 8 sums over 32 bytes of a row.
    instructions = ceil_div((tiles.team if backward else 4) * tiles.units, 16) * tiles.batch // 8 * width // 32
    return {
        "exchange": terms.poll * terms.clock + 670,
        "gather": 0.92 * min(tiles.batch, B) * width / share_of_l2(terms, programs),
        "products": 2 * instructions * ((2 if problem.weights else 3) if kind == "fp32" else 1),
        # A number of 8 bits is made wide at every step.
        "widening": WIDENING * 4 * tiles.units * H * BYTES[kind] / 128 if problem.weights else 0,
        "warps": 30 * tiles.warps,
        "looks": 415 * (tiles.batch // 8 - 1),  # at eight rows after another
        "team": 985 if tiles.team > 1 else 0,
    }


def in_turn(terms: Terms, tiles: Tiles, problem: Problem, programs: int) -> dict[str, float]:
    """Cycles of one row tile of the kernels for large batches, with so many programs at once.

    Fitted as few_rows(), at H 256 to 2048, in 16 bit and TF32 (Triton 3.7). Over the 34 kernels of the table in
    bench/results/offline it is off by 9% in the median, 31% at nine of ten, and 37% at most (Triton 3.9: 5%, 20%,
    32%).
    """
    rows, gates = (tiles.units, 4) if problem.backward else (4 * tiles.units, 1)
    chunks = gates * ceil_div(problem.H, tiles.chunk)
    columns = chunks * tiles.chunk
    streamed = 1 - tiles.kept / chunks if tiles.kept else 0
    elements = (tiles.batch + streamed * rows) * columns
    products = 2 * rows * columns * tiles.batch * terms.clock / terms.matrix[problem.kind]
    in_order = 205 * chunks  # what two products have between them
    gather = 0.78 * elements * problem.itemsize / share_of_l2(terms, programs)
    weight = 4 * problem.H * problem.H * problem.itemsize
    if weight > terms.l2_size:
        gather = max(gather, streamed * weight / terms.memory * terms.clock)
    return {
        "start": 3000,
        "products": products,
        "chunks": in_order,
        "gather": gather - 0.42 * min(products + in_order, gather),  # a part of it beside the products
        "rounding": 10 * elements / 128 if problem.kind == "tf32" else 0,
        "cells": (131 if problem.backward else 67) * tiles.units * tiles.batch / 128,
    }


def behind_flags(terms: Terms, mode: str, tiles: Tiles, problem: Problem, B: int, programs: int) -> dict[str, float]:
    """Cycles of one step of the grid form behind step flags, or of the step form, with so many programs at once.

    Fitted as few_rows(), to the grid form at H 256 to 2048, B 1 to 256, one layer or two (Triton 3.7). Over the 141
    kernels of the table it is off by 13% in the median, 29% at nine of ten, and 44% at most (Triton 3.9: 21%, 39%,
    59%); the rank correlation is 0.96. The step form has the same products, between launches, which are not simulated.
    """
    kind, H, backward = problem.kind, problem.H, problem.backward
    products, gates, size = 1 if problem.layers == 1 else 2, 4 // tiles.team if backward else 1, BYTES[kind]
    chunks = products * gates * ceil_div(H, tiles.chunk)
    gathered = min(tiles.batch, B) * products * gates * H * size
    streamed = 1 if mode == "step" else 1 - tiles.kept * products / chunks if tiles.kept else 0
    rows = (tiles.team if backward else 4) * tiles.units  # of the weights
    cycles = product_in_chunks(terms, kind, tiles, rows, chunks, gathered, streamed, programs)
    if backward and tiles.team == 1 and not problem.wide:
        cycles["chunks"] += 290 * chunks  # of narrow loads for few rows of the weight, as simulated at H 100 to 1407
    if tiles.kept and mode == "grid":  # programs that keep little take more from L2 than it has
        bytes_streamed = streamed * rows * chunks * tiles.chunk * size
        cycles["streaming"] = max(cycles["streaming"], bytes_streamed / share_of_l2(terms, programs))
    if 4 * H * H * size > terms.l2_size:
        cycles["streaming"] = max(cycles["streaming"], streamed * 4 * H * H * size / terms.memory * terms.clock)
    return handover(terms, mode) | cycles | {"team": 2000 if tiles.team > 1 else 0}


def projecting(terms: Terms, tiles: Tiles, problem: Problem, B: int, programs: int) -> dict[str, float]:
    """As behind_flags(), of a step of the step form that projects: it has two launches and two products, over P
    features for a program's units and over all units (backward: all gates) for its features.

    Not fitted: of what bench.simulate makes of both kernels at H 2560 and 4096, P 512, B 16, with the launches beside
    it, it is off by 13% at most (Triton 3.6).
    """
    kind, H, P, backward = problem.kind, problem.H, problem.proj, problem.backward
    size = BYTES[kind]
    found: dict[str, float] = {}
    for rows, gates, width in ((tiles.units * (1 if backward else 4), 1, P), (tiles.features, 4 if backward else 1, H)):
        chunks, gathered = gates * ceil_div(width, tiles.chunk), min(tiles.batch, B) * gates * width * size
        cycles = product_in_chunks(terms, kind, tiles, rows, chunks, gathered, 1, programs)
        for name, each in (handover(terms, "step") | cycles).items():
            found[name] = found.get(name, 0.0) + each
    if 5 * H * P * size > terms.l2_size:
        found["streaming"] = max(found["streaming"], 5 * H * P * size / terms.memory * terms.clock)
    return found


def product_in_chunks(
    terms: Terms, kind: str, tiles: Tiles, rows: int, chunks: int, gathered: float, streamed: float, programs: int
) -> dict[str, float]:
    """Cycles of a product of so many rows of weights and chunks of columns, of which each program gathers so many
    bytes."""
    columns = chunks * tiles.chunk
    instructions = ceil_div(rows, 16) * tiles.batch // 8 * columns * BYTES[kind] // 32
    return {
        "gather": 0.64 * gathered / share_of_l2(terms, programs),
        # Of other products the matrix instructions take no time beside the rest.
        "products": 2.1 * 3 * instructions if kind == "fp32" else 0,
        "rows": 4.1 * tiles.batch * columns * BYTES[kind] / 128,  # through shared memory
        "chunks": 330 * chunks,  # one after another
        "streaming": 330 * streamed * chunks,
    }


def handover(terms: Terms, mode: str) -> dict[str, float]:
    """Cycles between the products of two steps."""
    name, us = {"grid": ("exchange", terms.exchange), "step": ("launch", terms.launch)}[mode]
    return {name: us * terms.clock + 1100}


def share_of_l2(terms: Terms, programs: int) -> float:
    """Bytes a clock that a multiprocessor takes from L2: 64, as long as L2 has them for all."""
    return min(64, terms.l2 / terms.clock / programs)
