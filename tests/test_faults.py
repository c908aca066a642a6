"""The net's own test: each planted fault is caught by the tests that are named beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The copy must be what the tests import, also where the package is installed from the tree.
RUN = """
import sys
from pathlib import Path

import fused_lstm.kernels.cell
import pytest

for module in (fused_lstm, fused_lstm.kernels.cell):
    assert Path.cwd() in Path(module.__file__).parents, module.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""

ONE_ROW = "test_kernels.py::test_awkward_shapes[cpu-9-1-16]"
PACKED = "test_kernels.py::test_packed[cpu-False-local]"
REVERSE = "test_kernels.py::test_packed[cpu-True-local]"
REVERSE_STEP = "test_kernels.py::test_packed[cpu-True-step]"
LAYERS = "test_parity.py::test_lstm[cpu-batch first-dtype3]"
PROJECTION = "test_parity.py::test_lstm[cpu-projection-dtype3]"
UNSORTED = "test_parity.py::test_packed[cpu-packed-dtype3]"
FLOAT32_CELL = "test_recurrence.py::test_cell_is_float32_across_the_loop[cpu-fp16]"
SMALL = "test_recurrence.py::test_small_activations_keep_their_relative_accuracy[cpu]"
DROPOUT = "test_dispatch.py::test_dropout_draws_the_masks_of_nn_lstm"
DERIVATIVE = "test_reference.py::test_backward_is_the_derivative_of_forward[False-False]"
COMPILED = "test_offline.py::test_variants[inference]"

# By file: a fault, the text that it replaces, the text that it puts there, and a test that must then fail.
FAULTS = {
    "kernels/cell.py": {
        "derivative of a gate": ("dg = dc * i * (1.0 - g * g)", "dg = dc * i * (1.0 - g)", ONE_ROW),
        "coefficient of the tanh series": ("-17.0 / 315", "17.0 / 315", ONE_ROW),
        "tanh without its series": ("tl.abs(x) < 0.25", "tl.abs(x) < 0.0", SMALL),
    },
    "kernels/forward.py": {
        "stride of the input gates": ("row[None, :] * (4 * H)", "row[None, :] * (3 * H)", ONE_ROW),
        "h0 taken as zero": ("h_tile = tl.load(", "h_tile = 0 * tl.load(", ONE_ROW),
        "cell rounded to 16 bits": ("active, c_next, c_tile", "active, c_next.to(tl.float16).to(ACC), c_tile", ONE_ROW),
        "cell kept in the dtype of h": (
            "active, c_next, c_tile",
            "active, c_next.to(y.dtype.element_ty).to(ACC), c_tile",
            FLOAT32_CELL,
        ),
        "cell of rows that have ended": ("tl.where(active, c_next, c_tile)", "c_next", PACKED),
        "order of the reverse direction": ("t = last - step if REVERSE else step", "t = step", REVERSE),
        "h of the wrong neighbour": ("t_prev = t + 1 if REVERSE else t - 1", "t_prev = t", REVERSE_STEP),
    },
    "kernels/backward.py": {
        "dc of rows that have ended": ("tl.where(active, dc_prev, dc)", "dc_prev", PACKED),
        "order of the reverse direction": ("t = step if REVERSE else last - step", "t = last - step", REVERSE),
        "dgates of the wrong neighbour": ("t_next = t - 1 if REVERSE else t + 1", "t_next = t", REVERSE_STEP),
        "cell of the wrong neighbour": ("t_prev = t + 1 if REVERSE else t - 1", "t_prev = t", REVERSE),
        "c0 taken as zero": (
            "cell_backward(i, f, g, o, c_prev,",
            "cell_backward(i, f, g, o, c_prev * (step < last),",
            ONE_ROW,
        ),
        "c0 taken from c": ("c0 + rows * H)", "c + row * H)", ONE_ROW),
        "dhn dropped": ("active & (~has_next)[None, :]", "active & False", ONE_ROW),
        "dhn of the longest rows only": ("active & (~has_next)[None, :]", "active & (step == 0)", PACKED),
    },
    "kernels/sync.py": {
        "no barrier before the release": (
            "tl.debug_barrier()\n    tl.atomic_add(flag, 1",
            "tl.atomic_add(flag, 1",
            COMPILED,
        ),
        "no acquire": ('sem="acquire"', 'sem="relaxed"', COMPILED),
    },
    "kernels/launch.py": {
        "loads of the next step before its flag": ('"num_stages": 1', '"num_stages": 3', COMPILED),
    },
    "fused_lstm/autograd.py": {
        "bias gradient without the first step": ("dgates.sum(0)", "dgates[current].sum(0)", LAYERS),
        "W_hh gradient without h0": ("(dgates[start].T @ h0,", "(0 * dgates[start].T @ h0,", LAYERS),
        "hn from the wrong end": ("Sequence(self.end, self.start,", "Sequence(self.end, self.end,", LAYERS),
        "W_hr gradient without the recurrence": (
            "torch.addmm(ends, (dgates[current] @ weight_hh).T, h[previous])",
            "ends",
            PROJECTION,
        ),
    },
    "fused_lstm/functional.py": {
        "dropout after the last layer": (" and layer < num_layers - 1", "", DROPOUT),
    },
    "fused_lstm/lstm.py": {
        "hx in the caller's order": ("self.permute_hidden(hx, permutation)", "hx", UNSORTED),
        "hn in the packed order": ("self.permute_hidden(hidden, unsorted_indices)", "hidden", UNSORTED),
    },
    "fused_lstm/reference.py": {
        "derivative of a gate": ("dg = dc_t * i * (1 - g**2)", "dg = dc_t * i * (1 - g)", DERIVATIVE),
    },
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the package, its tests, and what they import."""
    for source, target in {"fused_lstm": "fused_lstm", "kernels": "fused_lstm/kernels", "tests": "tests"}.items():
        shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bench").mkdir()
    for name in ("bench/__init__.py", "bench/offline.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def outcome(tree, *tests):
    """pytest's exit status and output over these tests of the copy, in the interpreter and a process of its own."""
    # Most of such a process's time is its start: no plugins.
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment |= {"PYTHONPATH": str(tree), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", RUN, "-xq", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    process = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize("file,fault", [(file, fault) for file, faults in FAULTS.items() for fault in faults])
def test_fault_is_caught(file, fault, tree):
    old, new, test = FAULTS[file][fault]
    path = tree / file.replace("kernels/", "fused_lstm/kernels/")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")
    status, output = outcome(tree, test)
    assert status == pytest.ExitCode.TESTS_FAILED and re.search(r"\b1 failed\b", output), output


def test_without_a_fault_the_same_tests_pass(tree):
    tests = {test for faults in FAULTS.values() for _, _, test in faults.values()}
    status, output = outcome(tree, *sorted(tests))
    assert status == pytest.ExitCode.OK and f"{len(tests)} passed" in output, output
