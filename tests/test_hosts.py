"""Hosts and life cycles: threads, worker processes, kills, interrupts, leaks and failed allocations."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fused_lstm import LSTM
from fused_lstm.kernels import plan

from .parity import run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_interpreter(monkeypatch):
    """torch's own LSTM serves the call, as on a CPU without the interpreter."""
    monkeypatch.setattr(plan, "interpreted", lambda: False)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Threads


def assert_threads_agree(modules, inputs, calls):
    """Two threads at once, each with its module and input, see what one thread alone sees."""

    def work(k):
        together.wait()
        return [run(modules[k], inputs[k], None) for _ in range(calls)]

    def alone(k):
        return run(modules[k], inputs[k], None)

    together = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        expected = list(pool.map(alone, range(2)))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    assert all(same(result, expected[k]) for k in range(2) for result in results[k])


@pytest.mark.parametrize("shared", [True, False], ids=["one module", "two modules"])
@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_two_threads_at_once(shared, path, request):
    if path == "torch":
        request.getfixturevalue("no_interpreter")
    first = LSTM(5, 8, num_layers=2)
    modules = (first, first if shared else LSTM(5, 8))
    inputs = (torch.randn(6, 3, 5), torch.randn(4, 2, 5))
    assert_threads_agree(modules, inputs, calls=5 if path == "kernels" else 50)


def test_kernels_run_outside_the_main_thread():
    """Backward runs in autograd's thread on a GPU, and servers call from threads of their own."""
    module, x = LSTM(5, 8), torch.randn(3, 2, 5)
    expected = run(module, x, None)
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(run, module, x, None).result()
    torch.testing.assert_close(results, expected)  # to rounding: torch's own products differ between threads


# Worker processes


class Encoded(Dataset):
    """Sequences as a module encodes them in the worker that loads them."""

    def __init__(self, module):
        self.module = module
        self.data = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.module(self.data[index])[0]


@pytest.mark.parametrize("context", [c for c in ("fork", "spawn") if c in multiprocessing.get_all_start_methods()])
def test_data_loader_workers(context):
    dataset = Encoded(LSTM(5, 8))
    expected = torch.stack([dataset[k] for k in range(4)])
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), expected)


# Kills and interrupts

LONG_RUN = """
import signal
import torch
from fused_lstm import LSTM

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
torch.set_num_threads(1)
module, x = LSTM(3, 4), torch.randn(100_000, 2, 3)
short = module(x[:2])[0]
print("running", flush=True)
try:
    module(x)
except KeyboardInterrupt:
    print("interrupted", torch.equal(module(x[:2])[0], short), all(p.grad is None for p in module.parameters()))
"""


@pytest.fixture
def long_run(tmp_path):
    """A process of its own session in the middle of a call of many minutes."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_RUN],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "running\n"
        time.sleep(0.5)
        assert process.poll() is None
        yield process
    finally:
        process.kill()


def session(leader):
    """The processes of a session that still run."""
    fields = [path.read_text().rpartition(")")[2].split() for path in stats()]
    return [f for f in fields if f[3] == str(leader) and f[0] != "Z"]


def stats():
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            path.read_text()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        yield path


def test_a_killed_process_leaves_nothing_behind(long_run, tmp_path):
    long_run.kill()
    assert long_run.wait(10) == -signal.SIGKILL
    long_run.stdout.close()
    assert not session(long_run.pid)
    assert not list(tmp_path.iterdir())
    assert not [name for name in os.listdir("/dev/shm") if f"_{long_run.pid}_" in name]


def test_an_interrupt_ends_a_long_run_and_the_module_goes_on(long_run):
    begin = time.monotonic()
    long_run.send_signal(signal.SIGINT)
    output, _ = long_run.communicate(timeout=20)
    assert output == "interrupted True True\n" and long_run.returncode == 0
    assert time.monotonic() - begin < 10


# Leaks


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors():
    gc.collect()
    return sum(1 for value in gc.get_objects() if issubclass(type(value), torch.Tensor))


def train(module, x, calls):
    for _ in range(calls):
        module.zero_grad()
        y, (hn, cn) = module(x)
        (y.sum() + hn.sum() + cn.sum()).backward()


def assert_no_leak(calls, warm, allowed):
    module, x = LSTM(5, 8), torch.randn(64, 16, 5)
    x = x[:2] if plan.interpreted() else x
    train(module, x, warm)
    tensors, memory = live_tensors(), resident()
    train(module, x, calls)
    assert live_tensors() <= tensors  # fewer: garbage of what ran before
    assert resident() - memory < allowed


def test_no_leak_over_many_calls(no_interpreter):
    # One call keeps some 600 KB for backward: 1,000 that kept theirs would be far past the bound.
    assert_no_leak(calls=1000, warm=50, allowed=32 * 2**20)


def test_no_leak_in_the_interpreter():
    assert_no_leak(calls=30, warm=3, allowed=32 * 2**20)


# Failed allocations


@pytest.fixture
def fail(monkeypatch):
    """Lets the n-th allocation through `owner.name` raise out-of-memory, once."""

    def install(owner, name, n):
        original, calls = getattr(owner, name), []

        def allocate(*args, **kwargs):
            calls.append(name)
            if len(calls) == n:
                raise torch.OutOfMemoryError("out of memory")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, allocate)
        return calls

    return install


@pytest.mark.parametrize(
    "owner,name,n", [(torch.Tensor, "new_empty", 1), (torch.Tensor, "new_empty", 2), (torch.Tensor, "new_empty", 4)]
)
def test_out_of_memory_leaves_the_module_usable(owner, name, n, fail):
    """In forward's outputs, in what it saves for backward, and in backward's: the step is lost, and only it."""
    module, x = LSTM(5, 8), torch.randn(3, 2, 5)
    expected = run(module, x, None)
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    train(module, x, 1)
    gradients = [p.grad.clone() for p in module.parameters()]

    calls = fail(owner, name, n)
    with pytest.raises(torch.OutOfMemoryError):
        module(x)[0].sum().backward()
    assert len(calls) >= n
    assert same(module.state_dict(), weights)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
    assert same(run(module, x, None), expected)


def test_an_optimizer_step_after_a_lost_one(fail):
    """A training loop that skips a batch that did not fit ends where one without that batch does."""
    module, x = LSTM(5, 8), torch.randn(3, 2, 5)
    other = LSTM(5, 8)
    other.load_state_dict(module.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (module, other)]

    def step(module, optimizer):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x)[0], torch.ones(3, 2, 8)).backward()
        optimizer.step()

    fail(torch.Tensor, "new_empty", 1)
    with pytest.raises(torch.OutOfMemoryError):
        step(module, optimizers[0])
    for m, optimizer in zip((module, other), optimizers, strict=True):
        step(m, optimizer)
    assert same(module.state_dict(), other.state_dict())
