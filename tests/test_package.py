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
    assert required == {"torch>=2.11", "triton>=3.6"}


def test_imports_without_the_tree(wheel, tmp_path, monkeypatch):
    wheel.extractall(tmp_path / "unpacked")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "unpacked"))
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "unpacked")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
