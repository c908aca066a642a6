"""Why an LSTM remembers and a plain RNN does not: two tasks of Hochreiter & Schmidhuber 1997, and a look inside.

    python examples/long_memory.py                         # about 3 minutes on two CPU cores
    python examples/long_memory.py --lengths 200 --no-order
    python examples/long_memory.py --full                  # the paper's lengths, up to T = 1000: about an hour

Adding problem (experiment 4): T to 1.1 T pairs (value from -1 to 1, marker). One of the first ten pairs is marked by 1,
then one of the first T/2 - 1 others; the first and the last pair have the marker -1, the rest 0. At the end the network
is to say 0.5 + (x1 + x2) / 4 of the two marked values. If the first pair is marked, its value is 0.
Temporal order (experiment 6a): 100 to 110 symbols, E first, B last, between them a, b, c or d, but X or Y at one step
of 10 to 20 and at one of 50 to 60. At the end the network is to say which: XX, XY, YX or YY.

Solved is a task when 2,000 new sequences in a row are answered within the paper's bounds: an error below 0.04, or for
the order below 0.3 in each of the four outputs. nn.RNN (tanh) and fused_lstm.LSTM have the same hidden size, output
layer, sequences, batches, clipping and Adam. What differs between the two, or from the paper:

- The LSTM's forget gates begin open and its input gates shut: their biases begin at log T and -log T, so that a cell
  keeps what it has for about T steps (Tallec & Ollivier 2018, https://arxiv.org/abs/1804.11188). The paper's cell has
  no forget gate, and shuts the input gates too. With --torch-bias they begin as nn.LSTM draws them.
- The learning rate begins at 0.01 for the LSTM and at 0.001 for the RNN, which gets further with it than with the
  LSTM's. Both rates fall with the error.
- Softmax and cross entropy for the order, where the paper has four sigmoids.

Prints a table of the errors and what was solved, and draws three pictures, which README.md in this folder explains.
"""

import argparse
import copy
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import trange

import fused_lstm

RATES = {"RNN": 1e-3, "LSTM": 1e-2}
FULL = {"lengths": [50, 100, 200, 500, 1000], "updates": 30_000}


class Adding:
    """Experiment 4. Answers are compared as they are."""

    inputs, outputs, bound = 2, 1, 0.04

    def __init__(self, T: int) -> None:
        self.T, self.name = T, f"adding, T = {T}"

    def batch(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, B, 2) padded with zeros, lengths (B,) and targets (B, 1)."""
        rows = torch.arange(B)
        lengths = torch.randint(self.T, self.T + self.T // 10 + 1, (B,), generator=generator)
        steps = int(lengths.max())
        values = torch.rand(steps, B, generator=generator) * 2 - 1
        first = torch.randint(0, 10, (B,), generator=generator)
        second = torch.randint(0, self.T // 2 - 1, (B,), generator=generator)
        second += second >= first  # among the pairs that are not marked yet
        values[0, (first == 0) | (second == 0)] = 0
        markers = torch.zeros(steps, B)
        markers[0] = markers[lengths - 1, rows] = -1
        markers[first, rows] = markers[second, rows] = 1
        x = torch.stack([values, markers], 2) * (torch.arange(steps)[:, None] < lengths)[..., None]
        return x, lengths, 0.5 + (values[first, rows] + values[second, rows])[:, None] / 4

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    def answer(self, output: Tensor) -> Tensor:
        return output


class Order:
    """Experiment 6a. Answers are four probabilities; the symbols E, B, a, b, c, d, X, Y are one of eight inputs."""

    inputs, outputs, bound, T, name = 8, 4, 0.3, 100, "temporal order"

    def batch(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, B, 8) padded with zeros, lengths (B,) and targets (B, 4)."""
        rows = torch.arange(B)
        lengths = torch.randint(100, 111, (B,), generator=generator)
        steps = int(lengths.max())
        symbols = torch.randint(2, 6, (steps, B), generator=generator)
        symbols[0], symbols[lengths - 1, rows] = 0, 1
        first, second = torch.randint(0, 2, (2, B), generator=generator)
        symbols[torch.randint(10, 21, (B,), generator=generator), rows] = 6 + first
        symbols[torch.randint(50, 61, (B,), generator=generator), rows] = 6 + second
        x = nn.functional.one_hot(symbols, 8) * (torch.arange(steps)[:, None] < lengths)[..., None]
        return x.float(), lengths, nn.functional.one_hot(2 * first + second, 4).float()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def answer(self, output: Tensor) -> Tensor:
        return output.softmax(1)


Task = Adding | Order


class LastStep(nn.Module):
    """A recurrent layer, and an output layer that reads each row's last step."""

    def __init__(self, recurrent: nn.Module, task: Task, H: int) -> None:
        super().__init__()
        self.recurrent, self.output = recurrent, nn.Linear(H, task.outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        # A network that reads forwards has not seen the padding when it comes to a row's last step. So lengths= and
        # packing would give the same numbers, but on a CPU torch's own LSTM takes ten times as long over packed rows.
        y, _ = self.recurrent(x)
        return self.output(y[lengths - 1, torch.arange(len(lengths))])


class Network(LastStep):
    """Of an RNN or an LSTM."""

    def __init__(self, name: str, task: Task, H: int, torch_bias: bool) -> None:
        super().__init__(nn.RNN(task.inputs, H) if name == "RNN" else fused_lstm.LSTM(task.inputs, H), task, H)
        if name == "LSTM" and not torch_bias:
            with torch.no_grad():
                self.recurrent.bias_hh_l0[: 2 * H] = 0
                self.recurrent.bias_ih_l0[:H] = -math.log(task.T)  # of i
                self.recurrent.bias_ih_l0[H : 2 * H] = math.log(task.T)  # of f


class Result(NamedTuple):
    task: Task
    name: str
    network: Network
    updates: int
    seconds: float
    errors: Tensor  # of each test sequence

    @property
    def solved(self) -> bool:
        return bool((self.errors < self.task.bound).all())


@torch.no_grad()
def test(network: LastStep, task: Task, sequences: int, generator: torch.Generator) -> Tensor:
    """The error of each of so many new sequences, the largest of its outputs."""
    errors = []
    for begin in range(0, sequences, 250):
        x, lengths, target = task.batch(min(250, sequences - begin), generator)
        errors.append((task.answer(network(x, lengths)) - target).abs().amax(1))
    return torch.cat(errors)


def learn(
    network: LastStep, optimizer: torch.optim.Optimizer, task: Task, batch: tuple[Tensor, Tensor, Tensor]
) -> float:
    """One update; returns the mean error of the batch."""
    x, lengths, target = batch
    output = network(x, lengths)
    loss = task.loss(output, target)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return (task.answer(output.detach()) - target).abs().amax(1).mean().item()


def train(name: str, task: Task, args: argparse.Namespace) -> Result:
    """Trains until the task is solved, or for args.updates batches."""
    torch.manual_seed(args.seed)
    network = Network(name, task, args.hidden, args.torch_bias)
    optimizer = torch.optim.Adam(network.parameters(), RATES[name])
    generators = [torch.Generator().manual_seed(2 * args.seed + k) for k in (1, 2)]
    begin, recent, errors = time.perf_counter(), deque(maxlen=100), torch.ones(1)
    for update in (bar := trange(1, args.updates + 1, desc=f"{task.name:15} {name:4}", unit="batch", leave=False)):
        recent.append(learn(network, optimizer, task, task.batch(args.batch, generators[0])))
        error = sum(recent) / len(recent)
        optimizer.param_groups[0]["lr"] = RATES[name] * min(1.0, max(0.05, error / task.bound))
        if update % 100 == 0 or update == args.updates:
            bar.set_postfix(error=f"{error:.3f}", refresh=False)
            # Where the mean is above the bound, a test is lost before it begins.
            if error < task.bound or update == args.updates:
                errors = test(network, task, args.tests, generators[1])
                if (errors < task.bound).all():
                    bar.close()
                    break
    return Result(task, name, network, update, time.perf_counter() - begin, errors)


def table(results: list[Result], B: int) -> str:
    head = f"{'task':17}{'network':>8}{'sequences':>11}{'seconds':>9}{'mean error':>12}{'largest':>10}{'wrong':>14}"
    lines = [head]
    for r in results:
        wrong = int((r.errors >= r.task.bound).sum())
        text = f"{r.task.name:17}{r.name:>8}{r.updates * B:11,}{r.seconds:9.0f}{r.errors.mean():12.4f}"
        text += f"{r.errors.max():10.4f}{wrong:7,} of {len(r.errors):,}"
        lines.append(f"{text}  {'solved' if r.solved else 'not solved'}")
    return "\n".join(lines)


def verdict(results: list[Result]) -> tuple[bool, str]:
    """Whether the LSTM solved everything, and what each network did and did not."""
    good = all(r.solved for r in results if r.name == "LSTM")
    parts = []
    for name in ("LSTM", "RNN"):
        for done, text in ((True, "solved by"), (False, "not solved by")):
            own = [r.task for r in results if r.name == name and r.solved == done]
            lengths = [str(task.T) for task in own if isinstance(task, Adding)]
            tasks = [f"adding T = {', '.join(lengths)}"] if lengths else []
            tasks += [task.name for task in own if isinstance(task, Order)]
            parts += [f"{text} the {name}: {' and '.join(tasks)}"] if tasks else []
    return good, f"{'SOLVED' if good else 'NOT SOLVED'} — {'; '.join(parts)}"


def gradient_norms(network: Network, x: Tensor) -> Tensor:
    """Of h_T with respect to the state that step t hands on, for t = T-1 back to 0: (T,), the mean over the rows of x.

    The state is h_t of an RNN, and h_t and c_t side by side of an LSTM. The norm is Frobenius', by the root of H: 1 for
    the identity.
    """
    network, x = copy.deepcopy(network).double(), x.double()
    H, state, states = network.recurrent.hidden_size, None, []
    for t in range(len(x)):
        _, state = network.recurrent(x[t : t + 1], state)
        # A copy, so that the derivative by c_t leaves out the way through h_t of the same step.
        state = tuple(s.clone() for s in state) if isinstance(state, tuple) else state.clone()
        states.append(state if isinstance(state, tuple) else (state,))
    flat = [tensor for step in states for tensor in step]
    squares = torch.zeros(len(x), x.shape[1], dtype=x.dtype)
    for unit in range(H):
        grads = torch.autograd.grad(states[-1][0][0, :, unit].sum(), flat, retain_graph=True, allow_unused=True)
        of_steps = [torch.zeros_like(s) if g is None else g for g, s in zip(grads, flat, strict=True)]
        squares += torch.stack(of_steps).square().sum((1, 3)).view(len(x), -1, x.shape[1]).sum(1)
    return (squares / H).sqrt().mean(1).flip(0)


def draw_errors(results: list[Result], path: Path) -> None:
    """The error of the adding problem against T, for both networks."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"RNN": ("s--", "0.55", "nn.RNN (tanh)"), "LSTM": ("o-", "0", "fused_lstm.LSTM")}
    for name, (marker, color, label) in styles.items():
        own = [r for r in results if r.name == name and isinstance(r.task, Adding)]
        means = [r.errors.mean().item() for r in own]
        above = [r.errors.max().item() - mean for r, mean in zip(own, means, strict=True)]
        T = [r.task.T for r in own]
        axes.errorbar(T, means, [[0] * len(T), above], fmt=marker, color=color, capsize=4, label=label)
    axes.axhline(1 / 6, color="0.3", linestyle=":", linewidth=1, label="mean error of the answer 0.5 to everything")
    axes.axhline(Adding.bound, color="0.3", linestyle="-.", linewidth=1, label="solved: the largest error below 0.04")
    axes.set(xscale="log", yscale="log", xticks=T, xticklabels=T, xlabel="T (steps; the lag is T/2 to 1.1 T)")
    axes.set(yticks=[0.01, 0.04, 0.1, 0.5], yticklabels=["0.01", "0.04", "0.1", "0.5"], ylim=(0.004, 1))
    axes.set(ylabel="absolute error (target 0 to 1)", title="Adding problem: mean error, with bars up to the largest")
    axes.minorticks_off()
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    figure.savefig(path / "errors.png", dpi=110)


def draw_inside(network: Network, task: Adding, seed: int, path: Path) -> None:
    """The forget gate and the cell of every unit over one sequence, from the layer's trace."""
    x, lengths, target = task.batch(100, torch.Generator().manual_seed(seed))
    trace = fused_lstm.trace(network.recurrent, x)
    f, c = trace.f[:, :, 0, 0], trace.c[:, :, 0, 0]  # (T, B, H)
    written = torch.diff(c, dim=0, prepend=torch.zeros_like(c[:1])).abs()
    # Of a hundred, the sequence whose two marked steps both write much: a small value leaves little to see.
    row = int(torch.where(x[..., 1] == 1, written.sum(2), torch.inf).amin(0).argmax())
    steps, marked = int(lengths[row]), (x[:, row, 1] == 1).nonzero()[:, 0].tolist()
    order = written[marked, row].sum(0).argsort(descending=True)
    x, f, c = x[:steps, row], f[:steps, row, order].T, c[:steps, row, order].T
    with torch.no_grad():
        answer = network(x[:, None], lengths[row : row + 1]).item()

    figure = Figure(figsize=(8, 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=[1, 2, 2])
    top.plot(range(steps), x[:, 0], ".-", color="0.7", linewidth=0.8, label="value")
    top.plot(marked, x[marked, 0], "o", color="0", label="marked value")
    top.set(
        ylabel="input value",
        ylim=(-1.2, 1.9),
        title=f"One sequence: target {target[row].item():.3f}, answer {answer:.3f}",
    )
    top.legend(fontsize="small", loc="upper right", ncols=2)
    limit = c.abs().max().item()
    # f from its own least value: it stays so near to 1 that a scale from 0 would show one colour.
    maps = {"forget gate f": (middle, f, f.min().item(), 1), "cell c": (bottom, c, -limit, limit)}
    for label, (axes, values, low, high) in maps.items():
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="cividis", vmin=low, vmax=high)
        figure.colorbar(image, ax=axes, label=label)
        axes.set(ylabel="unit")
    for axes in (top, middle, bottom):
        for step in marked:
            axes.axvline(step, color="0" if axes is top else "1", linestyle="--", linewidth=1)
    bottom.set(xlabel="step t (dashed: the marked steps, by whose change of c the units are sorted)")
    figure.savefig(path / "inside.png", dpi=110)


def draw_gradients(trained: dict[str, Network], task: Adding, args: argparse.Namespace, path: Path) -> str:
    """How much of a change of the state arrives at h_T, against the lag, before and after training.

    Returns the two ends after training, in words.
    """
    x, _, _ = task.batch(16, torch.Generator().manual_seed(args.seed))
    x = x[: task.T]  # every row has so many steps

    def new(name: str, torch_bias: bool) -> Network:
        torch.manual_seed(args.seed)
        return Network(name, task, args.hidden, torch_bias)

    lines = {"RNN": [], "LSTM": [("biases as nn.LSTM draws them, before", new("LSTM", True), ":", "0")]}
    for name, network in trained.items():
        lines[name].append(("before training", new(name, args.torch_bias), "--", "0.45"))
        lines[name].append(("after training", network, "-", "0"))
    panels = Figure(figsize=(8, 4), layout="constrained").subplots(1, 2, sharey=True)
    state = {
        "RNN": r"nn.RNN: $\|\partial h_T / \partial h_t\|$",
        "LSTM": r"LSTM: $\|\partial h_T / \partial (h_t, c_t)\|$",
    }
    ends = []
    for axes, (name, of_network) in zip(panels, lines.items(), strict=True):
        for label, network, style, color in of_network:
            norms = gradient_norms(network, x)
            axes.semilogy(norms.clamp(min=1e-30), style, color=color, label=label)
        ends.append(f"{name} {norms[-1]:.1e}")
        axes.set(title=state[name], xlabel="lag T - t (steps)")
        axes.grid(color="0.9")
        axes.legend(fontsize="small", loc="lower left")
    panels[0].set(ylabel=r"Frobenius norm / $\sqrt{H}$ (1: unchanged)", ylim=(1e-24, 1e2))
    panels[0].figure.savefig(path / "gradients.png", dpi=110)
    return f"Of a change of the state {len(x) - 1} steps before the end, there arrives: {', '.join(ends)}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 20, 50, 100], help="T of the adding problem")
    parser.add_argument("--no-order", action="store_true", help="leave out the temporal order")
    parser.add_argument(
        "--updates", type=int, default=10_000, help="batches after which a network has not solved a task"
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences of an update")
    parser.add_argument("--hidden", type=int, default=32, help="hidden units of both networks")
    parser.add_argument("--tests", type=int, default=2000, help="sequences in a row that are to be answered")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of all sequences")
    parser.add_argument("--torch-bias", action="store_true", help="the LSTM's biases begin as nn.LSTM draws them")
    parser.add_argument("--full", action="store_true", help=f"T of {FULL['lengths']}, {FULL['updates']:,} updates")
    parser.add_argument("--png", type=Path, default=Path("out/long_memory"), help="folder of the three pictures")
    args = parser.parse_args()
    if args.full:
        vars(args).update(FULL)
    if min(args.lengths) < 10:
        parser.error("--lengths: the adding problem marks one of the first ten pairs, so T is at least 10")
    return args


def main() -> int:
    args = options()
    torch.set_num_threads(1)  # the products of a step are too small to share
    tasks: list[Task] = [Adding(T) for T in sorted(args.lengths)]
    results = [train(name, task, args) for task in tasks + [Order()] * (not args.no_order) for name in RATES]
    print(table(results, args.batch))

    args.png.mkdir(parents=True, exist_ok=True)
    draw_errors(results, args.png)
    look = min(tasks, key=lambda task: abs(task.T - 100))  # the pictures of one T: long, and quick to look at
    trained = {r.name: r.network for r in results if r.task is look}
    draw_inside(trained["LSTM"], look, args.seed, args.png)
    print(f"\n{draw_gradients(trained, look, args, args.png)}")
    print(f"Pictures: {', '.join(str(args.png / name) for name in ('errors.png', 'inside.png', 'gradients.png'))}")
    good, text = verdict(results)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
