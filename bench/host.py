"""What a call costs the host, beside nn.LSTM's whole call: `python -m bench.host`, on a CPU.

The kernels are left out, and with them Triton's own launch: what remains is Python and torch around them. nn.LSTM's
call is its CPU path at a size where there is next to nothing to compute. Medians of calls in turns, in microseconds.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import argparse
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction

from fused_lstm import LSTM

from .timing import Call

SIZES = {"T": 2, "B": 1, "I": 32, "H": 32}


def calls(module: torch.nn.Module) -> dict[str, Call]:
    """By name, what is timed."""
    x = torch.randn(SIZES["T"], SIZES["B"], SIZES["I"])
    hx = torch.zeros(1, SIZES["B"], SIZES["H"]), torch.zeros(1, SIZES["B"], SIZES["H"])

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


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call costs the host, beside nn.LSTM's.")
    parser.add_argument("--rounds", type=int, default=2000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ours, theirs = calls(LSTM(SIZES["I"], SIZES["H"])), calls(torch.nn.LSTM(SIZES["I"], SIZES["H"]))
    print(f"{SIZES}, one thread, {rounds} rounds", f"{'':24}nn.LSTM     ours  difference", sep="\n")
    with patch.object(InterpretedFunction, "run", lambda self, *args, **options: None):
        for name in ours:
            times: tuple[list[float], list[float]] = [], []
            for _ in range(rounds):
                for call, of in zip((theirs[name], ours[name]), times, strict=True):
                    begin = time.perf_counter()
                    call()
                    of.append(1e6 * (time.perf_counter() - begin))
            base, own = map(median, times)
            print(f"{name:24}{base:7.0f} {own:8.0f} {own - base:+11.0f}")


if __name__ == "__main__":
    main()
