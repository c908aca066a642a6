"""Clocks: CUDA events for device time, perf_counter on the host. Times are in milliseconds."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

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
    """Runs a call; returns the milliseconds until it returned: the whole of its work, where none is queued."""
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


# The driver queues a bounded number of launches: past it the host waits, however long the device has been held.
HOLD_AT_MOST = 20.0


def _cycles(device: torch.device) -> float:
    """How many cycles of torch.cuda._sleep the device spins in a millisecond, at the clock that it has now."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1)  # loads the kernel
    start.record()
    torch.cuda._sleep(1_000_000)
    end.record()
    torch.cuda.synchronize(device)
    return 1_000_000 / start.elapsed_time(end)


def _cuda(call: Call, device: torch.device, hold: int) -> Callable[[], float]:
    """Queues a call between two events; returns the function that waits for it and gives its milliseconds.

    hold: cycles for which the device is kept busy before, so that the host is ahead of it when the call begins.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler(device).zero_()  # no call finds its inputs in L2
    if hold:
        torch.cuda._sleep(hold)
    start.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return read


def on_host(calls: dict[str, Call], device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Median milliseconds until each call returns, with the device idle before: what the host takes for its launches,
    and where a call waits for the device, that too. Empty on the CPU, where a call returns when its work is done."""
    if device.type != "cuda":
        return {}
    readings: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize(device)
            readings[name].append(host(call))
    torch.cuda.synchronize(device)
    return {name: statistics.median(times) for name, times in readings.items()}


def alternate(
    calls: dict[str, Call],
    device: torch.device,
    seconds: float,
    hosts: Mapping[str, float] = MappingProxyType({}),
    least: int = 5,
    most: int = 100,
) -> dict[str, Times]:
    """Times calls side by side: a round runs each of them once, so that what drifts on the machine hits all alike.

    Args:
        calls: what to time, by name.
        device: of the work; CUDA events time it on a CUDA device, perf_counter elsewhere.
        seconds: how long all rounds should take; their number stays within least and most.
        hosts: of on_host(). A CUDA device is kept busy for 1.5 times as long before a call begins, which keeps the
            host's time out of the device's; of a call that is not in it, the host's time counts where it is longer.
        least, most: bounds for the number of rounds.

    Returns:
        The Times in milliseconds, by name.
    """
    for call in calls.values():
        call()
    cuda = device.type == "cuda"
    cycles = _cycles(device) if cuda and hosts else 0.0

    def clock(name: str) -> Callable[[], float]:
        if cuda:
            return _cuda(calls[name], device, int(cycles * min(1.5 * hosts.get(name, 0.0), HOLD_AT_MOST)))
        elapsed = host(calls[name])
        return lambda: elapsed

    one_round = host(lambda: [clock(name)() for name in calls])
    rounds = min(most, max(least, int(1e3 * seconds / one_round)))
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls:
            readings[name].append(clock(name))
    return {name: summary([read() for read in reads]) for name, reads in readings.items()}
