"""The examples run from end to end, and their checks can fail."""

import argparse
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAR_LM = EXAMPLES / "char_lm.py"


def test_char_lm(tmp_path):
    png = tmp_path / "new" / "char_lm.png"
    sizes = ["--device=cpu", "--steps=3", "--hidden=16", "--batch=2", "--length=8"]
    done = subprocess.run([sys.executable, CHAR_LM, *sizes, f"--png={png}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.match(r"AGREE: .* over 3 steps.*; nn\.LSTM on cpu, fused_lstm on cpu \(plan: \w+ — .+\)$", last), last
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("change", "exact", "agree"),
    [
        ({}, True, True),
        ({"losses": [6.0, 3.0, math.nextafter(2.0, 3.0)]}, True, False),
        ({"validation": math.nextafter(2.5, 3.0)}, True, False),
        ({"losses": [6.0, math.nan, 2.0]}, True, False),
        ({"losses": [6.0, 3.002, 2.0], "validation": 2.54}, False, True),
        ({"losses": [6.0, 3.004, 2.0]}, False, False),
        ({"validation": 2.56}, False, False),
        ({"validation": math.nan}, False, False),
    ],
)
def test_char_lm_can_disagree(change, exact, agree):
    example = runpy.run_path(str(CHAR_LM))
    theirs = example["Run"](losses=[6.0, 3.0, 2.0], validation=2.5, speed=1.0)
    assert example["compare"](theirs, theirs._replace(**change), exact)[0] is agree


RECIPES = {
    "rollouts.py": ["--envs=3", "--steps=4", "--updates=2", "--hidden=8"],
    "tagger.py": ["--batch=3", "--length=4", "--updates=2", "--hidden=8"],
    "long_sequence.py": ["--hidden=8", "--batch=2", "--budget=1", "--length=200"],
    "streaming.py": ["--steps=6", "--hidden=8"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    done = subprocess.run([sys.executable, EXAMPLES / name, *RECIPES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("AGREE")


def test_train_ddp():
    losses = []
    for processes in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        # No loss of these sizes lies where the last digit that is printed would change with the order of a sum.
        sizes = ["--steps=5", "--batch=4", "--length=5", "--hidden=4"]
        done = subprocess.run(
            [*torchrun, EXAMPLES / "train_ddp.py", *sizes], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        *lines, verdict = done.stdout.splitlines()
        assert verdict == f"AGREE: the weights of {processes} processes"
        losses.append(lines)
    assert len(losses[0]) == 5 and losses[0] == losses[1]


LONG_MEMORY = EXAMPLES / "long_memory.py"


def test_long_memory(tmp_path):
    sizes = ["--lengths=10", "--updates=3", "--tests=5", "--hidden=8", f"--png={tmp_path / 'new'}"]
    # On torch's path, where its user is: the interpreter would take minutes.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, LONG_MEMORY, *sizes], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if re.search(r" 96 .* [1-5] of 5  not solved$", line)]
    assert [row[:25].split() for row in rows] == [
        [*task, name] for task in (["adding,", "T", "=", "10"], ["temporal", "order"]) for name in ("RNN", "LSTM")
    ]
    assert done.stdout.splitlines()[-1].startswith(
        "NOT SOLVED — not solved by the LSTM: adding T = 10 and temporal order;"
    )
    for name in ("errors", "inside", "gradients"):
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_long_memory_has_the_sequences_of_the_paper():
    example = runpy.run_path(str(LONG_MEMORY))
    generator = torch.Generator().manual_seed(0)
    x, lengths, target = example["Adding"](50).batch(500, generator)
    assert set(lengths.tolist()) == set(range(50, 56)) and x.shape == (55, 500, 2)
    for row, end in enumerate(lengths.tolist()):
        values, markers = x[:, row].T
        marked = (markers == 1).nonzero()[:, 0].tolist()
        assert len(marked) == 2 and marked[0] < 10 and marked[1] < 25
        assert markers[end - 1] == -1 and markers[0] == (1 if marked[0] == 0 else -1)
        assert (markers == 0).sum() == 55 - (3 if marked[0] == 0 else 4) and not x[end:, row].any()
        assert values[0] == 0 or marked[0] > 0
        torch.testing.assert_close(target[row, 0], 0.5 + values[marked].sum() / 4)

    x, lengths, target = example["Order"]().batch(500, generator)
    assert set(lengths.tolist()) == set(range(100, 111))
    assert all(torch.equal(x[:, row].sum(1), (torch.arange(110) < end).float()) for row, end in enumerate(lengths))
    for symbols, end, answer in zip(x.argmax(2).T.tolist(), lengths.tolist(), target.argmax(1).tolist(), strict=True):
        told = [t for t in range(end) if symbols[t] >= 6]
        assert len(told) == 2 and 10 <= told[0] <= 20 and 50 <= told[1] <= 60
        assert answer == 2 * (symbols[told[0]] == 7) + (symbols[told[1]] == 7)
        assert symbols[0] == 0 and symbols[end - 1] == 1 and all(symbols[t] >= 2 for t in range(1, end - 1))


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_long_memory_draws_the_product_of_the_steps(name):
    """Of the RNN written out, W_hh^T diag(1 - h^2) a step; of the LSTM its derivative by torch.func."""
    example = runpy.run_path(str(LONG_MEMORY))
    T, B, H = 6, 2, 4
    task = example["Adding"](10)
    network = example["Network"](name, task, H, True)
    x = task.batch(B, torch.Generator().manual_seed(0))[0][:T]
    recurrent, expected = nn.RNN(2, H) if name == "RNN" else nn.LSTM(2, H), torch.zeros(T, dtype=torch.float64)
    recurrent.load_state_dict(network.recurrent.state_dict())
    recurrent.double()

    def step(state, x_t):
        h, *c = state.view(-1, 1, H)
        _, states = recurrent(x_t[None], (h, *c) if c else h)
        return torch.cat(states if c else [states], 1)[0]

    for row in range(B):
        inputs, state, steps = x[:, row].double(), torch.zeros(H if name == "RNN" else 2 * H, dtype=torch.float64), []
        for x_t in inputs:
            if name == "RNN":
                state = step(state, x_t)
                steps.append((1 - state**2)[:, None] * recurrent.weight_hh_l0)
            else:
                steps.append(torch.func.jacrev(step)(state, x_t))
                state = step(state, x_t)
        product = torch.eye(len(state), dtype=torch.float64)[:H]
        for lag in range(T):
            expected[lag] += product.norm() / H**0.5 / B
            product = product @ steps[T - 1 - lag]
    torch.testing.assert_close(example["gradient_norms"](network, x), expected)


def test_long_memory_can_fail():
    example = runpy.run_path(str(LONG_MEMORY))
    task = example["Adding"](10)

    def verdict(lstm, rnn):
        errors = {"LSTM": lstm, "RNN": rnn}
        return example["verdict"](
            [example["Result"](task, n, None, 1, 0.0, torch.tensor(e)) for n, e in errors.items()]
        )

    assert verdict([0.01, 0.03], [0.01, 0.05]) == (
        True,
        "SOLVED — solved by the LSTM: adding T = 10; not solved by the RNN: adding T = 10",
    )
    for bad in ([0.01, 0.04], [0.01, math.nan]):
        assert verdict(bad, [0.01, 0.01])[0] is False


SEARCH_SPACE = EXAMPLES / "search_space.py"
CELLS = ["V", "NIG", "NFG", "NOG", "NIAF", "NOAF", "NP", "CIFG", "FGR"]


@pytest.fixture
def search_space(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # where it finds long_memory, as a script does
    return runpy.run_path(str(SEARCH_SPACE))


def test_search_space(tmp_path):
    picture = tmp_path / "new" / "cells.png"
    sizes = ["--length=10", "--updates=3", "--tests=5", "--hidden=8", "--seeds=1", "--jobs=1", f"--picture={picture}"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, SEARCH_SPACE, *sizes], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.search(r" 0 of 1 +budget +96 +96 +1\.00 ", line)]
    assert [row[:5] for row in rows] == [
        [task, "T", "=", "10", cell] for task in ("adding,", "order,") for cell in CELLS
    ]
    assert done.stdout.splitlines()[-1].startswith("NO VERDICT")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_search_space_shows_all_cells_the_same_sequences(search_space, monkeypatch):
    seen = {}

    class Blind(search_space["Network"]):
        """Draws its weights, and answers without running the cell, which would take minutes in the interpreter."""

        def forward(self, x, lengths):
            return self.output(torch.zeros(len(lengths), self.output.in_features))

    class Recorded(search_space["Adding"]):
        def batch(self, B, generator):
            x, lengths, target = super().batch(B, generator)
            seen[cell, seed].append(torch.cat([x.flatten(), target.flatten()]))
            return x, lengths, target

    monkeypatch.setitem(search_space["train"].__globals__, "Network", Blind)
    args = argparse.Namespace(hidden=4, rate=0.01, updates=2, batch=3, tests=5)
    for cell in CELLS:
        for seed in (0, 1):
            seen[cell, seed] = []
            search_space["train"](Recorded(10), cell, seed, args)
    for cell in CELLS:
        assert len(seen[cell, 0]) == 3  # two to learn from, one to be tested by
        for seed in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(seen[cell, seed], seen["V", seed], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(seen[cell, 0], seen[cell, 1], strict=True))


def test_search_space_moves_the_places_of_the_order_in_proportion(search_space):
    theirs, own = search_space["Order"](), search_space["ShortOrder"](100)
    batches = [task.batch(50, torch.Generator().manual_seed(0)) for task in (theirs, own)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    symbols = search_space["ShortOrder"](30).batch(500, torch.Generator().manual_seed(0))[0].argmax(2)
    first, second = (symbols >= 6).T.nonzero()[:, 1].view(500, 2).T
    assert set(first.tolist()) == set(range(3, 7)) and set(second.tolist()) == set(range(15, 19))


@pytest.mark.parametrize("cell", CELLS)
def test_search_space_begins_with_f_open_and_i_shut(search_space, cell):
    H, of = 4, search_space["CELLS"][cell]
    recurrent = search_space["Network"](of, search_space["Adding"](10), H).recurrent
    bias = dict(zip(of.gates, (recurrent.bias_ih_l0 + recurrent.bias_hh_l0).view(-1, H), strict=True))
    for gate, at in (("f", math.log(10)), ("i", -math.log(10))):
        assert gate not in bias or torch.equal(bias[gate], torch.full((H,), at))
    assert all(bias[gate].abs().max() <= 2 / H**0.5 for gate in set(of.gates) - set("if"))


PAPER = {"V": 100, "NIG": 110, "NFG": 200, "NOG": 110, "NIAF": 110, "NOAF": 180, "NP": 100, "CIFG": 100, "FGR": 110}


@pytest.mark.parametrize(
    ("change", "disagrees"),
    [
        ({}, []),
        ({"NP": 60}, ["no variant"]),
        ({"NFG": 140}, ["no forget gate"]),  # too little
        ({"NIG": 190, "FGR": 190}, ["no output activation"]),  # others hurt more
        ({"CIFG": 160, "NP": 160}, ["input and forget gate coupled", "no peepholes"]),
    ],
)
def test_search_space_can_disagree(search_space, change, disagrees):
    results = {
        (task, cell): [
            search_space["Result"](task, cell, k, 1, n, True, 0.0, 0.0) for k, n in enumerate((1, number, 900))
        ]
        for task in ("adding", "order")
        for cell, number in (PAPER | change).items()
    }
    lines = search_space["findings"](results)
    assert len(lines) == 5 and all(re.match("(AGREE|DISAGREE): ", line) for line in lines)
    found = [line for line in lines if line.startswith("DISAGREE")]
    assert len(found) == len(disagrees) and all(text in line for text, line in zip(disagrees, found, strict=True))
    few = {key: runs for key, runs in results.items() if key[1] in ("V", "NP")}
    assert [line.split(": ")[1][:11] for line in search_space["findings"](few)] == ["no variant ", "no peephole"]
    assert search_space["findings"]({key: runs for key, runs in few.items() if key[1] == "V"}) == []
    results["order", "V"] = [r._replace(solved=r.seed == 0) for r in results["order", "V"]]
    assert search_space["findings"](results) == ["NO VERDICT: it takes a V that has solved order"]


def test_a_cell_of_your_own_in_readme_is_trained():
    """README's page from an equation to a trained layer, as it stands there."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code = readme.partition("## Cells of your own")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(re.match(r"loss ([\d.]+),", done.stdout)[1]) < 0.3
