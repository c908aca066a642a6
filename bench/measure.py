"""One row: a provider on a case, held to the parity rule first and then timed beside nn.LSTM."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tests import parity

from .cases import Case
from .providers import BASELINE, PROVIDERS
from .timing import Call, alternate

# Gold is float64 on the CPU: at the full T it would take longer than the measurement.
CHECKED_STEPS = 8


class Refused(Exception):
    """A result that breaks the parity rule."""


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Sets cuDNN's float32 switch to TF32 for "tf32", to IEEE for every other dtype.

    torch reads the switch under two names, cudnn.rnn.fp32_precision and the older cudnn.allow_tf32, which must agree.
    The one for matrix products outside cuDNN stays as it is: what a user of nn.LSTM gets hangs on cuDNN's alone.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.rnn.fp32_precision == "tf32"

    def switch(tf32: bool) -> None:
        cudnn.allow_tf32 = tf32  # first: it sets the new name too, and to "none" where IEEE is meant
        cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"

    switch(dtype == "tf32")
    try:
        yield
    finally:
        switch(before)


def build(case: Case, device: torch.device) -> tuple[nn.LSTM, Tensor, tuple[Tensor, Tensor]]:
    """Returns nn.LSTM with the case's weights, the input x (T, B, I) and hx = (h0, c0), the same at every call."""
    torch.manual_seed(0)
    lstm = nn.LSTM(case.I, case.H, case.layers, bidirectional=case.directions == 2)
    # In training mode cuDNN would write in the forward what only a backward reads.
    lstm = lstm.to(device, case.torch_dtype).train(case.mode != "forward")
    states = (case.layers * case.directions, case.B, case.H)
    x, h0, c0 = (torch.randn(size).to(device, case.torch_dtype) for size in ((case.T, case.B, case.I), states, states))
    return lstm, x, (h0, c0)


@lru_cache(maxsize=4)
def _gold(case: Case) -> dict[str, Tensor]:
    lstm, x, hx = build(case, torch.device("cpu"))
    return parity.run(parity.twin(lstm, torch.float64), x.double(), tuple(s.double() for s in hx))


def gold(case: Case) -> dict[str, Tensor]:
    """Every output and gradient of nn.LSTM in float64, computed once for each shape and torch dtype."""
    dtype = "fp32" if case.dtype == "tf32" else case.dtype
    return _gold(replace(case, mode="forward+backward", dtype=dtype))


def check(case: Case, provider: str, device: torch.device) -> None:
    """Holds a provider to the parity rule on the first steps of a case.

    Raises:
        Refused: with the result that breaks it, its error and the error that the rule allows.
    """
    case = replace(case, T=min(case.T, CHECKED_STEPS))
    lstm, x, hx = build(case, device)
    backward = case.mode != "forward"
    with torch.set_grad_enabled(backward):
        theirs = parity.run(lstm, x, hx, backward=backward)
        ours = parity.run(PROVIDERS[provider](lstm), x, hx, backward=backward)
    try:
        assert ours.keys() == theirs.keys(), f"results {sorted(ours)}, nn.LSTM's are {sorted(theirs)}"
        for name in theirs:
            parity.assert_close(name, ours[name], theirs[name], gold(case)[name], case.torch_dtype)
    except AssertionError as broken:
        raise Refused(str(broken)) from None


def step(case: Case, module: nn.Module, x: Tensor, hx: tuple[Tensor, Tensor]) -> Call:
    """Returns the call to time: module(x, hx), and in "forward+backward" the gradients of x and of every parameter."""
    if case.mode == "forward":
        return torch.no_grad()(lambda: module(x, hx))
    dy = torch.randn(case.T, case.B, case.directions * case.H).to(x)
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    return lambda: torch.autograd.grad(module(leaves[0], hx)[0], leaves, dy)


def steps(case: Case, provider: str, device: torch.device) -> tuple[dict[str, Call], dict[str, Any] | None]:
    """Returns the calls of the provider and of nn.LSTM on the same weights and inputs, by name, and the provider's
    Plan as a dict, None if it has none."""
    lstm, x, hx = build(case, device)
    module = PROVIDERS[provider](lstm)
    plan = asdict(module.plan(x)) if hasattr(module, "plan") else None
    return {provider: step(case, module, x, hx), BASELINE: step(case, lstm, x, hx)}, plan


def row(
    case: Case, provider: str, environment: dict[str, Any], status: str, why: str = "", **measured: Any
) -> dict[str, Any]:
    """Returns one row of a results file.

    status is "ok", or "refused" (broke the parity rule) or "failed", then with the reason in why. A row that is ok
    holds plan, and ms and baseline_ms: the Times of the provider and of nn.LSTM, in milliseconds, timed side by side.
    """
    key = {"case": asdict(case), "provider": provider, "baseline": BASELINE, "environment": environment}
    return key | {"status": status, "why": why} | measured


def measure(
    case: Case, provider: str, device: torch.device, environment: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Checks, then times for about `seconds`; returns the row. An exception becomes a row that says so."""
    try:
        with precision(case.dtype):
            check(case, provider, device)
            calls, plan = steps(case, provider, device)
            times = alternate(calls, device, seconds)
    except Refused as broken:
        return row(case, provider, environment, "refused", str(broken))
    except Exception as error:
        return row(case, provider, environment, "failed", f"{type(error).__name__}: {error}"[:2000])
    ms, baseline_ms = asdict(times[provider]), asdict(times[BASELINE])
    return row(case, provider, environment, "ok", plan=plan, ms=ms, baseline_ms=baseline_ms)
