"""What the recurrence promises beyond the one rule's reach: accuracy where nn.LSTM's own error would excuse ours."""

import pytest
import torch

from fused_lstm import LSTM

from .parity import assert_close, assert_parity, run, twin


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_cell_is_float32_across_the_loop(dtype, device):
    """The cell grows by a quarter of an eps a step: in 16 bits, as in nn.LSTM on a CPU, it would stay where it is."""
    eps, (T, B, H) = torch.finfo(dtype).eps, (64, 1, 4)
    module = LSTM(1, H, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        # i = o = 1/2, f = 1 and g = eps/2
        module.bias_ih_l0[H : 2 * H] = 20
        module.bias_ih_l0[2 * H : 3 * H] = eps / 2
    x = torch.zeros(T, B, 1, dtype=dtype, device=device)
    hx = (x.new_zeros(1, B, H), x.new_ones(1, B, H))
    ours = run(module, x, hx, backward=False)
    gold = run(twin(module, torch.float64), x.cpu().double(), tuple(s.cpu().double() for s in hx), backward=False)
    for name in gold:
        assert_close(name, ours[name], gold[name], gold[name], dtype)


def test_small_activations_keep_their_relative_accuracy(device):
    """tanh near 0, where the quotient of exponentials cancels."""
    module = LSTM(5, 4, device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 1e-3
    hx = tuple(1e-3 * torch.randn(1, 2, 4, device=device) for _ in range(2))
    assert_parity(module, torch.randn(3, 2, 5, device=device), hx)
