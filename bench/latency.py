"""How long one step takes from host to host: `python -m bench.latency`.

The input of a step goes from the host to the device, the step runs, and y comes back, call after call, each with the
state that the call before has left. By their median and the 99th percentile, of every way to call a stack of layers:
nn.LSTM and ours as they are, and each as a Session, which on CUDA replays a graph. On a CPU nothing is copied, and no
Session has a graph.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_lstm

from . import store
from .cases import DTYPES, STACKS

Step = Callable[[Tensor], Tensor]


def eager(module: nn.Module, batch: int) -> Step:
    """A module as it is called, which takes its state from call to call."""
    hx: Any = None
    device = next(module.parameters()).device

    def step(x: Tensor) -> Tensor:
        nonlocal hx
        y, hx = module(x[None].to(device, non_blocking=True), hx)
        return y[0]

    return step


WAYS = {
    "nn.LSTM": ("", eager),
    "fused_lstm.LSTM": ("swap", eager),
    "nn.LSTM, session": ("", fused_lstm.Session),
    "fused_lstm.LSTM, session": ("swap", fused_lstm.Session),
    "the same, weights of int8": ("quantize", fused_lstm.Session),
}


def microseconds(step: Step, x: Tensor, calls: int) -> list[float]:
    """Of each of so many calls, from x on the host to y on the host."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        step(x).cpu()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


@torch.no_grad()
def measure(layers: int, H: int, B: int, dtype: str, device: torch.device, calls: int) -> list[dict[str, Any]]:
    """A row for each way, in turns of a tenth of the calls, so that what drifts on the machine hits all alike."""
    torch.manual_seed(0)
    module = nn.LSTM(H, H, layers, dtype=DTYPES[dtype]).to(device).eval()
    x = torch.randn(B, H).to(DTYPES[dtype])
    x = x.pin_memory() if device.type == "cuda" else x
    steps: dict[str, Step] = {}
    for name, (becomes, made) in WAYS.items():
        twin = nn.LSTM(H, H, layers, dtype=DTYPES[dtype]).to(device).eval()
        twin.load_state_dict(module.state_dict())
        if becomes:
            fused_lstm.swap(twin)
        if becomes == "quantize":
            fused_lstm.quantize(twin)
        steps[name] = made(twin, B)
    times: dict[str, list[float]] = {name: [] for name in steps}
    outputs = {name: [step(x).cpu() for _ in range(8)][-1] for name, step in steps.items()}  # and compiles
    for name, y in outputs.items():
        worst = (y.double() - outputs["nn.LSTM"].double()).abs().max().item()
        # Weights of 8 bits are others.
        if not worst <= (0.1 if WAYS[name][0] == "quantize" else 64 * torch.finfo(DTYPES[dtype]).eps):
            raise AssertionError(f"{name} is {worst:.1e} from nn.LSTM after 8 steps")
    for _ in range(10):
        for name, step in steps.items():
            times[name] += microseconds(step, x, max(1, calls // 10))
    rows = []
    for name, of in times.items():
        percentiles = statistics.quantiles(of, n=100, method="inclusive")
        p50, p99 = percentiles[49], percentiles[98]
        rows.append({"way": name, "layers": layers, "H": H, "B": B, "dtype": dtype, "p50": p50, "p99": p99})
    return rows


def main() -> int:
    """Runs the command line; returns 1 if a way failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="of each way (default: 1000)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="batch rows (default: 1 4 16)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: fp16 bf16, on a CPU fp32")
    parser.add_argument("--sizes", nargs="+", metavar="L,H", help="layers and hidden units")
    parser.add_argument("--results", type=Path, help="a folder in which the rows are added to latency.jsonl")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [tuple(map(int, size.split(","))) for size in args.sizes] if args.sizes else STACKS
    dtypes = args.dtype or (["fp16", "bf16"] if device.type == "cuda" else ["fp32"])
    environment, failed = store.environment(device) if args.results else {}, 0
    print("layers    H    B  dtype  way                          p50 us    p99 us")
    for (layers, H), dtype, B in product(sizes, dtypes, args.batch):
        try:
            rows = measure(layers, H, B, dtype, device, args.calls)
        except Exception as error:
            failed += 1
            print(f"{layers:6} {H:4} {B:4}  {dtype:5}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        for row in rows:
            print(
                f"{layers:6} {H:4} {B:4}  {dtype:5}  {row['way']:26} {row['p50']:8.1f}  {row['p99']:8.1f}", flush=True
            )
            if args.results:
                store.append(args.results / "latency.jsonl", row | {"environment": environment})
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
