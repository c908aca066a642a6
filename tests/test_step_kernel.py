"""The kernel of one step: which form of it a call takes; and under every kind of schedule no layer takes what is not
there, and planted faults are found."""

import importlib

import pytest
import torch
from torch import nn

from fused_lstm import LSTM
from fused_lstm.kernels import one_step as one_step_module
from fused_lstm.kernels.layout import StepWeights
from fused_lstm.kernels.plan import choose_one_step
from fused_lstm.weights import weights_of

from .explorer import SCHEDULES, Broken, explore
from .test_recurrent_kernels import planted


def three_steps(schedule, seed, sizes=(3, 2, 0, 20, 3), module=one_step_module, strict=False):
    """One step after another under a schedule, each with the state that the one before has left."""
    L, D, P, H, B = sizes
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    ours = LSTM(4, H, L, bidirectional=D == 2, proj_size=P, dtype=torch.float64)
    hx = torch.randn(L * D, B, P or H, **shape), torch.randn(L * D, B, H, **shape)
    weights = weights_of([*ours.parameters()], True, L * D)
    plan = choose_one_step(torch.float64, B, H, torch.device("cpu"), True, D, L, P)
    theirs = nn.LSTM(4, H, L, bidirectional=D == 2, proj_size=P, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad(), explore(schedule, seed, strict) as explorer:
        for _ in range(3):
            x = torch.randn(B, 4, **shape)
            y, *after = module.one_step(x, *hx, StepWeights.of(weights), plan=plan)
            gold = theirs(x[None], hx)
            for ours_of, theirs_of in zip((y[None], *after), (gold[0], *gold[1]), strict=True):
                torch.testing.assert_close(ours_of, theirs_of, rtol=0, atol=1e-12)
            hx = tuple(after)
    return explorer.switches


@pytest.mark.parametrize("sizes", [(3, 2, 0, 20, 3), (2, 1, 5, 20, 17), (4, 1, 0, 9, 2)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_breaks_a_stack(schedule, sizes):
    assert three_steps(schedule, 0, sizes, strict=True) > 0


FAULTS = {
    "not awaited": ("step_products", 'sync, WHOLE, "await"', 'sync, WHOLE, "load"'),
    "the slot of another layer": ("one_step", "slot = NET.first_output + at.layer - 1", "slot = NET.first_output"),
    "the launch after finds what this one has left": (
        "one_step",
        "tl.store(exchange.next + to",
        "tl.store(exchange.own + to",
    ),
    "the halves take no turns": ("exchange", "self.turn = 1 - self.turn", "self.turn = self.turn"),
    "a direction is left out": (
        "one_step",
        "columns = at.direction * NET.O + features",
        "columns = 0 * NET.O + features",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_the_exchange_of_a_stack_is_found(fault, tmp_path, monkeypatch):
    name, old, new = FAULTS[fault]
    made = planted(importlib.import_module(f"fused_lstm.kernels.{name}"), old, new, tmp_path)
    if name == "step_products":
        monkeypatch.setattr(one_step_module, "awaited_product", made.awaited_product)
    elif name == "exchange":
        monkeypatch.setattr(one_step_module, "exchange_for", made.exchange_for)
    with pytest.raises((AssertionError, Broken)):
        for seed in range(3):
            three_steps("uniform", seed, module=made if name == "one_step" else one_step_module)


@pytest.fixture
def wide(monkeypatch):
    """Of each launch, whether its kernel loads 16 bytes at a time."""
    found, original = [], one_step_module.Specialized.launch

    def launch(self, *args):
        found.append(self.constants["NET"].wide)
        original(self, *args)

    monkeypatch.setattr(one_step_module.Specialized, "launch", launch)
    return found


@pytest.mark.parametrize(("H", "features"), [(16, 8), (20, 8), (18, 8), (16, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_byte_loads_are_for_rows_that_they_divide(H, features, dtype, wide):
    with torch.no_grad():
        LSTM(features, H, 2, dtype=dtype)(torch.randn(1, 3, features).to(dtype))
    assert wide == [(H, features) == (16, 8) or (H, features, dtype) == (20, 8, torch.float32)]


def test_16_byte_loads_are_for_aligned_tensors(wide):
    lstm, x = LSTM(8, 16), torch.randn(1, 3, 8)
    with torch.no_grad():
        lstm(x)
        lstm(torch.randn(1 + x.numel())[1:].view(x.shape))
        lstm.weight_hh_l0.set_(torch.randn(1 + 64 * 16)[1:].view(64, 16))
        lstm(x)
    assert wide == [True, False, False]


@pytest.mark.parametrize(("B", "options", "launches"), [(64, {}, 1), (65, {}, 3), (64, {"bidirectional": True}, 1)])
def test_how_many_launches_a_stack_has(B, options, launches, wide):
    with torch.no_grad():
        LSTM(8, 16, 3, **options)(torch.randn(1, B, 8))
    assert len(wide) == launches
