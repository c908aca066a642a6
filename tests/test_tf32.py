"""TF32: operands of a product are rounded, as cuBLAS and cuDNN round them, and each class asks the switch of the class
that it replaces. The tensor cores themselves are a GPU's: test_parity.py has the rule for them there."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from bench.measure import precision
from fused_lstm import LSTM, LSTMCell, operators
from fused_lstm.kernels.layout import StepWeights
from fused_lstm.kernels.matmul import operand
from fused_lstm.kernels.one_step import one_step
from fused_lstm.kernels.plan import choose_one_step

from . import parity, test_kernels


@triton.jit
def operand_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, operand(tl.load(x + at), "tf32"))


def test_operands_are_the_nearest_tf32_numbers():
    """10 bits of mantissa, halves away from zero; infinity and NaN stay what they are."""
    x = torch.cat([torch.randn(240), torch.tensor([0.0, -0.0, 1e-40, 65504.0]), 2.0 ** torch.arange(-4, 8)])
    x[::3] *= 1e-30
    x[1:100:5] = 1 + 2.0**-11  # halfway
    x[2:100:5] = -1 - 3 * 2.0**-11
    x[-3:] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x.view(torch.int32)[-4] = 0x7FFFFFFF  # the NaN of a GPU's arithmetic
    out = torch.empty_like(x)
    operand_kernel[(1,)](x, out, N=256)
    finite = x.isfinite()
    _, exponent = x[finite].double().frexp()
    exponent = exponent.clamp(min=-125)  # denormals have the last exponent's steps
    step = torch.exp2(exponent.double() - 11)
    scaled = x[finite].double() / step
    expected = scaled.sign() * (scaled.abs() + 0.5).floor() * step
    assert torch.equal(out[finite].double(), expected)
    assert torch.equal(out[-3:-1], x[-3:-1]) and out[-1].isnan() and out[-4].isnan()


@pytest.fixture
def cut(monkeypatch):
    """Fails where an operand has bits that the tensor cores would cut off; returns how many products there were."""
    products, create_dot = [], interpreter_builder.create_dot

    def exact(a, b, *rest):
        for side in (a, b):
            bits = side.data.view("int32")
            assert not (bits & 0x1FFF).any(), "an operand is cut off, and not rounded"
        products.append(1)
        return create_dot(a, b, *rest)

    monkeypatch.setattr(interpreter_builder, "create_dot", exact)
    monkeypatch.setattr(parity, "eps_of", lambda result: parity.TF32_EPS)
    return products


PLANS = {
    "local": (test_kernels.local(32), 20, None),
    "step": (test_kernels.STEP, 36, None),
    "projection": (test_kernels.PROJECTING, 36, 20),
}


@pytest.mark.parametrize("form", PLANS)
def test_no_product_cuts_its_operands(form, cut):
    plan, H, out = PLANS[form]
    test_kernels.check(replace(plan, precision="tf32"), torch.float32, 3, 5, H, "cpu", out=out)
    assert cut


def test_one_step_does_not(cut):
    plan = replace(choose_one_step(torch.float32, 3, 20, torch.device("cpu"), False), precision="tf32")
    shapes = (3, 5), (1, 3, 20), (1, 3, 20), (80, 5), (80, 20), (80,), (80,)
    x, h0, c0, *weights = test_kernels.tensors(shapes, torch.float32, "cpu")
    _, hn, cn = one_step(x, h0, c0, StepWeights(*((each,) for each in weights), None), plan=plan)
    cell = torch.nn.LSTMCell(5, 20, dtype=torch.float64)
    cell.load_state_dict(dict(zip(cell.state_dict(), weights, strict=True)))
    gold = cell(x.double(), (h0[0].double(), c0[0].double()))
    for name, ours, exact in zip("hc", (hn[0], cn[0]), gold, strict=True):
        parity.assert_close(name, ours, exact.detach(), exact.detach(), torch.float32)
    assert cut


@pytest.fixture
def asked(monkeypatch):
    """What the operators have asked plans for: full precision or not, of each call."""
    found, choose, choose_one_step = [], operators.choose, operators.choose_one_step

    def of_recurrence(dtype, B, H, device, ieee, *launch):
        found.append(ieee)
        return choose(dtype, B, H, device, ieee, *launch)

    def of_one_step(dtype, B, H, device, ieee, *launch):
        found.append(ieee)
        return choose_one_step(dtype, B, H, device, ieee, *launch)

    monkeypatch.setattr(operators, "choose", of_recurrence)
    monkeypatch.setattr(operators, "choose_one_step", of_one_step)
    return found


@contextmanager
def switched(cudnn, matmul):
    """cuDNN's switch and torch's own to TF32, or not."""
    torchs = torch.backends.cuda.matmul
    before = torchs.fp32_precision
    with precision("tf32" if cudnn else "fp32"):
        torchs.fp32_precision = "tf32" if matmul else "ieee"
        try:
            yield
        finally:
            torchs.fp32_precision = before


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_each_class_asks_the_switch_of_the_one_that_it_replaces(cls, train, asked):
    """cuDNN's of nn.LSTM, which allows TF32 unless it is told not to; torch's own of nn.LSTMCell, which does not."""
    module, x = cls(5, 20), torch.randn(*[1, 3][: 2 if cls is LSTM else 1], 5)
    for tf32 in (False, True):
        asked.clear()
        with switched(tf32, not tf32) if cls is LSTM else switched(not tf32, tf32), torch.set_grad_enabled(train):
            y = module(x)[0]
            if train:
                y.sum().backward()
        assert asked and set(asked) == {not tf32}
