"""The CPU path against nn.LSTM, in pytest-benchmark; `make bench` prints the ratios."""

from dataclasses import asdict

import pytest
import torch

from . import measure, store, timing
from .cases import CPU
from .providers import BASELINE

DEVICE = torch.device("cpu")
WARMUP, ROUNDS = 2, 30


@pytest.mark.parametrize("case", CPU, ids=lambda case: f"{case.mode} {case.shape} B{case.B}")
def test_fused_lstm(benchmark, case):
    measure.check(case, "fused_lstm", DEVICE)
    calls, plan = measure.steps(case, "fused_lstm", DEVICE)
    baseline = []
    # One round of nn.LSTM before each of ours: what drifts on the machine hits both alike.
    benchmark.pedantic(
        calls["fused_lstm"],
        setup=lambda: baseline.append(timing.host(calls[BASELINE])),
        rounds=ROUNDS,
        warmup_rounds=WARMUP,
    )
    if benchmark.enabled:
        benchmark.extra_info["row"] = measure.row(
            case,
            "fused_lstm",
            store.environment(DEVICE),
            "ok",
            plan=plan,
            ms=asdict(timing.summary([1e3 * seconds for seconds in benchmark.stats.stats.data])),
            baseline_ms=asdict(timing.summary(baseline[-ROUNDS:])),
        )
