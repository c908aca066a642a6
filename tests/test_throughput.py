"""Large batches: row tiles in turn through the public surface, and where the plan takes them."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fused_lstm import LSTM, operators
from fused_lstm.kernels.choice import choose_kernel, why_cudnn
from fused_lstm.kernels.plan import choose
from fused_lstm.kernels.planned import Plan
from fused_lstm.kernels.tiles import H100, Problem, Tiles, in_turn

from .parity import assert_parity

# T, B, H and options of the module: no B is a multiple of anything that the tiles have.
CASES = {
    "many rows": (1, 4097, 200, {}),
    "both directions, packed": (2, 1000, 232, {"bidirectional": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_lstm(case, device):
    T, B, H, options = CASES[case]
    module = LSTM(5, H, **options, dtype=torch.float16, device=device)
    plan = choose(torch.float16, B, H, torch.device(device), False, 2 if module.bidirectional else 1)
    assert plan.forward.in_turn and plan.backward.in_turn
    x = torch.randn((B, T, 5) if module.batch_first else (T, B, 5), dtype=torch.float16, device=device)
    if "packed" in case:
        x = pack_padded_sequence(x, torch.arange(B) % T + 1, enforce_sorted=False)
    assert_parity(module, x)


def test_tiles_are_dealt_evenly():
    """All of a launch's groups have about as many, and both directions run at once where they fit."""
    assert in_turn(22, 1, 64) == (1, 22)  # three each, the last one has two
    assert in_turn(22, 1, 32) == (1, 16)  # two each
    assert in_turn(22, 2, 32) == (2, 11)
    assert in_turn(1, 2, 5) == (1, 1)  # one direction after the other
    assert in_turn(132, 1, 3) == (1, 3)


# By H, for B of the first line, in bf16 on an H100: "." the kernels of fewer rows, "+" row tiles in turn, "f" these in
# the forward pass alone; after "c" cuDNN's products are estimated to be faster, both ways.
CHOICES = """
H      16   128   256   512  1024  2048  4096  8192
64      .     .     .     .     .     .     .     .
128     .     .     .     .     .     .     .     .
256     .     .     .     .    c.    c+     +     +
384     .     .    c.    c.    c+    c+     +     +
512     .     .    c.    c.    c+    c+     +     +
768     .    c.    c.    c+    c+    c+    c+    c+
1024    .    c.    cf    c+    c+    c+    c+    c+
2048   c.    c+    c+    c+    c+    c+    c+    c+
"""
SIGNS = {(False, False): ".", (True, True): "+", (True, False): "f", (False, True): "b"}


def test_choice_of_the_model():
    """A change of the model, or of the tiles that there are, is to be seen here."""
    (_, *batches), *lines = (line.split() for line in CHOICES.strip().splitlines())
    for H, *expected in lines:
        problem, found = Problem("bf16", int(H)), []
        for B in map(int, batches):
            plan = choose_kernel(torch.bfloat16, B, int(H), H100, False)
            slower = why_cudnn(plan, problem, B, H100, True)
            found.append("c" * bool(slower) + SIGNS[plan.forward.in_turn, plan.backward.in_turn])
        assert found == expected, H


def under_vmap(module):
    weights = dict(module.named_parameters())
    return lambda x: torch.func.vmap(lambda one: torch.func.functional_call(module, weights, one)[0])(x[None])[0]


def in_a_graph(module):
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    return lambda x: compiled(x)[0]


@pytest.fixture
def asked(monkeypatch):
    """The sizes for which a plan is asked; it has two tiles of large batches in turn."""
    tiles, asked = Tiles(16, 32, 32, 1, part=16), []
    plan = Plan("step", tiles, tiles, 0, "ieee", "")
    monkeypatch.setattr(operators, "choose", lambda *sizes: asked.append(sizes) or plan)
    return asked


@pytest.mark.parametrize("form", [under_vmap, in_a_graph])
def test_within_torch(form, asked):
    """An operator asks for the plan with the sizes of a call, and writes no gates over what it was given."""
    module = LSTM(5, 20)
    x = torch.randn(3, 35, 5, requires_grad=True)
    results = [
        torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (form(module)(x), module(x)[0])
    ]
    torch.testing.assert_close(*results)
    assert {sizes[1] for sizes in asked} == {35} and len(asked) == 4


def test_recompute_of_packed_rows(asked):
    module = LSTM(5, 20, bidirectional=True)
    module.recompute = 1
    assert_parity(module, pack_padded_sequence(torch.randn(3, 35, 5), torch.arange(35) % 3 + 1, enforce_sorted=False))
    assert len(asked) == 2 * 3 * 2  # forward and backward of each direction and chunk
