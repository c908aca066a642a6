"""A CUDA device that is not there, so that the tests marked `gpu` run without one as far as they can:

    python -m pytest -p tests.faked -m "gpu and not slow" tests

What shall lie on the device lies on the CPU, the plans are a device's, the kernels are compiled for it and a launch
does nothing. So no result is right, and an assertion about one is counted and not judged: a test fails here only if
something goes wrong on its way to the comparison, or if there is none. An assertion before the first look at the
elements of a tensor, as about a plan or a shape, must hold.

A few refusals of a real device are made as there: cuDNN differentiates once, and in training mode; and nothing looks at
the device or loads a kernel while a CUDA graph is captured.
"""

import ast
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.absent import CPU, without_device
from fused_lstm import checks
from fused_lstm.kernels import plan
from fused_lstm.kernels.tiles import DEVICES
from fused_lstm.paths import torch_lstm

DEVICE = DEVICES[os.environ.get("FAKED_DEVICE", "H100")]
# Of torch and of tensors: what reads elements, for which the host waits for the device.
LOOKS = {"item", "tolist", "__bool__", "__int__", "__float__", "__contains__", "equal", "allclose", "nonzero", "numpy"}
CAPTURING = "operation not permitted when stream is capturing"


class State:
    """Of the test that runs."""

    comparisons = 0
    looked = False
    forbidden = ""  # why nothing may look at the device
    fetched: ClassVar[set[int]] = set()  # the memory of what was asked for on the CPU


def look() -> None:
    if State.forbidden:
        raise RuntimeError(State.forbidden)
    State.looked = True


@contextmanager
def forbidding(why: str):
    State.forbidden, before = why, State.forbidden
    try:
        yield
    finally:
        State.forbidden = before


# What lies on the device lies on the CPU


def placed(value: Any) -> Any:
    """An argument, the CPU if it is the device."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name in LOOKS:
            look()
        if name == "cuda":
            return args[0]
        if name == "cpu":
            State.fetched.add(args[0].data_ptr())
        args = [placed(value) for value in args]
        keywords = {key: placed(value) for key, value in (kwargs or {}).items()}
        if name == "lstm" and torch.is_grad_enabled():
            # On the device is what is not gold, in float64 on the CPU, and was not fetched; and what our own LSTM hands
            # on to torch's.
            by_us = sys._getframe(1).f_code is torch_lstm.dense_or_packed.__code__
            if by_us or not (args[0].dtype == torch.float64 or args[0].data_ptr() in State.fetched):
                return as_cudnn(function, args, by_us)
        return function(*args, **keywords)


def as_cudnn(lstm: Any, args: list[Any], by_us: bool) -> tuple[torch.Tensor, ...]:
    """torch's LSTM, differentiated as cuDNN does it. by_us: which, on the device, would ask for training mode."""
    packed = torch.is_tensor(args[1])  # then batch_sizes stand second
    data, (*sizes, hx, weights), rest = args[0], args[1 : 3 + packed], args[3 + packed :]
    data, hx, weights = Once.apply(data), list(map(Once.apply, hx)), list(map(Once.apply, weights))
    result = lstm(data, *sizes, hx, weights, *rest)
    training = by_us or rest[3]
    return result if training else Refusing.apply("only in training mode", *result)


class Refusing(torch.autograd.Function):
    """The same tensors, of which cuDNN gives no gradients."""

    @staticmethod
    def forward(ctx: Any, why: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.why = why
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"cuDNN differentiates {ctx.why}")


class Once(torch.autograd.Function):
    """The same tensor, of which cuDNN gives a gradient, and of that none."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return Refusing.apply("once", grad)[0]


class Stream:
    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def nothing(self, *args: Any) -> None:
        look()

    synchronize = wait_stream = wait_event = nothing


class Event(Stream):
    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    wait = query = Stream.nothing

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)


class Graph:
    def replay(self) -> None:
        pass

    reset = replay


def set_sync_debug_mode(mode: str | int) -> None:
    compared()  # what it raises at is what is tested
    State.forbidden = "called a synchronizing CUDA operation" if mode in ("error", 2) else ""


PROPERTIES = SimpleNamespace(
    name="faked",
    multi_processor_count=DEVICE.multiprocessors,
    shared_memory_per_block_optin=DEVICE.shared,
    major=DEVICE.capability[0],
    minor=DEVICE.capability[1],
    total_memory=80 * 2**30,
    L2_cache_size=2**20,
)
OF_TORCH_CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": lambda device: nullcontext(),
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: DEVICE.capability,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "synchronize": lambda device=None: look(),
    "set_sync_debug_mode": set_sync_debug_mode,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "_sleep": lambda cycles: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_reserved": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_stats": lambda device=None: {},
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
    "is_current_stream_capturing": lambda: State.forbidden == CAPTURING,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "current_stream": Stream,
    "default_stream": Stream,
    "stream": lambda stream: nullcontext(),
    "graph": lambda graph, **options: forbidding(CAPTURING),
}


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, placed(device))


def install() -> None:
    """From now on there is a device, which does nothing."""
    if plan.interpreted():
        raise pytest.UsageError("tests.faked compiles the kernels: not under TRITON_INTERPRET=1")
    driver = without_device(DEVICE)
    load = driver.utils.load_binary

    def load_binary(*args: Any) -> Any:
        if State.forbidden == CAPTURING:
            raise RuntimeError(f"a kernel is loaded: {CAPTURING}")
        return load(*args)

    driver.utils.load_binary = load_binary
    for name, value in OF_TORCH_CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    checks.may_look = lambda tensor: checks.DEBUG  # the tensors only seem to be at hand


# Assertions are counted


def compared() -> None:
    """Where an assertion has been evaluated."""
    State.comparisons += 1


def failed(message: object = None) -> None:
    """Where an assertion does not hold."""
    if not State.looked:
        raise AssertionError(message)


class Counting(ast.NodeTransformer):
    """Makes `if not a: failed(b)` and compared() of `assert a, b`, and two turns of the loops whose turns are alike."""

    def visit_For(self, node: ast.For | ast.comprehension) -> ast.AST:
        if ast.unparse(node.target) == "_" and ast.unparse(node.iter).startswith("range("):
            node.iter = ast.parse(f"{ast.unparse(node.iter)}[:2]", mode="eval").body
        return self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        call = lambda name, *args: ast.Expr(  # noqa: E731
            ast.Call(ast.Attribute(ast.Name("__faked__", ast.Load()), name, ast.Load()), list(args), [])
        )
        body: list[ast.stmt] = [call("failed", *filter(None, [node.msg]))]
        made = [ast.If(ast.UnaryOp(ast.Not(), node.test), body, []), call("compared")]
        return [ast.fix_missing_locations(ast.copy_location(each, node)) for each in made]


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile(Counting().visit(ast.parse(self.get_data(path))), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__faked__"] = sys.modules[__name__]
        super().exec_module(module)


class Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.startswith("tests.") else None
        if spec and spec.origin and spec.origin.endswith(".py"):
            spec.loader = Loader(name, spec.origin)
        return spec


def assert_close(*args: Any, **keywords: Any) -> None:
    look()
    compared()


install()
assert "tests.parity" not in sys.modules, "too late: its assertions are judged"
sys.meta_path.insert(0, Finder)
torch.testing.assert_close = assert_close
FOUND: dict[str, str] = {}  # by test, "" or what went wrong


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    State.comparisons, State.looked, State.forbidden, State.fetched = 0, False, "", set()
    with OnCPU():
        yield
    if not State.comparisons:
        pytest.fail("reached no comparison", pytrace=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        lines = report.longreprtext.strip().splitlines() if report.failed else [""]
        FOUND[report.nodeid] = next((line[2:].strip() for line in lines if line.startswith("E ")), lines[-1])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    wrong = {name: why for name, why in FOUND.items() if why}
    terminalreporter.section("a faked device")
    for name, why in wrong.items():
        terminalreporter.write_line(f"{name}: {why}")
    terminalreporter.write_line(f"{len(FOUND) - len(wrong)} of {len(FOUND)} tests reached a comparison")
