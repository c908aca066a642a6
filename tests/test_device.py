"""What only a device can show: real concurrency; `make gpu PART=device`. Not under FUSED_LSTM_DEBUG=1, which waits for
the device at each launch.

Their CPU twins: the schedule explorer (test_schedules.py) for the flags, test_numbers.py for repeats and long runs.
"""

import copy

import pytest
import torch

from fused_lstm import LSTM

from .parity import assert_close, twin

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def module_and_input(dtype, T=64, B=16, H=512):
    return LSTM(64, H, dtype=dtype, device="cuda"), torch.randn(T, B, 64, dtype=dtype, device="cuda")


def cotangents_of(module, x):
    """Of y, hn and cn, drawn once: on the host they would take longer than what is repeated."""
    with torch.no_grad():
        y, hidden = module(x)
    return [torch.randn_like(output) for output in (y, *hidden)]


def both_passes(module, x, cotangents):
    """Every output and gradient."""
    leaf = x.detach().requires_grad_()
    y, hidden = module(leaf)
    outputs = [y, *hidden]
    return outputs + list(torch.autograd.grad(outputs, [leaf, *module.parameters()], cotangents))


def same_bits(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [100, 512, 1024])
def test_a_hundred_repeats_are_the_same_bits(dtype, H):
    module, x = module_and_input(dtype, H=H)
    cotangents = cotangents_of(module, x)
    first = both_passes(module, x, cotangents)
    assert all(same_bits(first, both_passes(module, x, cotangents)) for _ in range(100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_streams_at_once(dtype):
    """Both grids want most of the device: they must take turns, not wait for each other's programs."""
    pairs = [module_and_input(dtype, H=H) for H in (512, 1024)]
    calls = [(module, x, cotangents_of(module, x)) for module, x in pairs]
    alone = [both_passes(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(50):
        together = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                together.append(both_passes(*call))
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_a_busy_stream(dtype):
    module, x = module_and_input(dtype, H=1024)
    call = module, x, cotangents_of(module, x)
    alone = both_passes(*call)
    busy, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(busy):
            for _ in range(4):
                matrix @ matrix
        assert same_bits(alone, both_passes(*call))
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_thousand_steps(dtype):
    """By the rule; nn.LSTM runs in two halves, because cuDNN takes no more than 65,535 steps."""
    T, B, H = 100_000, 4, 256
    module, x = module_and_input(dtype, T, B, H)

    def halves(lstm, x):
        first, state = lstm(x[: T // 2])
        second, (hn, cn) = lstm(x[T // 2 :], state)
        return {"y": torch.cat([first, second]), "hn": hn, "cn": cn}

    with torch.no_grad():
        y, (hn, cn) = module(x)
        theirs = halves(twin(module), x)
        gold = halves(twin(module).double(), x.double())
    for name, ours in {"y": y, "hn": hn, "cn": cn}.items():
        assert_close(name, ours, theirs[name].cpu(), gold[name].cpu(), dtype)


def test_backward_in_eval_mode():
    module, x = module_and_input(torch.float32)
    cotangents = cotangents_of(module, x)
    assert same_bits(both_passes(module, x, cotangents), both_passes(module.eval(), x, cotangents))


def test_more_than_65535_steps_and_every_tensor_on_its_own_device():
    module = LSTM(3, 20, device="cuda")
    y, _ = module(torch.randn(70_000, 1, 3, device="cuda"))
    assert y.device == module.weight_hh_l0.device and y.isfinite().all()


def test_lengths_and_resets_do_not_wait_for_the_device():
    """Their CPU twin in test_sequences.py uses the meta device."""
    module, x = module_and_input(torch.bfloat16, T=16)
    lengths = torch.randint(0, 17, (16,), device="cuda")
    reset = torch.rand(16, 16, device="cuda") < 0.1
    module(x, lengths=lengths, reset=reset)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, _ = module(x, lengths=lengths, reset=reset)
        y.sum().backward()
        with torch.no_grad():
            module(x[:1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("keywords", [{}, {"lengths": [64, 9, 0, 30] * 4}], ids=["dense", "lengths"])
def test_a_captured_forward_and_a_captured_training_step(keywords):
    """As CUDA graphs, on new data each replay. Their CPU twin in test_compile.py refuses every look at the data."""
    module, x = module_and_input(torch.bfloat16)
    keywords = {name: torch.tensor(value, device="cuda") for name, value in keywords.items()}
    eager = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (module, eager)]

    def step(module, optimizer):
        optimizer.zero_grad(set_to_none=False)
        y, (hn, cn) = module(x, **keywords)
        loss = y.square().mean() + hn.sum() + cn.sum()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):  # compiles, and gives every parameter its gradient
        step(module, optimizers[0])
        step(eager, optimizers[1])
    with torch.no_grad():  # a call without gradients has kernels of its own, and a capture can load none
        module(x, **keywords)
    torch.cuda.synchronize()
    training, inference = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(training):
        loss = step(module, optimizers[0])
    with torch.no_grad(), torch.cuda.graph(inference):
        y, _ = module(x, **keywords)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        training.replay()
        assert torch.equal(loss, step(eager, optimizers[1]))
        inference.replay()
        with torch.no_grad():
            assert torch.equal(y, eager(x, **keywords)[0])


def test_a_captured_step_of_inference():
    module, x = module_and_input(torch.bfloat16, T=1)
    hx = tuple(torch.zeros(1, 16, 512, dtype=x.dtype, device="cuda") for _ in range(2))
    with torch.no_grad():
        module(x, hx)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = module(x, hx)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, module(x, hx)[0])
