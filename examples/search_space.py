"""Which parts of an LSTM matter: a small edition of "LSTM: A Search Space Odyssey".

    python examples/search_space.py                        # 9 cells, 2 tasks, 5 seeds: about 7 minutes on two cores
    python examples/search_space.py --cells V NFG CIFG --seeds 1

Greff, Srivastava, Koutník, Steunebrink & Schmidhuber 2017 (https://arxiv.org/abs/1503.04069) take the vanilla LSTM (V)
and change one thing at a time: no input gate (NIG), no forget gate (NFG), no output gate (NOG), no input activation
(NIAF), no output activation (NOAF), no peepholes (NP), coupled input and forget gate (CIFG), all gates fed back to all
gates (FGR). Here all nine, as fused_lstm.cells.GREFF has them, learn two tasks of Hochreiter & Schmidhuber 1997, the
adding problem and the temporal order, which examples/long_memory.py explains; their sequences are shorter here. Counted
is how many sequences a cell sees until it has solved a task: until 2,000 new ones in a row are answered within the
bounds of 1997.

The same for every cell are hidden size, output layer, seeds, sequences, batches, clipping, and Adam with its rate,
which falls with the error. A cell begins with weights and peepholes as its layer draws them, uniform within 1/√H, but a
gate called f begins open, and one called i shut: their biases begin at log T and -log T, so that the cell keeps what it
has for about T steps. Where it has no such gate, nothing stands in for it: without forget gate f is 1 anyway, without
input gate there is no way to shut the input out, and where i is 1 - f, the open f shuts it.

What differs from the paper: its three tasks are speech, handwriting and music, and it trained each cell on each of them
200 times, with rates, sizes and noise drawn at random, to compare the best tenth. Here are two made-up tasks, the same
setting for all cells, and a few seeds.

Prints a table, and whether the numbers agree with the paper's findings. They are compared by a cell's cost: its
sequences divided by V's, the median over the seeds of each, and of both tasks the mean. A run that has not solved its
task counts with all sequences of its budget. Much better than V is a cost below 1 / 1.5, and one above 1.5 hurts.
Draws a picture, which README.md in this folder explains.
"""

import argparse
import math
import time
from collections import defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from long_memory import Adding, LastStep, Order, learn, test
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from tqdm import tqdm

import fused_lstm

CELLS = dict(fused_lstm.cells.GREFF)
MUCH = 1.5


class ShortOrder(Order):
    """The temporal order with all its places moved in proportion, from those of T = 100."""

    def __init__(self, T: int) -> None:
        self.T, self.name = T, f"order, T = {T}"

    def batch(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, B, 8) padded with zeros, lengths (B,) and targets (B, 4)."""
        T, rows = self.T, torch.arange(B)
        lengths = torch.randint(T, T + T // 10 + 1, (B,), generator=generator)
        steps = int(lengths.max())
        symbols = torch.randint(2, 6, (steps, B), generator=generator)
        symbols[0], symbols[lengths - 1, rows] = 0, 1
        first, second = torch.randint(0, 2, (2, B), generator=generator)
        symbols[torch.randint(T // 10, T // 5 + 1, (B,), generator=generator), rows] = 6 + first
        symbols[torch.randint(T // 2, T * 3 // 5 + 1, (B,), generator=generator), rows] = 6 + second
        x = nn.functional.one_hot(symbols, 8) * (torch.arange(steps)[:, None] < lengths)[..., None]
        return x.float(), lengths, nn.functional.one_hot(2 * first + second, 4).float()


Task = Adding | ShortOrder


class Network(LastStep):
    """Of a cell."""

    def __init__(self, cell: fused_lstm.Cell, task: Task, H: int) -> None:
        super().__init__(fused_lstm.Recurrent(cell, task.inputs, H), task, H)
        with torch.no_grad():
            for gate, bias in (("f", math.log(task.T)), ("i", -math.log(task.T))):
                if gate in cell.gates:
                    k = cell.gates.index(gate)
                    self.recurrent.bias_ih_l0[k * H : (k + 1) * H] = bias
                    self.recurrent.bias_hh_l0[k * H : (k + 1) * H] = 0


class Result(NamedTuple):
    task: str
    cell: str
    seed: int
    parameters: int
    sequences: int
    solved: bool
    error: float  # the mean of the test sequences
    seconds: float


def train(task: Task, cell: str, seed: int, args: argparse.Namespace) -> Result:
    """Trains until the task is solved, or for args.updates batches."""
    torch.manual_seed(seed)
    network = Network(CELLS[cell], task, args.hidden)
    optimizer = torch.optim.Adam(network.parameters(), args.rate)
    # One to learn from and one to be tested by. Both depend on the seed alone, so that all cells see the same.
    generators = [torch.Generator().manual_seed(2 * seed + k) for k in (1, 2)]
    begin, recent = time.perf_counter(), deque(maxlen=20)
    for update in range(1, args.updates + 1):
        recent.append(learn(network, optimizer, task, task.batch(args.batch, generators[0])))
        error = mean(recent)
        optimizer.param_groups[0]["lr"] = args.rate * min(1.0, max(0.05, error / task.bound))
        # Where the mean is above the bound, a test is lost before it begins.
        if update == args.updates or (update % 20 == 0 and error < task.bound):
            errors = test(network, task, args.tests, generators[1])
            if solved := bool((errors < task.bound).all()):
                break
    parameters = sum(p.numel() for p in network.parameters())
    seconds = time.perf_counter() - begin
    return Result(task.name, cell, seed, parameters, update * args.batch, solved, errors.mean().item(), seconds)


# By task and cell, in the order of the table, a result for each seed.
Results = dict[tuple[str, str], list[Result]]


def run(args: argparse.Namespace) -> Results:
    """Trains all, in as many processes as args.jobs says."""
    tasks = [Adding(args.length), ShortOrder(args.length)]
    calls = [(task, cell, seed, args) for task in tasks for cell in args.cells for seed in range(args.seeds)]
    found = []
    with tqdm(total=len(calls), unit="run", leave=False) as bar:
        if args.jobs == 1:
            torch.set_num_threads(1)  # the products of a step are too small to share
            for call in calls:
                found.append(train(*call))
                bar.update()
        else:
            # Torch's threads do not survive a fork.
            start = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (1,)}
            with ProcessPoolExecutor(args.jobs, **start) as pool:
                for done in as_completed([pool.submit(train, *call) for call in calls]):
                    found.append(done.result())
                    bar.update()
    results = defaultdict(list)
    for task, cell, seed, _ in calls:
        results[task.name, cell] += [r for r in found if (r.task, r.cell, r.seed) == (task.name, cell, seed)]
    return dict(results)


def sequences(runs: list[Result]) -> float:
    return median(r.sequences for r in runs)


def mostly_solved(runs: list[Result]) -> bool:
    """Whether more than half are: then their median is a number of sequences, and not only the budget."""
    return 2 * sum(r.solved for r in runs) > len(runs)


def table(results: Results) -> str:
    head = f"{'task':17}{'cell':>5}{'parameters':>12}{'solved':>9}{'sequences':>11}{'least':>9}{'most':>9}{'of V':>7}"
    lines = [f"{head}{'mean error':>12}{'seconds':>9}"]
    for (task, cell), runs in results.items():
        each = [r.sequences for r in runs]
        text = f"{task:17}{cell:>5}{runs[0].parameters:12,}{f'{sum(r.solved for r in runs)} of {len(runs)}':>9}"
        text += f"{f'{sequences(runs):,.0f}' if mostly_solved(runs) else 'budget':>11}{min(each):9,}{max(each):9,}"
        text += f"{sequences(runs) / sequences(results[task, 'V']):7.2f}" if (task, "V") in results else f"{'':7}"
        lines.append(f"{text}{median(r.error for r in runs):12.4f}{median(r.seconds for r in runs):9.1f}")
    return "\n".join(lines)


def findings(results: Results) -> list[str]:
    """For each finding of the paper whether these results agree."""
    tasks = list(dict.fromkeys(task for task, _ in results))
    lost = [task for task in tasks if (task, "V") not in results or not mostly_solved(results[task, "V"])]
    if lost:
        return [f"NO VERDICT: it takes a V that has solved {' and '.join(lost)}"]
    costs = {
        cell: mean(sequences(results[task, cell]) / sequences(results[task, "V"]) for task in tasks)
        for _, cell in results
        if cell != "V" and cell in fused_lstm.cells.GREFF
    }
    ranks = sorted(costs, key=lambda cell: costs[cell])
    verdicts = [("no variant is much better than V", cell, costs[cell] >= 1 / MUCH) for cell in ranks[:1]]
    for cell, text in (("NFG", "no forget gate"), ("NOAF", "no output activation")):
        if cell in costs:
            hurts = cell in ranks[-2:] and costs[cell] > MUCH
            verdicts.append((f"{text}: one of the two changes that hurt most", cell, hurts))
    for cell, text in (("CIFG", "input and forget gate coupled"), ("NP", "no peepholes")):
        if cell in costs:
            verdicts.append((f"{text}: costs nothing", cell, costs[cell] <= MUCH))
    return [f"{'AGREE' if a else 'DISAGREE'}: {text} ({cell}: {costs[cell]:.2f} of V)" for text, cell, a in verdicts]


def draw(results: Results, path: Path) -> None:
    """The sequences that each cell needed, a point for each seed, in a panel for each task."""
    tasks, cells = (list(dict.fromkeys(names)) for names in zip(*results, strict=True))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, task in zip(panels, tasks, strict=True):
        for k, cell in enumerate(cells):
            runs = results[task, cell]
            for place, r in enumerate(runs):
                # Side by side, so that seeds of the same number do not hide each other.
                x, face = k + 0.12 * (place - (len(runs) - 1) / 2), "0.6" if r.solved else "none"
                axes.plot(x, r.sequences, "o", markersize=4.5, markerfacecolor=face, markeredgecolor="0.4")
            axes.hlines(sequences(runs), k - 0.38, k + 0.38, color="0", linewidth=2)
        if (task, "V") in results:
            axes.axhline(sequences(results[task, "V"]), color="0.3", linestyle="--", linewidth=1)
        axes.set(yscale="log", title=task, xticks=range(len(cells)), xticklabels=cells)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
        axes.grid(axis="y", color="0.93")
        axes.set_axisbelow(True)
    panels[0].set(ylabel="sequences until solved")
    signs = {
        "a seed": {"marker": "o", "color": "0.4", "markerfacecolor": "0.6", "linestyle": ""},
        "not solved within the budget": {"marker": "o", "color": "0.4", "markerfacecolor": "none", "linestyle": ""},
        "median": {"color": "0", "linewidth": 2},
        "median of V": {"color": "0.3", "linestyle": "--", "linewidth": 1},
    }
    handles = [Line2D([], [], label=label, **style) for label, style in signs.items()]
    figure.legend(handles=handles, fontsize="small", loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="of the table")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell on each task")
    parser.add_argument("--length", type=int, default=30, help="T of both tasks")
    parser.add_argument("--updates", type=int, default=2000, help="batches after which a task is not solved")
    parser.add_argument("--batch", type=int, default=32, help="sequences of an update")
    parser.add_argument("--hidden", type=int, default=32, help="hidden units of every cell")
    parser.add_argument("--rate", type=float, default=0.01, help="at which Adam begins")
    parser.add_argument("--tests", type=int, default=2000, help="sequences in a row that are to be answered")
    parser.add_argument("--jobs", type=int, default=2, help="processes that train, a core each")
    parser.add_argument("--picture", type=Path, default=Path("out/search_space.png"), help="where the picture goes")
    args = parser.parse_args()
    if args.length < 10:
        parser.error("--length: the adding problem marks one of the first ten pairs, so T is at least 10")
    return args


def main() -> int:
    args = options()
    results = run(args)
    print(table(results))
    draw(results, args.picture)
    print(f"\nPicture: {args.picture}")
    print("\n".join(findings(results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
