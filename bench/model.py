"""How fast a step could be: a lower bound from what the device can do, and what the kernels' model gives for a plan.

Both are predictions from data sheets and published microbenchmarks, as kernels/model.py says.
"""

import math
import re
from dataclasses import replace
from types import MappingProxyType

from fused_lstm.kernels.model import BYTES, TERMS, Terms, Time, parts, step
from fused_lstm.kernels.plan import Plan


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


def predicted(
    device: str | Terms, dtype: str, plan: Plan, H: int, B: int, backward: bool = False, proj: int = 0
) -> Time:
    """Returns what the model gives for one step under a plan, of all directions and layers of a launch: its tiles, its
    padding, its launches one after another. proj: features of a projection in it. Args and errors as floor()."""
    tiles = plan.backward if backward else plan.forward
    return step(known(device), dtype, plan.mode, tiles, H, B, backward, plan.directions, plan.layers, proj)


def known(device: str | Terms) -> Terms:
    terms = device if isinstance(device, Terms) else terms_of(device)
    if terms is None:
        raise KeyError(device)
    return terms
