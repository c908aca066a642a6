"""Inference on a stream: a step in, a step out, the state kept between calls.

    python examples/streaming.py                           # a few seconds

The same loop serves nn.LSTM and fused_lstm.LSTM; on a GPU ours runs all layers of a step in one launch that writes the
new state alone, and does not wait for the device. A fused_lstm.Session keeps the state itself, and on a GPU a call of
it replays a CUDA graph. For a single layer there is LSTMCell, a drop-in for nn.LSTMCell.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import fused_lstm

Step = Callable[[Tensor], Tensor]


def of_module(lstm: nn.Module) -> Step:
    """A call of a module as a step (B, I) -> (B, H)."""
    hx = None

    def step(x: Tensor) -> Tensor:
        nonlocal hx
        y, hx = lstm(x[None], hx)
        return y[0]

    return step


def of_cells(cells: list[nn.Module]) -> Step:
    """The same of a cell for each layer."""
    states = [None] * len(cells)

    def step(x: Tensor) -> Tensor:
        for k, cell in enumerate(cells):
            states[k] = cell(x, states[k])
            x = states[k][0]
        return x

    return step


def stream(step: Step, frames: Tensor) -> tuple[Tensor, list[float]]:
    """Returns the outputs (T, B, H) of frames (T, B, I) that come one after the other, and how many microseconds each
    took until its output was there."""
    outputs, times = [], []
    for x in frames:
        begin = time.perf_counter()
        y = step(x).clone()  # a session writes over it
        if y.is_cuda:
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin))
        outputs.append(y)
    return torch.stack(outputs), times


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    theirs = nn.LSTM(80, args.hidden, args.layers, device=device).eval()
    ours = fused_lstm.LSTM(80, args.hidden, args.layers, device=device).eval()
    ours.load_state_dict(theirs.state_dict())
    cells: dict[type, list[nn.Module]] = {}
    for cls in (nn.LSTMCell, fused_lstm.LSTMCell):
        cells[cls] = [cls(80 if k == 0 else args.hidden, args.hidden, device=device) for k in range(args.layers)]
        for k, cell in enumerate(cells[cls]):
            names = [name for name in theirs.state_dict() if name.endswith(f"_l{k}")]
            cell.load_state_dict({name.removesuffix(f"_l{k}"): theirs.state_dict()[name] for name in names})
    frames = torch.randn(args.steps, args.batch, 80, device=device)
    whole, _ = theirs(frames)
    session = fused_lstm.Session(ours, args.batch)
    runs = {
        "nn.LSTM": of_module(theirs),
        "fused_lstm.LSTM": of_module(ours),
        "fused_lstm.Session": session,
        "nn.LSTMCell": of_cells(cells[nn.LSTMCell]),
        "fused_lstm.LSTMCell": of_cells(cells[fused_lstm.LSTMCell]),
    }
    print(f"{args.layers} layers of {args.hidden} on {device.type}; the session: {session.why or 'a CUDA graph'}")
    worst = 0.0
    for name, step in runs.items():
        y, times = stream(step, frames)
        p50, p99 = (statistics.quantiles(times, n=100)[k] for k in (49, 98))
        difference = (y - whole).abs().max().item()
        worst = max(worst, difference)
        print(f"{name:>20}: p50 {p50:7.1f} µs, p99 {p99:7.1f} µs a step, {difference:.1e} from the whole sequence")
    session.reset()  # another stream begins
    again, _ = stream(session, frames[:10])
    worst = max(worst, (again - whole[:10]).abs().max().item())
    agree = worst < (1e-5 if device.type == "cpu" else 1e-3)  # a GPU multiplies in TF32
    print(f"{'AGREE' if agree else 'DISAGREE'}: at most {worst:.1e} from nn.LSTM on the whole sequence")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
