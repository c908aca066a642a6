"""The one rule by which every number is checked against nn.LSTM.

Gold is nn.LSTM in float64 with the same (rounded) weights and inputs. In the dtype under test our largest error may be
at most twice nn.LSTM's own, plus 4 eps of that dtype times the largest gold value; where float32 is multiplied as TF32,
eps is TF32's. float64 has no better gold: there the bound is 1e-11 of the largest value. Every output and every
gradient is held to it, with a non-zero gradient on each of y, hn and cn.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_lstm

TF32_EPS = 2.0**-10


def eps_of(result: Tensor) -> float:
    """That of the numbers which a product multiplies on the result's device: of its dtype, or TF32's."""
    tf32 = result.dtype == torch.float32 and result.is_cuda and torch.backends.cudnn.rnn.fp32_precision == "tf32"
    return TF32_EPS if tf32 else torch.finfo(result.dtype).eps


def bound(theirs: Tensor | None, gold: Tensor, dtype: torch.dtype, eps: float | None = None) -> float:
    """The largest error that a result of `dtype` may have; `theirs` is nn.LSTM's result in that dtype. eps: the dtype's
    own if None."""
    largest = gold.abs().max().item() if gold.numel() else 0.0
    if dtype == torch.float64:
        return 1e-11 * largest
    return 2 * error(theirs, gold) + 4 * (torch.finfo(dtype).eps if eps is None else eps) * largest


def error(result: Tensor, gold: Tensor) -> float:
    difference = (result.detach().cpu().double() - gold).abs()
    # NaN must fail: max() alone would pass it on to a comparison that is false either way.
    return difference.nan_to_num(nan=torch.inf).max().item() if gold.numel() else 0.0


def assert_close(name: str, ours: Tensor, theirs: Tensor | None, gold: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == gold.shape, f"{name}: shape {tuple(ours.shape)}, nn.LSTM's is {tuple(gold.shape)}"
    assert ours.dtype == dtype, f"{name}: dtype {ours.dtype}, expected {dtype}"
    allowed, found = bound(theirs, gold, dtype, eps_of(ours)), error(ours, gold)
    assert found <= allowed, f"{name}: error {found:.3e}, the rule allows {allowed:.3e}"


# The widest dtype that the kernels have on a device.
WIDEST = {"cpu": torch.float64, "cuda": torch.float32}


STATES = ("h", "c", "state 2 ", "state 3 ")


def run(
    module: nn.Module, x: Tensor | PackedSequence, hx: tuple[Tensor, ...] | None, *, backward: bool = True
) -> dict[str, Tensor]:
    """Every output and gradient of module(x, hx), by name; the cotangents of y, hn, cn and what further states hx has
    come from a fixed seed."""
    packed = isinstance(x, PackedSequence)
    data = (x.data if packed else x).detach().requires_grad_(backward)
    inputs = {"x": data}
    if hx is not None:
        hx = tuple(s.detach().requires_grad_(backward) for s in hx)
        inputs |= {f"{name}0": state for name, state in zip(STATES, hx, strict=False)}
    y, ends = module(x._replace(data=data) if packed else data, hx)
    outputs = {"y": y.data if packed else y} | {f"{name}n": end for name, end in zip(STATES, ends, strict=False)}
    results = {name: value.detach() for name, value in outputs.items()}
    if backward:
        inputs |= dict(module.named_parameters())
        generator = torch.Generator().manual_seed(7)
        cotangents = [
            torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype).to(v.device)
            for v in outputs.values()
        ]
        grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), cotangents)
        results |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return results


def twin(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An nn.LSTM with the same weights, on the CPU if another dtype is asked for."""
    theirs = copy.deepcopy(module)
    fused_lstm.swap(theirs, back=True)
    return theirs if dtype is None else theirs.cpu().to(dtype)


def assert_parity(
    module: nn.Module,
    x: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    backward: bool = True,
    call: Callable[..., dict[str, Tensor]] = run,
) -> dict[str, Tensor]:
    """Holds every output and gradient of module(x, hx) to the rule; returns them."""
    dtype = x.data.dtype
    ours = call(module, x, hx, backward=backward)
    double_x = x.to(device="cpu", dtype=torch.float64)
    double_hx = None if hx is None else tuple(s.detach().cpu().double() for s in hx)
    gold = run(twin(module, torch.float64), double_x, double_hx, backward=backward)
    theirs = {} if dtype == torch.float64 else run(twin(module), x, hx, backward=backward)
    assert ours.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name], theirs.get(name), gold[name], dtype)
    return ours


def assert_parity_of(compute: Callable[[nn.Module, Tensor], list[Tensor]], module: nn.Module, x: Tensor) -> None:
    """Holds what `compute` makes of a module and an input, such as a derivative of a gradient, to the rule. nn.LSTM is
    on the CPU: cuDNN cannot differentiate twice."""
    dtype = x.dtype
    ours = compute(module, x.detach().requires_grad_())
    gold = compute(twin(module, torch.float64), x.detach().cpu().double().requires_grad_())
    theirs = gold if dtype == torch.float64 else compute(twin(module, dtype), x.detach().cpu().requires_grad_())
    for number, (own, other, exact) in enumerate(zip(ours, theirs, gold, strict=True)):
        assert_close(f"result {number}", own, other, exact, dtype)
