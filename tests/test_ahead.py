"""Kernels that are compiled ahead, and the faked device on which the tests marked `gpu` reach their comparisons.

Both compile, so they run in processes of their own: in this one the kernels are interpreted.
"""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from bench import ahead, store
from fused_lstm.kernels.tiles import H100

FILL = """
import sys
from pathlib import Path
from bench import ahead
from bench.absent import without_device
cache, archive, do = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if do == "unpack":
    print(ahead.unpack(archive, cache))
before = ahead.compiled(cache)
without_device()
ahead.module_of({"input_size": 4, "hidden_size": 8}, 2, "fp16", False)
print(*sorted(path.name.partition(".")[0] for path, _ in ahead.compiled(cache) - before))
if do == "pack":
    ahead.pack(cache, archive, ahead.H100)
"""


def python(root, *arguments, **variables):
    environment = os.environ | {"TRITON_INTERPRET": "0", **variables}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr[-2000:]


def filled(root, cache, archive, do):
    status, out, errors = python(root, "-c", FILL, cache, archive, do, TRITON_CACHE_DIR=str(cache))
    assert status == 0, errors
    return out.splitlines()


@pytest.fixture
def moved(tmp_path):
    """The package, its measurements and the tests' own modules in another folder."""
    root = tmp_path / "moved"
    for name in ("bench", "fused_lstm", "kernels"):
        unwanted = shutil.ignore_patterns("results", "__pycache__", "kernels")
        shutil.copytree(store.ROOT / name, root / name, ignore=unwanted)
    (root / "fused_lstm/kernels").symlink_to("../kernels")
    (root / "tests").mkdir()
    for name in ("__init__.py", "conftest.py", "faked.py", "parity.py"):
        shutil.copy(store.ROOT / "tests" / name, root / "tests")
    shutil.copy(store.ROOT / "pyproject.toml", root)
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """One with the kernels of a small size."""
    folder = tmp_path_factory.mktemp("archive")
    (compiled,) = filled(store.ROOT, folder / "cache", folder / "small.tar.xz", "pack")
    assert {"latency_forward_kernel", "latency_backward_kernel", "one_step_kernel"} <= set(compiled.split())
    shutil.rmtree(folder / "cache")
    return folder / "small.tar.xz"


def test_in_another_tree_and_another_cache_only_a_changed_kernel_misses(archive, moved, tmp_path):
    path = moved / "kernels/one_step.py"
    text = path.read_text()
    assert text.count("batch < B, states") == 1
    path.write_text(text.replace("batch < B, states", "batch <= B - 1, states"))
    said, compiled = filled(moved, tmp_path / "cache", archive, "unpack")
    assert "some are compiled anew: not the same the kernels' source" in said
    assert compiled == "one_step_kernel"


@pytest.mark.parametrize("name", ahead.manifest(H100.capability))
def test_what_differs_is_said(name, archive, tmp_path, monkeypatch):
    own = ahead.manifest(H100.capability)
    assert ahead.unpack(archive, tmp_path).endswith("kernels compiled ahead, as this machine's Triton would")
    monkeypatch.setattr(ahead, "manifest", lambda capability: own | {name: "another"})
    said = ahead.unpack(archive, tmp_path)
    assert f"not the same {name} (" in said and "here another" in said
    assert said.count("here") == 2


def test_a_bad_archive_is_said(archive, tmp_path):
    whole, path = archive.read_bytes(), tmp_path / "bad.tar.xz"
    assert "there is no bad.tar.xz" in ahead.unpack(path, tmp_path)
    for bad in (b"", b"none", whole[: len(whole) // 2]):
        path.write_bytes(bad)
        assert "is of no use" in ahead.unpack(path, tmp_path), len(bad)
    with tarfile.open(path, "w:xz"):
        pass
    assert "is of no use" in ahead.unpack(path, tmp_path)


def test_an_archive_writes_into_the_cache_alone(tmp_path):
    path = tmp_path / "bad.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    ahead.unpack(path, tmp_path / "deep/cache")
    assert not (tmp_path / "deep/outside").exists()


PLANTED = """
import pytest
import torch
from fused_lstm import LSTM
from .parity import assert_parity

pytestmark = pytest.mark.gpu

def module():
    return LSTM(4, 8, dtype=torch.float16, device="cuda"), torch.randn(2, 2, 4, dtype=torch.float16, device="cuda")

def test_a_comparison():
    assert_parity(*module())

def test_a_wrong_plan():
    assert module()[0].plan(module()[1]).mode == "grid"
    assert_parity(*module())

def test_an_error():
    assert_parity(*module(), states=None)

def test_none():
    module()

def test_eval_mode_of_cudnn():
    lstm, x = torch.nn.LSTM(4, 8, device="cuda").eval(), torch.randn(2, 2, 4, device="cuda")
    lstm(x)[0].sum().backward()
    assert lstm.weight_hh_l0.grad.isfinite().all()

def test_two_derivatives_by_cudnn():
    lstm, x = LSTM(4, 8, dtype=torch.float64, device="cuda"), torch.randn(2, 2, 4, device="cuda").double()
    (dx,) = torch.autograd.grad(lstm(x.requires_grad_())[0].square().sum(), x, create_graph=True)
    dx.sum().backward()
    assert True

def test_a_look_within_a_capture():
    lstm, x = module()
    lstm(x)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        lstm(x)[0].sum().item()
    assert True

def test_a_load_within_a_capture():
    lstm, x = module()
    with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        lstm(x[:1])
    assert True
"""


def test_a_faked_device(moved, archive, tmp_path):
    """A right test reaches its comparison; of what goes wrong before, each is said by its name."""
    (moved / "tests/test_planted.py").write_text(PLANTED)
    cache = tmp_path / "cache"
    ahead.unpack(archive, cache)
    command = ["-m", "pytest", "-p", "tests.faked", "-m", "gpu", "-q", "-rN", "-p", "no:cacheprovider", "tests"]
    status, out, errors = python(moved, *command, TRITON_CACHE_DIR=str(cache))
    assert status == 1, errors
    found = dict(line.split(": ", 1) for line in out.splitlines() if line.startswith("tests/test_planted.py::"))
    assert {name.partition("::test_")[2]: why.partition(":")[0] for name, why in found.items()} == {
        "a_wrong_plan": "AssertionError",
        "an_error": "TypeError",
        "none": "reached no comparison",
        "eval_mode_of_cudnn": "RuntimeError",
        "two_derivatives_by_cudnn": "RuntimeError",
        "a_look_within_a_capture": "RuntimeError",
        "a_load_within_a_capture": "RuntimeError",
    }, out
    assert "1 of 8 tests reached a comparison" in out
