"""The wheel: what a user installs, built from a copy of the tree, so that nothing is left in it."""

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
    (info,) = {name.split("/")[0] for name in names} - {"fused_lstm"}
    assert info.endswith(".dist-info")
    assert {name for name in names if name.startswith("fused_lstm/")} == {*code, "fused_lstm/py.typed"}
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
