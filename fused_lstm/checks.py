"""What lstm() takes beside nn.LSTM's arguments: its checks, and other forms of it made into tensors."""

import operator
from collections.abc import Sequence as Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .kernels.environment import DEBUG


def checked(
    input: Tensor,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | Iterable[int] | None,
    reset: Any,
    reset_to: str,
    mask: Any,
    mask_to: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Checks these arguments of lstm(). Returns lengths (B,), resets (T, B), and the mask as the input lies, of padded
    input; None where there are none.

    Raises:
        ValueError: as lstm().
    """
    if reset_to not in ("zero", "hx"):
        raise ValueError(f'reset_to must be "zero" or "hx", got {reset_to!r}')
    if lengths is not None or reset is not None:
        if batch_sizes is not None:
            raise ValueError("lengths and reset take padded input: a PackedSequence has its lengths in itself")
        if lengths is not None:
            lengths = checked_lengths(lengths, input, batch_first)
        if reset is not None:
            reset = of_steps("reset", reset, input)
            reset = (reset.T if batch_first else reset).contiguous()
    if mask_to not in ("zero", "hold"):
        raise ValueError(f'mask_to must be "zero" or "hold", got {mask_to!r}')
    if mask is not None:
        if batch_sizes is not None:
            raise ValueError("mask takes padded input, not a PackedSequence")
        mask = of_steps("mask", mask, input)
    return lengths, reset, mask


def checked_lengths(lengths: Tensor | Iterable[int], input: Tensor, batch_first: bool) -> Tensor:
    """lengths on the input's device, none of them beyond T."""
    B, T = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    lengths = integers(lengths)
    if lengths.shape != (B,):
        raise ValueError(f"lengths must have shape ({B},), one for each row, got {tuple(lengths.shape)}")
    if lengths.device not in (input.device, torch.device("cpu")):
        raise ValueError(f"lengths must be on {input.device} as the input or on the CPU, got {lengths.device}")
    if B > 0 and may_look(lengths):
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > T:
            raise ValueError(f"lengths must be from 0 to T = {T}, got {least} to {most}")
    return lengths.to(input.device, torch.int64, non_blocking=True).clamp(0, T)


def checked_recompute(recompute: bool | int) -> int | None:
    """The steps of a chunk, 0 for none; of True None, as many as the memory suggests.

    Raises:
        TypeError: not a bool or an integer. ValueError: below 0.
    """
    if not isinstance(recompute, int):
        raise TypeError(f"recompute must be a bool or a number of steps, got {type(recompute).__name__}")
    if recompute < 0:
        raise ValueError(f"recompute must be a bool or a number of steps, got {recompute}")
    return None if recompute is True else int(recompute)


def as_tensor(values: Any, input: Tensor) -> Tensor:
    """A tensor as it is; an array or a list as one on the input's device."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values).to(input.device)


def with_batch_dim(options: dict[str, Any], input: Tensor, batch_dim: int) -> None:
    """Gives what goes with the steps of unbatched input, resets and a mask, a batch of one row.

    Raises:
        ValueError: lengths, of which unbatched input has none.
    """
    if options["lengths"] is not None:
        raise ValueError("lengths takes batched input")
    for name in ("reset", "mask"):
        steps = options.get(name)
        if steps is not None and (steps := as_tensor(steps, input)).dim() == 1:
            options[name] = steps.unsqueeze(batch_dim)


def of_steps(name: str, values: Any, input: Tensor) -> Tensor:
    """What has a bool for each step and row, as a tensor: of a tensor, an array or a list.

    Raises:
        ValueError: it has not, or lies on another device than the input.
    """
    values = as_tensor(values, input)
    if values.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {values.dtype}")
    # As a tuple: a torch.Size would show as one in the text.
    shape = (input.shape[0], input.shape[1])
    if values.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one for each step and row, got {tuple(values.shape)}")
    if values.device != input.device:
        raise ValueError(f"{name} must be on {input.device} as the input, got {values.device}")
    return values


def integers(lengths: Any) -> Tensor:
    """lengths as a tensor: of a tensor, a NumPy array, or a sequence of integers of Python, NumPy or torch.

    Raises:
        ValueError: they are not integers.
    """
    if not isinstance(lengths, Tensor) and hasattr(lengths, "dtype"):
        lengths = torch.as_tensor(lengths)
    if not isinstance(lengths, Tensor):
        whole = [operator.index(length) for length in lengths if is_integer(length)]
        if len(whole) != len(lengths):
            raise ValueError(f"lengths must be integers, got {lengths}")
        return torch.tensor(whole, dtype=torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    return lengths


def is_integer(value: Any) -> bool:
    """Of Python, of NumPy, or a tensor of one; bools are none."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Integral) and not isinstance(value, bool)


def may_look(tensor: Tensor) -> bool:
    """Whether a check may read a tensor's elements: they are at hand, or nobody minds to wait for the device."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return (tensor.device.type == "cpu" or DEBUG) and not traced
