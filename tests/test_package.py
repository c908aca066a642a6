"""The wheel: what a user installs, built from a copy of the tree, so that nothing is left in it."""

import ast
import re
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_lstm", "kernels")

IMPORT = """
import importlib.util, sys
from pathlib import Path

import fused_lstm, fused_lstm.kernels.forward

unpacked = Path(sys.argv[1])
for module in (fused_lstm, fused_lstm.kernels.forward):
    assert unpacked in Path(module.__file__).parents, module.__file__
# Another package may have that name, but ours must not.
spec = importlib.util.find_spec("kernels")
assert spec is None or unpacked not in Path(spec.origin).parents, spec
# All of torch's compiler would take a second.
assert "torch._dynamo" not in sys.modules
"""

WITHOUT_TRITON = """
import runpy, sys

runpy.run_path(sys.argv[2])
import torch, fused_lstm

lstm, x = fused_lstm.LSTM(4, 8, 2), torch.randn(5, 3, 4)
assert lstm.plan(x).why == fused_lstm.LSTMCell(4, 8).plan(x[0]).why == "Triton is not installed: torch's own LSTM"
lstm(x, lengths=[5, 0, 2])[0].sum().backward()
assert fused_lstm.trace(lstm, x).i.shape == (5, 3, 2, 1, 8)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    command = [*pip, ".", "--no-deps", "--no-build-isolation", "-w", str(out)]
    process = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = out.glob("*.whl")
    with ZipFile(path) as archive:
        yield archive


def test_holds_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    code = {f"fused_lstm/{path.name}" for path in (ROOT / "fused_lstm").glob("*.py")}
    code |= {f"fused_lstm/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    for folder in ("cells", "paths"):
        code |= {f"fused_lstm/{folder}/{path.name}" for path in (ROOT / "fused_lstm" / folder).glob("*.py")}
    (info,) = {name.split("/")[0] for name in names} - {"fused_lstm"}
    assert info.endswith(".dist-info")
    assert {name for name in names if name.startswith("fused_lstm/")} == {
        *code,
        "fused_lstm/py.typed",
        "fused_lstm/kernels/limits.json",
        *(f"fused_lstm/kernels/measured/{path.name}" for path in (ROOT / "kernels/measured").glob("*")),
    }
    assert "LICENSE" in {PurePosixPath(name).name for name in names}


def test_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    required = {text for text in metadata.get_all("Requires-Dist") if "extra" not in text}
    assert metadata["Name"] == "fused-lstm"
    assert metadata["Requires-Python"] == ">=3.10"
    assert required == {"torch>=2.11"}  # Triton comes with torch


@pytest.mark.parametrize("script", [IMPORT, WITHOUT_TRITON], ids=["with Triton", "without Triton"])
def test_runs_without_the_tree(script, wheel, tmp_path, monkeypatch):
    wheel.extractall(tmp_path / "unpacked")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "unpacked"))
    command = [sys.executable, "-c", script, str(tmp_path / "unpacked"), str(ROOT / "tests/without_triton.py")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def named_tests(cell):
    """The (file, -k expression) that a cell of README's table names, and what else it says."""
    named = re.findall(r"`tests/(test_\w+\.py)(?: -k (?:\"([^\"]+)\"|(\w+)))?`", cell)
    return [(file, quoted or word) for file, quoted, word in named]


def on_torch():
    """The files that make test runs on torch's path."""
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"ON_TORCH := \$\(addprefix tests/test_, ([^)]*)\)", make).group(1).replace("\\\n", " ").split()
    return {path.name for name in names for path in (ROOT / "tests").glob(f"test_{name}")}


def test_each_row_of_the_table_of_pytorch_has_a_test_on_both_paths():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| | kernels' path | torch's path |")[2]
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 10
    for row in rows:
        name, *cells = row
        assert len(cells) == 2, name
        for path, cell in zip(("kernels", "torch"), cells, strict=True):
            if cell.startswith("does not hold: "):
                continue
            named = named_tests(cell)
            assert named, f"{name} names no test on the {path} path"
            for file, words in named:
                assert path == "kernels" or file in on_torch(), f"{file} does not run on torch's path"
                names = re.findall(
                    r"^def (test_\w+)", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE
                )
                for word in words.split(" or ") if words else ["test"]:
                    assert any(word in name for name in names), f"{file} has no test of {word}"


# Those that have more parameters: what a user calls, and what an operator runs.
MANY = {
    "functional.py": ["lstm"],
    "kernels/forward.py": ["forward"],
    "kernels/backward.py": ["backward"],
    "stand_in.py": ["backward"],
}


def test_no_file_and_no_signature_is_too_long_to_be_read_at_once():
    files = [path for folder in (".", "cells", "paths") for path in (ROOT / "fused_lstm" / folder).glob("*.py")]
    for path in [*files, *(ROOT / "kernels").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                many = [name for file, names in MANY.items() if str(path).endswith(file) for name in names]
                assert count <= 12 or node.name in many, f"{node.name} in {path} has {count} parameters"


def test_the_time_loop_of_a_kernel_fits_on_one_screen():
    kernels = "forward", "backward"
    for file in (*kernels, *(f"{of}_{kernel}" for of in ("latency", "throughput", "recurrent") for kernel in kernels)):
        (kernel,) = (
            node
            for node in ast.parse((ROOT / "kernels" / f"{file}.py").read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name == f"{file}_kernel"
        )
        (loop,) = (node for node in kernel.body if isinstance(node, ast.For) and ast.unparse(node.target) == "step")
        assert loop.end_lineno - loop.lineno + 1 <= 45, file
