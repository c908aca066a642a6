"""Clocks: CUDA events for device time, perf_counter on the host. Times are in milliseconds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Median, 20th and 80th percentile of a call's time in milliseconds, over so many rounds."""

    median: float
    q20: float
    q80: float
    rounds: int


def summary(times: list[float]) -> Times:
    """Returns the Times of at least two readings in milliseconds."""
    q20, *_, q80 = statistics.quantiles(times, n=5, method="inclusive")
    return Times(statistics.median(times), q20, q80, len(times))


def host(call: Call) -> float:
    """Runs a call that returns when its work is done; returns the milliseconds it took."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def graphed(call: Call, device: torch.device) -> Call:
    """Returns a call that replays `call`, which has run before, as one CUDA graph; on the CPU `call` itself."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@cache
def _cache_filler(device: torch.device) -> torch.Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)


def _cuda(call: Call, device: torch.device) -> Callable[[], float]:
    """Queues a call between two events; returns the function that waits for it and gives its milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # No call finds its inputs in L2, and the host gets ahead of the device, which keeps launches out of the time.
    _cache_filler(device).zero_()
    start.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return read


def alternate(
    calls: dict[str, Call], device: torch.device, seconds: float, least: int = 5, most: int = 100
) -> dict[str, Times]:
    """Times calls side by side: a round runs each of them once, so that what drifts on the machine hits all alike.

    Args:
        calls: what to time, by name.
        device: of the work; CUDA events time it on a CUDA device, perf_counter elsewhere.
        seconds: how long all rounds should take; their number stays within least and most.
        least, most: bounds for the number of rounds.

    Returns:
        The Times in milliseconds, by name.
    """

    def clock(call: Call) -> Callable[[], float]:
        if device.type == "cuda":
            return _cuda(call, device)
        elapsed = host(call)
        return lambda: elapsed

    for call in calls.values():
        call()
    one_round = sum(clock(call)() for call in calls.values())
    rounds = min(most, max(least, int(1e3 * seconds / one_round)))
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            readings[name].append(clock(call))
    return {name: summary([read() for read in reads]) for name, reads in readings.items()}
