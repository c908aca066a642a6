"""The examples run from end to end, and their checks can fail."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
    "streaming.py": ["--steps=6", "--hidden=8"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    done = subprocess.run([sys.executable, EXAMPLES / name, *RECIPES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("AGREE")


def test_train_ddp():
    sizes = ["--steps=2", "--batch=2", "--length=4", "--hidden=4"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        EXAMPLES / "train_ddp.py",
    ]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AGREE: the weights of 2 processes" in done.stdout.splitlines()
