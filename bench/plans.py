"""The part of bench.lab that has fused_lstm.tune() time what the plans of the sweep's sizes choose among.

A row is a call on the kernels beside nn.LSTM's. The times of all kernels are in a file beside the rows, in the form in
which the package keeps what it has found out: copied to kernels/measured/, under the same name, it is shipped.
"""

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

import fused_lstm
from fused_lstm.kernels.findings import findings_on, shipped_for
from fused_lstm.kernels.plan import hardware_of

from .cases import DRY, GPU, Case
from .measure import build, precision
from .micro import Lab, Measured, Wrong
from .providers import fused
from .timing import Times

DEFAULTS = {field.name: field.default for field in fields(Case)}


def items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """The forms of call of the sweep whose time decides a plan, T left aside; those with a backward pass first, because
    it has kernels of its own and inference has not."""
    listed = [case for case in GPU if case.form == "dense"]
    if lab.dry:
        listed = [case for case in DRY if case.dtype == "fp32" and case.shape == DRY[0].shape]
    forms: dict[Case, Case] = {}
    for case in sorted(listed, key=lambda case: case.mode != "forward+backward"):
        forms.setdefault(replace(case, T=0), case)
    for case in forms.values():
        yield "call", {name: value for name, value in asdict(case).items() if value != DEFAULTS[name]}


def measure(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    case = Case(**params)
    with precision(case.dtype), torch.set_grad_enabled(case.mode == "forward+backward"):
        lstm, x, hx = build(case, lab.device, drawn=lab.device)
        x = x[:1] if case.mode == "one step" else x
        tuned = fused_lstm.tune(fused(lstm), x, hx, again=True, progress=False)
    (time,) = tuned.calls.values()
    us = time.kernels
    measured = Times(us, us, us, 1), time.torch / us, "nn.LSTM's time over ours"
    if refused := [f"{row.what}: {row.remark}" for row in tuned.rows if row.us is None]:
        raise Wrong("; ".join(refused), measured)
    return measured


def keep_in(folder: Path, lab: Lab) -> None:
    """From now on this process keeps what it finds out in a file in a folder."""
    device = torch.cuda.get_device_name(lab.device) if lab.device.type == "cuda" else "interpreter"
    findings_on(hardware_of(lab.device)).attach(folder / shipped_for(device).name, device)
