"""Inference on a stream: a few steps in, a few steps out, the state kept between calls.

    python examples/streaming.py                           # a few seconds

The same loop serves nn.LSTM and fused_lstm.LSTM; on a GPU ours runs a layer in one launch a step that writes the new
state alone, and does not wait for the device. For a single layer there is LSTMCell, a drop-in for nn.LSTMCell.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import fused_lstm


def stream(lstm: nn.Module, frames: list[Tensor]) -> tuple[Tensor, float]:
    """Returns the outputs (T, B, H) of frames (steps, B, I) that come one after the other, and the seconds."""
    hx, outputs, begin = None, [], time.perf_counter()
    for frame in frames:
        y, hx = lstm(frame, hx)
        outputs.append(y)
    return torch.cat(outputs), time.perf_counter() - begin


def stream_cell(cell: nn.Module, frames: list[Tensor]) -> tuple[Tensor, float]:
    """As stream(), with a cell."""
    hx, outputs, begin = None, [], time.perf_counter()
    for frame in frames:
        for x in frame:
            hx = cell(x, hx)
            outputs.append(hx[0])
    return torch.stack(outputs), time.perf_counter() - begin


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    theirs = nn.LSTM(80, args.hidden).eval()
    cells = nn.LSTMCell(80, args.hidden), fused_lstm.LSTMCell(80, args.hidden)
    ours = fused_lstm.LSTM(80, args.hidden).eval()
    ours.load_state_dict(theirs.state_dict())
    for cell in cells:
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in theirs.state_dict().items()})
    x = torch.randn(args.steps, args.batch, 80)
    whole, _ = theirs(x)
    ones, threes = list(x.split(1)), list(x.split(3))
    runs = {
        "nn.LSTM, 1 step a call": stream(theirs, ones),
        "fused_lstm.LSTM, 1 step a call": stream(ours, ones),
        "nn.LSTM, 3 steps a call": stream(theirs, threes),
        "fused_lstm.LSTM, 3 steps a call": stream(ours, threes),
        "nn.LSTMCell": stream_cell(cells[0], ones),
        "fused_lstm.LSTMCell": stream_cell(cells[1], ones),
    }
    worst = 0.0
    for name, (y, seconds) in runs.items():
        difference = (y - whole).abs().max().item()
        worst = max(worst, difference)
        print(f"{name:>31}: {1e6 * seconds / args.steps:7.1f} µs a step, {difference:.1e} from the whole sequence")
    agree = worst < 1e-5
    print(f"{'AGREE' if agree else 'DISAGREE'}: at most {worst:.1e} from nn.LSTM on the whole sequence")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
