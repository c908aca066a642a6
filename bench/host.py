"""What a call costs the host, beside nn.LSTM's whole call, and a Recurrent's beside nn.GRU's: `python -m bench.host`,
without a GPU. And what a Session's costs beside one step of the module, its graph's replay left out.

The kernels are compiled for an H100 and launched by Triton as there; only the driver is missing, so what remains is
Python and torch around it. nn.LSTM's call is its CPU path at a size where there is next to nothing to compute. Medians
of calls in turns, in microseconds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from fused_lstm import LSTM, Recurrent, Session, cells, session
from fused_lstm.kernels import plan, plan_of_cell
from fused_lstm.kernels.tiles import H100
from fused_lstm.route import known_route

from .absent import gpu_target
from .timing import Call

CACHED = known_route, plan.choose, plan.choose_one_step, plan_of_cell.choose_for
SIZES = {"T": 2, "B": 1, "I": 32, "H": 32}


class NoDriver:
    """Triton's driver of an H100 that is not there: it notes in `launched` what each launch hands over."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return gpu_target(H100.capability)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H100.shared, "multiprocessor_count": H100.multiprocessors}

    def load_binary(self, name: str, *of_kernel: Any) -> tuple[Any, ...]:
        """The module, the function, its registers, its spilled ones, and the most threads of a program."""
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: self.launched.append(args)


@contextmanager
def without_driver() -> Iterator[NoDriver]:
    """Within it CPU tensors take the kernels' path, whose launches do nothing. Not where Triton interprets."""
    driver = NoDriver()
    triton.runtime.driver.set_active(driver)
    with patch.object(plan, "interpreted", lambda: True):
        for cached in CACHED:
            cached.cache_clear()
        yield driver
    for cached in CACHED:
        cached.cache_clear()


def calls(module: torch.nn.Module, layers: int = 1) -> dict[str, Call]:
    """By name, what is timed."""
    x, zeros = torch.randn(SIZES["T"], SIZES["B"], SIZES["I"]), torch.zeros(layers, SIZES["B"], SIZES["H"])
    hx = (zeros, zeros) if module.mode == "LSTM" else zeros

    def both() -> None:
        y, _ = module(x, hx)
        y.sum().backward()

    inference: Callable[..., Call] = lambda *given: torch.no_grad()(lambda: module(*given))  # noqa: E731
    return {
        "one step": inference(x[:1], hx),
        "forward": inference(x, hx),
        "forward for backward": lambda: module(x, hx),
        "forward and backward": both,
    }


def in_session(module: LSTM) -> Session:
    """A Session as on a CUDA device, whose replays do nothing."""
    captured = lambda steps, device: ([step() for step in steps], [lambda: None] * len(steps), None)  # noqa: E731
    with patch.object(session, "captured", captured), patch.object(session, "has_graphs", lambda device: True):
        return Session(module, SIZES["B"])


def side_by_side(named: dict[str, tuple[Call, Call]], rounds: int, driver: NoDriver) -> None:
    """Prints the medians of pairs of calls."""
    for name, pair in named.items():
        for call in pair:
            call()  # compiles
        times: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            for call, of in zip(pair, times, strict=True):
                begin = time.perf_counter()
                call()
                of.append(1e6 * (time.perf_counter() - begin))
            driver.launched.clear()
        base, own = map(median, times)
        print(f"{name:28}{base:7.1f} {own:8.1f} {own - base:+11.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call costs the host, beside nn.LSTM's.")
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    sizes = SIZES["I"], SIZES["H"]
    print(f"{SIZES}, one thread, {rounds} rounds")
    pairs = (torch.nn.LSTM(*sizes), LSTM(*sizes)), (torch.nn.GRU(*sizes), Recurrent(cells.gru, *sizes))
    with without_driver() as driver:
        for modules in pairs:
            print(f"{'':28}nn.{modules[0].mode:4}     ours  difference")
            theirs, ours = map(calls, modules)
            side_by_side({name: (theirs[name], ours[name]) for name in ours}, rounds, driver)
        stacks = {}
        for layers in (1, 2, 4):
            theirs, ours = (calls(cls(*sizes, layers), layers) for cls in (torch.nn.LSTM, LSTM))
            stacks[f"one step, {layers} layers"] = theirs["one step"], ours["one step"]
            running, x = in_session(LSTM(*sizes, layers)), torch.randn(SIZES["B"], SIZES["I"])
            stacks[f"... in a session, {layers} layers"] = theirs["one step"], partial(running, x)
        print(f"{'':28}nn.LSTM     ours  difference")
        side_by_side(stacks, rounds, driver)


if __name__ == "__main__":
    main()
