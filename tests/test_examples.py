"""The examples run from end to end, and their checks can fail."""

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
