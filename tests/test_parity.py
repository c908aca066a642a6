"""The module's link: LSTM through the kernels against nn.LSTM, outputs and every gradient, by the one rule."""

from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from bench.measure import precision
from fused_lstm import LSTM

from .parity import assert_parity

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
I = 5  # noqa: E741

# T, B, H and constructor options: each size and option stands in several rows, in company of the others.
CASES = {
    "one of everything": (1, 1, 1, {}),
    "one unit, many rows": (3, 17, 1, {"num_layers": 2, "bidirectional": True}),
    "no rows": (4, 0, 20, {"num_layers": 2, "bidirectional": True, "proj_size": 7}),
    "no biases": (5, 3, 20, {"bias": False}),
    "both directions": (9, 3, 20, {"bidirectional": True}),
    "three layers": (4, 17, 20, {"num_layers": 3}),
    "projection": (6, 3, 20, {"proj_size": 7}),
    "two layers, both directions, projection": (3, 3, 64, {"num_layers": 2, "bidirectional": True, "proj_size": 20}),
    "batch first": (5, 3, 20, {"batch_first": True, "num_layers": 2, "bidirectional": True}),
    "a power of two": (2, 17, 64, {}),
    "padded units": (2, 3, 100, {"bidirectional": True}),
    "several programs": (3, 17, 130, {}),
    "several programs, both directions": (2, 1, 130, {"bidirectional": True}),
}
PACKED = {
    "packed": (20, {}),
    "packed, both directions, two layers": (20, {"bidirectional": True, "num_layers": 2}),
    "packed, projection": (20, {"bidirectional": True, "proj_size": 3}),
    "packed, several programs": (130, {"bidirectional": True}),
}


def states(module, B):
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    weight = module.weight_hh_l0
    return tuple(torch.randn(count, B, size, dtype=weight.dtype, device=weight.device) for size in sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_lstm(case, dtype, device):
    T, B, H, options = CASES[case]
    module = LSTM(I, H, **options, dtype=dtype, device=device)
    shape = (B, T, I) if module.batch_first else (T, B, I)
    assert_parity(module, torch.randn(shape, dtype=dtype, device=device), states(module, B))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_initial_states(dtype, device):
    module = LSTM(I, 20, num_layers=2, dtype=dtype, device=device)
    assert_parity(module, torch.randn(4, 3, I, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PACKED)
def test_packed(case, dtype, device):
    H, options = PACKED[case]
    module = LSTM(I, H, **options, dtype=dtype, device=device)
    padded = torch.randn(4, 5, I, dtype=dtype, device=device)
    packed = pack_padded_sequence(padded, [2, 4, 1, 4, 3], enforce_sorted=False)
    assert_parity(module, packed, states(module, 5))


SWITCHED = {
    "local": (20, {}),
    "grid": (256, {}),
    "rows of odd width": (650, {}),
    "streaming": (1100, {}),
    "stack": (256, {"num_layers": 3}),
    "both directions": (256, {"bidirectional": True}),
    "projection": (2048, {"proj_size": 256}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
@pytest.mark.parametrize("case", SWITCHED)
def test_float32_follows_cudnn_own_switch(case, dtype):
    """The rule holds nn.LSTM's own error against ours, so it also tells whether we took the precision it took. The CPU
    twins of TF32 are in test_tf32.py."""
    H, options = SWITCHED[case]
    with precision(dtype):
        module = LSTM(I, H, **options, device="cuda")
        assert_parity(module, torch.randn(9, 33, I, device="cuda"), states(module, 33))


OPTIONS = [{"num_layers": 3}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 1}]
SIZES = list(product([1, 2, 5, 9], [0, 1, 3, 17], [1, 20, 64, 100, 130]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T,B,H,options", [(*sizes, OPTIONS[k % 3]) for k, sizes in enumerate(SIZES)])
def test_lstm_over_all_sizes(T, B, H, options, dtype, device):
    if options.get("proj_size", 0) >= H:
        options = {}
    module = LSTM(I, H, **options, dtype=dtype, device=device)
    assert_parity(module, torch.randn(T, B, I, dtype=dtype, device=device), states(module, B))
