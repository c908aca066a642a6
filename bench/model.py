"""How fast a step could be: a lower bound from what the device can do, and what the kernels' model gives for a plan.

Both are predictions from data sheets and published microbenchmarks, as kernels/model.py says.
"""

import math
import re
from dataclasses import replace
from types import MappingProxyType

from fused_lstm.kernels.model import BYTES, TERMS, Terms, Time, step
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.tiles import Problem, ceil_div


def _like(name: str, memory: float, tflops: float | None = None, **others: float) -> Terms:
    """The terms of a device of TERMS with another memory; tflops: the dense peak in 16 bit of all its multiprocessors,
    where the clock or their number is another."""
    terms = replace(TERMS[name], memory=memory, **others)
    if tflops is None:
        return terms
    slower = 1e6 * tflops / terms.multiprocessors / terms.matrix["bf16"]
    return replace(terms, matrix=MappingProxyType({kind: slower * rate for kind, rate in terms.matrix.items()}))


# By a part of the name that the driver gives, the most particular first; whole words. NVIDIA's data sheets give what
# sets the others apart from those of TERMS: memory (H200 4.8 TB/s; GH200 4.0 with 96 GB, 4.9 with 144; H100 PCIe 2.0,
# NVL 3.9; A100 1.555 with 40 GB, 1.935 on the PCIe board of 80 GB), 114 multiprocessors and 756 Tflop/s on the H100
# PCIe. torch reports 60 MB of L2 on an H200.
NAMES = {
    "GH200 480GB": _like("H100", 4.0e6),
    "GH200 144G": _like("H100", 4.9e6),
    "H200": _like("H100", 4.8e6, l2_size=60e6),
    "H100 PCIe": _like("H100", 2.0e6, 756, multiprocessors=114),
    "H100 NVL": _like("H100", 3.9e6),
    "A100-SXM4-40GB": _like("A100", 1.555e6),
    "A100-PCIE-40GB": _like("A100", 1.555e6),
    "A100 80GB PCIe": _like("A100", 1.935e6),
    "GB200": TERMS["B200"],
    **TERMS,
}


def terms_of(device: str) -> Terms | None:
    """The terms of a device by its name, such as "NVIDIA H100 80GB HBM3"; None for one that the table lacks."""
    return next((terms for name, terms in NAMES.items() if re.search(rf"\b{name}\b", device)), None)


def floor(device: str | Terms, dtype: str, mode: str, H: int, B: int, backward: bool = False, layers: int = 1) -> Time:
    """Returns the floor of one step of a recurrence, without the products that are parallel over time; of layers in one
    launch a step of all of them, with the products of the layers above the first.

    In "grid" the best split of units and batch rows over the multiprocessors counts, whichever the plan takes, and what
    can overlap does. No order of instructions is counted: a kernel has one, and that is what sets it apart from this.

    Args:
        device: a key of NAMES, a device's name that contains one, or terms.
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
    best = Time(math.inf, "")
    for u in units or [math.ceil(H / share)]:
        groups = min(B, max(1, share // math.ceil(H / u)))
        weights = 4 * u * H * BYTES[dtype] * (2 if dtype == "fp32" else 1) * (1 if layers == 1 else 2)
        streamed = {"local": 0.0, "grid": max(0.0, 1 - terms.on_chip / weights), "step": 1.0}[mode]
        sizes = u, groups, math.ceil(B / groups), streamed, backward
        ways = [(1, False)]
        if mode == "grid":
            ways += [(1, True), (4, False)] if backward else [(1, True)]
        for team, poll in ways:
            one = parts(terms, dtype, mode, H, B, *sizes, team=team, layers=layers, poll=poll)
            best = min(best, one, key=lambda candidate: candidate.us)
    return best


def parts(
    terms: Terms,
    kind: str,
    mode: str,
    H: int,
    B: int,
    units: int,
    groups: int,
    rows: int,
    streamed: float,
    backward: bool,
    team: int = 1,
    layers: int = 1,
    poll: bool = False,
) -> Time:
    """One step of `groups` batch groups at once, of `rows` rows each, with the share `streamed` of W_hh not on chip;
    in teams a program gathers one gate's dgates, and exchanges twice. Of several layers each has two products, W_hh's
    and the W_ih of itself or of the layer above.

    A step begins when the last one has been exchanged; what it then does overlaps at best: its slowest part counts.
    """
    size, width, blocks = BYTES[kind], 4 * H // team if backward else H, layers * ceil_div(H, units)
    products = 1 if layers == 1 else 2
    exchange = terms.poll if poll else terms.exchange * min(team, 2)
    before = {"local": 0.0, "grid": exchange, "step": terms.launch}[mode]
    weights = products * 4 * units * H * size
    real_rows = min(B, groups * rows)
    found = {
        # On chip, full precision keeps each weight as two TF32 numbers.
        "weights": (1 - streamed) * weights * (2 if kind == "fp32" else 1) / terms.shared,
        "streaming": streamed * blocks * groups * weights / terms.l2,
        "products": products * 2 * rows * 4 * units * H / terms.matrix[kind],
        # input_gates and y (backward: gates, c, dy and dgates) pass through device memory once.
        "memory": layers * real_rows * size * (H + 8 * H + 2 * H if backward else 5 * H) / terms.memory,
    }
    if 4 * H * H * size > terms.l2_size:
        found["streaming"] = max(found["streaming"], streamed * 4 * H * H * size / terms.memory)
    if mode != "local":
        # Who polls has looked once in vain when it sees all.
        found["gather"] = (2 if poll else 1) * products * blocks * real_rows * width * size / terms.l2
    slowest = max(found, key=found.__getitem__)
    binds = slowest if found[slowest] > before else {"grid": "exchange", "step": "launch", "local": slowest}[mode]
    return Time(before + found[slowest], binds)


def predicted(
    device: str | Terms, dtype: str, plan: Plan, H: int, B: int, backward: bool = False, proj: int = 0
) -> Time:
    """Returns what the model gives for one step under a plan, of all directions and layers of a launch: its tiles, its
    padding, its launches one after another. proj: features of a projection in it. Args and errors as floor()."""
    tiles = plan.backward if backward else plan.forward
    problem = Problem(dtype, H, backward, plan.directions, plan.layers, proj, plan.weights)
    return step(known(device), plan.mode, tiles, problem, B)


def known(device: str | Terms) -> Terms:
    terms = device if isinstance(device, Terms) else terms_of(device)
    if terms is None:
        raise KeyError(device)
    return terms
