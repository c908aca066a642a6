"""Sets up Triton's interpreter where there is no GPU, and poisons uninitialised memory."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from bench.measure import precision
from fused_lstm import route, stand_in
from fused_lstm.kernels import findings
from fused_lstm.kernels.plan import choose, choose_one_step
from fused_lstm.route import known_route

torch.set_num_threads(1)  # one worker a core: more threads would only wait for each other


@pytest.fixture(autouse=True)
def poison():
    """torch fills fresh memory with NaN: an element that a kernel leaves out fails every comparison."""
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """The compiler keeps eight graphs of a function and then refuses: of one test alone."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_routes_of_other_tests():
    """Routes and plans depend on nothing that changes as a process runs, but on much that tests replace."""
    caches = known_route, choose, choose_one_step
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def no_refusals(request, monkeypatch):
    """Where a kernel is refused, or none runs, others give the same numbers: no test may pass by that unless it is
    marked `stands_in`."""
    if not request.node.get_closest_marker("stands_in"):
        for name in ("forward", "backward", "one_step", "dropout", "scan"):
            monkeypatch.setattr(stand_in, name, lambda *args, **options: pytest.fail("no kernel ran"))
    yield
    refused = findings.refused_kernels()
    findings.forget()
    assert not refused


@pytest.fixture(autouse=True)
def kernels_of_large_batches(monkeypatch):
    """On a GPU these are tested too, whatever the model says of cuDNN."""
    if torch.cuda.is_available():
        monkeypatch.setattr(route, "LARGE", float("inf"))


@pytest.fixture(autouse=True)
def full_precision():
    """float32 is float32, on CUDA too; what tests TF32 asks for it."""
    with precision("fp32"):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The kernels' device: the CPU in Triton's interpreter, and its twin on a GPU."""
    return request.param
