"""The kernels' link: every launcher, in every form, against reference.py."""

import pytest
import torch

from fused_lstm import reference
from fused_lstm.autograd import Sequence
from fused_lstm.kernels.backward import backward
from fused_lstm.kernels.forward import forward
from fused_lstm.kernels.plan import Plan, Tiles, choose

from .parity import assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTHS = (5, 4, 4, 2, 1)


def local(H):
    tiles = Tiles(batch=16, units=H, chunk=H, warps=4)
    return Plan("local", tiles, tiles, 0, "ieee", "")


# Tiles that divide neither B nor H of the cases below, and several programs in each direction.
STEP = Plan("step", Tiles(16, 16, 32, 4), Tiles(16, 16, 16, 4), 0, "ieee", "")


def tensors(shapes, dtype, device):
    return [torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype) for shape in shapes]


def check(plan, dtype, T, B, H, device, reverse=False, batch_sizes=None):
    """Both passes of one recurrence, by the rule, with the reference in `dtype` as the other side's error."""
    if batch_sizes is None:
        packing, lead = None, (T, B)
    else:
        packing, lead = Sequence.packed(batch_sizes, torch.device(device)).packing, (int(batch_sizes.sum()),)
    shapes = [(*lead, 4 * H), (4 * H, H), (B, H), (B, H), (*lead, H), (B, H), (B, H)]
    input_gates, weight_hh, h0, c0, dy, dhn, dcn = tensors(shapes, dtype, device)
    weight_hh /= H**0.5
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"reverse": reverse, "packing": packing}

    ours = forward(input_gates, weight_hh, h0, c0, plan=plan, **options)
    theirs = reference.forward(input_gates, weight_hh, h0, c0, **options)
    gold = reference.forward(*(v.double() for v in (input_gates, weight_hh, h0, c0)), **options)
    for name, *results in zip(("y", "cn", "c", "gates"), ours, theirs, gold, strict=True):
        assert_close(name, results[0].to(dtype), *(v.cpu() for v in results[1:]), dtype)

    _, _, c, gates = ours
    saved = (c0.to(accumulator), c, gates)
    ours = backward(dy, dhn, dcn, weight_hh, *saved, plan=plan, **options)
    theirs = reference.backward(*(v.to(dtype) for v in (dy, dhn, dcn, weight_hh, *saved)), **options)
    gold = reference.backward(*(v.double() for v in (dy, dhn, dcn, weight_hh, *saved)), **options)
    for name, *results in zip(("dgates", "dc0"), ours, theirs, gold, strict=True):
        assert_close(name, results[0].to(dtype), *(v.cpu() for v in results[1:]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_local(dtype, reverse, device):
    check(local(32), dtype, 4, 3, 20, device, reverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_step_with_many_programs(dtype, reverse, device):
    check(STEP, dtype, 3, 17, 36, device, reverse)


@pytest.mark.parametrize("plan", [local(16), STEP], ids=["local", "step"])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed(plan, reverse, device):
    batch_sizes = torch.tensor([sum(length > t for length in LENGTHS) for t in range(max(LENGTHS))])
    check(plan, torch.float32, None, len(LENGTHS), 16 if plan.mode == "local" else 20, device, reverse, batch_sizes)


@pytest.mark.parametrize("T,B,H", [(1, 1, 1), (1, 17, 3), (9, 1, 16)])
def test_awkward_shapes(T, B, H, device):
    check(local(16), torch.float32, T, B, H, device)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [130, 256, 512, 650, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_grid(dtype, H):
    """The cooperative form; its CPU twins are test_step_with_many_programs and the compiled plans."""
    plan = choose(dtype, 33, H, torch.device("cuda"), ieee=True)
    assert plan.mode in ("grid", "step")
    check(plan, dtype, 20, 33, H, "cuda")


def test_nothing_is_saved_on_request():
    input_gates, weight_hh, h0, c0 = tensors([(2, 3, 32), (32, 8), (3, 8), (3, 8)], torch.float32, "cpu")
    kept = forward(input_gates, weight_hh, h0, c0, plan=local(16))
    y, cn, c, gates = forward(input_gates, weight_hh, h0, c0, plan=local(16), save=False)
    assert c is None and gates is None
    assert torch.equal(y, kept[0]) and torch.equal(cn, kept[1])


def test_inputs_are_left_alone():
    inputs = tensors([(2, 3, 32), (32, 8), (3, 8), (3, 8)], torch.float32, "cpu")
    copies = [v.clone() for v in inputs]
    forward(*inputs, plan=local(16))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
