"""The CPU path against nn.LSTM's, in pytest-benchmark; `make bench` makes the table and the plot of its rows."""

from dataclasses import asdict

import pytest
import torch

from . import measure, run, store, timing
from .cases import CPU

DEVICE = torch.device("cpu")
WARMUP, ROUNDS = 2, 30


def name(value):
    return value if isinstance(value, str) else f"{value.mode} {value.shape} B{value.B}"


@pytest.mark.parametrize("case, provider", run.work(CPU), ids=name)
def test_provider(benchmark, case, provider):
    measure.check(case, provider, DEVICE)
    timed = measure.steps(case, provider, DEVICE)
    baseline = []
    # One round of nn.LSTM before each of the provider: what drifts on the machine hits both alike.
    benchmark.pedantic(
        timed.calls[provider],
        setup=lambda: baseline.append(timing.host(timed.calls[timed.baseline])),
        rounds=ROUNDS,
        warmup_rounds=WARMUP,
    )
    if benchmark.enabled:
        benchmark.extra_info["row"] = measure.row(
            case,
            provider,
            store.environment(DEVICE),
            "ok",
            plan=timed.plan,
            ms=asdict(timing.summary([1e3 * seconds for seconds in benchmark.stats.stats.data])),
            baseline_ms=asdict(timing.summary(baseline[-ROUNDS:])),
            **timed.memory(provider, DEVICE),
            clock=None,
        )
