"""The tensors of a call, for all paths but torch's own: in autocast's dtype, and refused where they do not agree."""

import torch
from torch import Tensor

from .call import Call
from .route import autocast_dtype
from .weights import is_wide


def prepared(call: Call) -> Call:
    """The call with everything in autocast's dtype, as nn.LSTM has it, and checked."""
    if torch._C._is_any_autocast_enabled():
        input, h0, c0, *weights = in_autocast(call.tensors())
        call = call._replace(input=input, h0=h0, c0=c0, weights=weights)
    check_tensors(call)
    return call


def in_autocast(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors in the dtype in which autocast, where it is on, has them used."""
    return [tensor.to(autocast_dtype(tensor)) for tensor in tensors]


def check_tensors(call: Call) -> None:
    """Raises for what torch's own LSTM refuses and the module does not check."""
    weights = call.weights
    if call.scales is not None:
        weights = [*call.scales, *filter(is_wide, weights)]
    check_same(call.input, call.steps, (call.h0, call.c0), weights)


def check_same(input: Tensor, steps: int, hx: tuple[Tensor, ...], weights: list[Tensor]) -> None:
    """Raises for no steps, and for states and weights of another device or dtype than the input's."""
    if input.dim() == 3 and steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    device, dtype = input.device, input.dtype
    for place, tensor in enumerate((*hx, *weights)):
        if tensor.device == device and tensor.dtype == dtype:
            continue
        kind = "hidden" if place < len(hx) else "parameter"
        if tensor.device == device:
            raise RuntimeError(
                f"Input and {kind} tensors are not the same dtype, found input tensor with {dtype} "
                f"and {kind} tensor with {tensor.dtype}"
            )
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, found input tensor at {device} "
            f"and {kind} tensor at {tensor.device}"
        )
