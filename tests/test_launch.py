"""The link from the launchers to Triton: what a launch hands to the driver, without a GPU.

Triton's driver is replaced by one that notes its launches. The kernels must not be interpreted there, so the checks run
in a process of their own.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import triton

from bench.host import without_driver
from fused_lstm import LSTM
from fused_lstm.kernels import latency_forward, launch
from fused_lstm.kernels.layout import NO_STACK, LayoutTensors, Stack
from fused_lstm.kernels.plan import choose_interpreted, choose_kernel
from fused_lstm.kernels.sync import Sync
from fused_lstm.kernels.tiles import H100

T, B, H = 3, 2, 16


def launched(driver):
    """What the only launch since the last look handed over, but its metadata for profilers, made anew each time."""
    (arguments,) = driver.launched
    driver.launched.clear()
    return arguments[:6] + arguments[7:]


def same_as_triton():
    """Of every tensor, in records too, another dtype, another alignment and none: the machine code is that which Triton
    itself takes."""
    plan = choose_kernel(torch.float32, B, H, H100, False)
    form = {"DIRECTIONS": 1, "REVERSE": False, "PAIRS": True}
    made = launch.specialized(latency_forward.latency_forward_kernel, plan, plan.forward, H, H, **form)
    taken = ("input_gates", "weight_hh", "h0", "c0", "y", "c", "gates", "hn", "cn")
    given = {name: torch.empty(4 * T * B * H) for name in taken}
    records = {"layout": LayoutTensors(None, None, None, None), "stack": NO_STACK, "sync": Sync(None, None, None)}
    names = [name for name in made.kernel.arg_names if name not in made.constants]
    sizes = dict(zip(launch.SIZES, (T, B, T * B, B, 1, 0, 0, 0, T), strict=True))
    lengths, off = torch.full((B + 2,), T), torch.empty(4 * T * B * H + 1)[1:]
    variants = [{}, {"total_rows": 2**31}, {"T": 2**31 - 1}, {"stack": Stack(None, torch.empty(4))}]
    variants += [{name: off} for name in ("input_gates", "c0", "hn", "cn")]
    variants += [{"c0": torch.empty(4 * T * B * H, dtype=torch.bfloat16)}]
    variants += [{"layout": LayoutTensors(of_rows, None, None, None)} for of_rows in (lengths, lengths[1:])]
    variants += [{"sync": Sync(None, None, zeros)} for zeros in (torch.empty(4 * H), off)]
    programs, kernels = (1, 1, 1), set()
    with without_driver() as driver:
        for changed in variants:
            values = {**dict.fromkeys(names), **given, **records, **sizes, **changed}
            args = tuple(values[name] for name in names if name not in sizes)
            numbers = tuple(values[name] for name in sizes)
            by_triton = made.kernel[programs](*args, *numbers, **made.constants, **made.options)
            theirs = launched(driver)
            for _ in range(2):
                key = launch.arguments_key(args, numbers)
                made.launch(programs, args, numbers, key)
                ours = launched(driver)
                assert all(a is b or (not torch.is_tensor(a) and a == b) for a, b in zip(ours, theirs, strict=True))
            assert any(by_triton is kernel for kernel in made.compiled.values()), changed
            kernels.add(id(by_triton))
        assert {id(kernel) for kernel in made.compiled.values()} == kernels
        # Every one but that with a size that 32 bits still hold.
        assert len(kernels) == len(variants) - 1


def asks_once():
    """From the second call of a module on Triton is not asked which machine code is meant."""
    module, x = LSTM(8, H), torch.randn(T, B, 8)
    run = patch.object(triton.JITFunction, "run", autospec=True, side_effect=triton.JITFunction.run)
    with without_driver() as driver, run as asked:
        for calls in (3, 6):
            module(x)[0].sum().backward()
            with torch.no_grad():
                module(x[:1])
            assert len(driver.launched) == calls and asked.call_count == 3
        # What is kept with a plan does not leave the process with it.
        used = choose_interpreted(torch.float32, B, H, False, 1, 1, 0)
        assert launch.prepared_for(used)
        copied = pickle.loads(pickle.dumps(used))
        assert copied == used and not launch.prepared_for(copied)


@pytest.mark.parametrize("check", ["same_as_triton", "asks_once"])
def test_launch(check):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from tests import test_launch; test_launch.{check}()"]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
