"""Trains a character language model on Python's own source, with nn.LSTM and then with fused_lstm, and compares them.

    python examples/char_lm.py                              # about 100 s on two CPU cores
    python examples/char_lm.py --hidden 512 --length 256    # more worth a GPU's while
    TRITON_INTERPRET=1 python examples/char_lm.py --device cpu --steps 2 --hidden 16 --batch 2 --length 8

The second training differs from the first in two lines:

    + import fused_lstm
    + fused_lstm.swap(model)

Prints losses and speeds, text written by the swapped model, its loss with weights of 8 bits, and whether the two agree
(exit status 1 if not); draws both loss curves. The text is the standard library of the running Python: each version has
its own numbers.
"""

import argparse
import copy
import math
import os
import re
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

# Read when torch is imported: threads that wait asleep. Spinning, they cost tenfold when something else needs the CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import trange

import fused_lstm

# Modules that are one file in every supported Python.
TRAINING = "configparser dataclasses difflib doctest enum inspect mailbox optparse pdb pickle shutil subprocess tarfile"
HELD_OUT = "argparse fractions"
EMBEDDING, TEMPERATURE = 64, 0.6


class Run(NamedTuple):
    losses: list[float]  # of each step, in bits per character
    validation: float  # loss on the held-out text, in bits per character
    speed: float  # characters per second


class CharLM(nn.Module):
    """Characters in, logits of each next character out; the state of the LSTM goes in and comes out beside them."""

    def __init__(self, characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, hidden, layers, batch_first=True)  # no dropout: the text is read less than once
        self.head = nn.Linear(hidden, characters)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.embed(x), state)
        return self.head(y), state


def source(modules: str) -> str:
    """The source of these modules in printable ASCII, newlines, and a tab for every four spaces in a row."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((stdlib / f"{module}.py").read_text(encoding="utf-8") for module in modules.split())
    text = re.sub(r"[^\n -~]", "", text.expandtabs()).replace("    ", "\t")
    return re.sub(r"((.)\2{3})\2+", r"\1", text)  # no long runs, which a young model would repeat for ever


State = tuple[Tensor, Tensor]


def loss_of(
    model: CharLM, text: Tensor, step: int, state: State | None, args: argparse.Namespace
) -> tuple[Tensor, State]:
    """The loss of a step in bits a character, and the state for the next one."""
    # Each row of the batch reads on where it stopped the step before; past the end, the text starts over.
    chunks = text.unfold(0, args.length + 1, args.length)
    rows = torch.arange(args.batch, device=args.device) * (len(chunks) // args.batch)
    chunk = chunks[(rows + step) % len(chunks)]
    logits, (h, c) = model(chunk[:, :-1], state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), chunk[:, 1:].flatten())
    # The state goes on to the next chunk, the gradient stops here.
    return loss / math.log(2), (h.detach(), c.detach())


@torch.no_grad()
def validate(model: CharLM, held_out: Tensor, args: argparse.Namespace) -> float:
    """The mean loss of a tenth as many steps as are trained."""
    state, losses = None, []
    for step in range(max(1, args.steps // 10)):
        loss, state = loss_of(model, held_out, step, state, args)
        losses.append(loss.item())
    return statistics.fmean(losses)


def train(name: str, model: CharLM, text: Tensor, held_out: Tensor, args: argparse.Namespace) -> Run:
    """Trains by truncated backpropagation through time, then validates."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    state, losses, seconds = None, [], []
    for step in (bar := trange(args.steps, desc=f"{name:10}", unit="step")):
        start = time.perf_counter()
        loss, state = loss_of(model, text, step, state, args)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())  # waits for the GPU, so that the clock below is right
        seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    # The median leaves out what only the first steps pay: warm-up and compilation.
    return Run(losses, validate(model, held_out, args), args.batch * args.length / statistics.median(seconds))


@torch.no_grad()
def write(model: CharLM, characters: list[str], length: int, device: str) -> str:
    """Text of the model's own: each drawn character goes back in alone, with the state that the last one left."""
    text, state = "\ndef ", None
    x = torch.tensor([[characters.index(c) for c in text]], device=device)
    for _ in range(length):
        logits, state = model(x, state)
        x = torch.multinomial(torch.softmax(logits[:, -1].float() / TEMPERATURE, -1), 1)
        text += characters[x.item()]
    return text.expandtabs(4)


def compare(theirs: Run, ours: Run, exact: bool) -> tuple[bool, str]:
    """Whether two trainings agree, and the numbers that say so.

    exact: both ran the same code on a CPU, so every loss is the same to the last bit. Otherwise they round differently,
    and training amplifies that. The first ten losses must be within 0.1 %: bfloat16 moved them by 0.02 %, TF32 by less,
    a halved gradient by 0.3 %. The validation loss must be within 2 %: after 500 steps bfloat16 moved it by 0.7 %.
    """
    # As tensors, because their max() keeps a NaN, which then fails the comparison.
    a, b = (torch.tensor([*run.losses, run.validation], dtype=torch.float64) for run in (theirs, ours))
    difference = (a - b).abs()
    text = f"largest loss difference {difference[:-1].max():.2g} over {len(a) - 1} steps"
    if exact:
        return bool(difference.max() == 0), f"{text} (allowed: 0)"
    first, last = (difference / a)[:-1][:10].max(), (difference / a)[-1]
    text += f", {first:.3%} in the first ten (allowed: 0.1%) and {last:.2%} in validation (2%)"
    return bool(first <= 0.001 and last <= 0.02), text


def table(theirs: Run, ours: Run) -> str:
    last, validation = len(theirs.losses) - 1, (theirs.validation, ours.validation)
    rows = [(f"step {s + 1}", theirs.losses[s], ours.losses[s]) for s in sorted({last * k // 6 for k in range(7)})]
    lines = [f"{'bits per character':22}{'nn.LSTM':>10}{'fused_lstm':>12}{'difference':>12}"]
    lines += [f"{name:22}{a:10.4f}{b:12.4f}{b - a:12.1e}" for name, a, b in [*rows, ("validation", *validation)]]
    return "\n".join([*lines, f"{'characters per second':22}{theirs.speed:10,.0f}{ours.speed:12,.0f}"])


def plot(theirs: Run, ours: Run, characters: int, path: Path) -> None:
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()  # not pyplot's: needs no display
    steps = range(1, len(theirs.losses) + 1)
    # Thick, pale and solid under thin, dark and dashed: both are seen in grey print, and where they coincide.
    axes.plot(steps, theirs.losses, "-", color="0.7", linewidth=5, label=f"nn.LSTM, validation {theirs.validation:.3f}")
    axes.plot(steps, ours.losses, "--", color="0", linewidth=1, label=f"fused_lstm, validation {ours.validation:.3f}")
    axes.set(title="A character LSTM on Python's source, before and after the swap")
    axes.set(xlabel=f"step ({characters:,} characters each)", ylabel="training loss (bits per character)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=150)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps of each of the two")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units of a layer")
    parser.add_argument("--layers", type=int, default=2, help="layers of the LSTM")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--length", type=int, default=32, help="characters of a row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where both run")
    # Not float16: Adam's eps of 1e-8 is 0 in it.
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"), help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the written text")
    parser.add_argument("--png", type=Path, default=Path("out/char_lm.png"), help="where the plot goes")
    return parser.parse_args()


def main() -> int:
    args = options()
    texts = source(TRAINING), source(HELD_OUT)
    characters = sorted(set("".join(texts)))
    data = [torch.tensor([characters.index(c) for c in text], device=args.device) for text in texts]
    print(f"Python {sys.version.split()[0]}: {len(texts[0]):,} characters to train on, {len(texts[1]):,} held out")

    torch.manual_seed(args.seed)
    model = CharLM(len(characters), args.hidden, args.layers).to(args.device, getattr(torch, args.dtype))
    checkpoint = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = train("nn.LSTM", model, *data, args)

    fused_lstm.swap(model)
    model.load_state_dict(checkpoint)  # nn.LSTM's own, so that both start from the same weights
    ours = train("fused_lstm", model, *data, args)

    print(f"\n{table(theirs, ours)}\n\nWritten by the swapped model, one character at a time:")
    print(write(model, characters, min(500, 10 * args.steps), args.device))
    plot(theirs, ours, args.batch * args.length, args.png)
    for kind in ("int8", "fp8"):
        narrow = copy.deepcopy(model)
        fused_lstm.quantize(narrow, kind)
        loss = validate(narrow, data[1], args)
        print(f"\nHeld-out loss with weights of {kind}: {loss:.4f}, {loss - ours.validation:+.4f}", end="")
    print()
    plan = model.lstm.plan(model.embed(torch.zeros(args.batch, args.length, dtype=torch.long, device=args.device)))
    # On a GPU not even nn.LSTM repeats itself to the last bit.
    agree, numbers = compare(theirs, ours, exact=args.device == "cpu" and plan.mode == "torch")
    verdict = f"{'AGREE' if agree else 'DISAGREE'}: {numbers}; nn.LSTM on {args.device}, fused_lstm on {args.device}"
    print(f"\nLoss curves: {args.png}\n{verdict} (plan: {plan.mode} — {plan.why})")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
