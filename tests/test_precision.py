"""Modules of each dtype, autocast as nn.LSTM has it, and training with a scaled loss."""

import copy
import itertools

import pytest
import torch

from fused_lstm import LSTM

from .parity import assert_parity, bound, error, run, twin

T, B, I, H = 5, 3, 4, 20  # noqa: E741
STACK = {"num_layers": 2, "bidirectional": True, "proj_size": 3}


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
def test_a_converted_module(convert):
    module = getattr(LSTM(I, H, **STACK), convert)()
    assert_parity(module, torch.randn(T, B, I, dtype=module.weight_ih_l0.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, STACK], ids=["plain", "stack"])
@pytest.mark.filterwarnings("ignore:TF32")
def test_every_gradient_under_autocast(dtype, options):
    module, x = LSTM(I, H, **options), torch.randn(T, B, I)
    with torch.autocast("cpu", dtype):
        ours = run(module, x, None)
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN has no float16 there
            theirs = run(twin(module), x, None)
    gold = run(twin(module, torch.float64), x.double(), None)
    for name in gold:
        assert ours[name].dtype == (torch.float32 if name.startswith("d") else dtype), name
        assert error(ours[name], gold[name]) <= bound(theirs[name], gold[name], dtype), name


def test_autocast_can_be_switched_off_within():
    module, x = LSTM(I, H), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(module(x)[0], module(x.float())[0]) and module(x)[0].dtype == torch.float32


def scaled_steps(module, x, dtype, count, scale):
    """Trains under autocast; returns the scale before and after each step."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    scales = [scale]
    for _ in range(count):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
            y, (hn, cn) = module(x)
        scaler.scale(y.square().sum() + hn.sum() + cn.sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.filterwarnings("ignore:TF32", "ignore:invalid value")
def test_grad_scaler_skips_and_takes_the_same_steps():
    module, x = LSTM(I, H, num_layers=2), torch.randn(T, B, I)
    theirs, gold, before = twin(module), twin(module, torch.float64), copy.deepcopy(module.state_dict())
    scales = scaled_steps(module, x, torch.float16, 6, 2.0**15)
    with torch.backends.mkldnn.flags(enabled=False):
        assert scales == scaled_steps(theirs, x, torch.float16, 6, 2.0**15)
    skipped = sum(later < earlier for earlier, later in itertools.pairwise(scales))
    assert 0 < skipped < 4, "the gradients of the first steps, and of no others, overflow"
    scaled_steps(gold, x.double(), torch.float64, 6 - skipped, 1.0)
    for name, ours in module.state_dict().items():
        exact, other = gold.state_dict()[name], theirs.state_dict()[name]
        assert not torch.equal(ours, before[name])
        assert error(ours, exact) <= bound(other, exact, torch.float16), name
