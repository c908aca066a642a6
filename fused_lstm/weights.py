"""The weights of one layer and direction, and those of the recurrences of a launch as the kernels take them."""

from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from .records import record


@record
class Weights(NamedTuple):
    """weight_ih (4H, I), weight_hh (4H, Hout), bias_ih and bias_hh (4H) or None, weight_hr (P, H) or None. Also their
    gradients, or whether one is needed."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None

    @property
    def bias(self) -> Tensor | None:
        """(4H), the sum of both."""
        return None if self.bias_ih is None or self.bias_hh is None else self.bias_ih + self.bias_hh


def weights_of(flat: list[Tensor], bias: bool, count: int) -> tuple[Weights, ...]:
    """The Weights of so many layers and directions, which nn.LSTM has in a row without the absent ones."""
    per_layer = len(flat) // count
    found = []
    for k in range(0, len(flat), per_layer):
        weight_ih, weight_hh, *others = flat[k : k + per_layer]
        bias_ih, bias_hh = others[:2] if bias else (None, None)
        found.append(Weights(weight_ih, weight_hh, bias_ih, bias_hh, others[-1] if len(others) % 2 else None))
    return tuple(found)


def is_wide(weight: Tensor) -> bool:
    """Whether a weight is none of 8 bits."""
    return weight.itemsize > 1


def widened(q: Tensor, scale: Tensor) -> Tensor:
    """A weight of 8 bits, scale * q, in the scale's dtype. q: (..., rows, columns). scale: (..., rows)."""
    exact = torch.promote_types(scale.dtype, torch.float32)
    return (q.to(exact) * scale.to(exact)[..., None]).to(scale.dtype)


def wide_weights(flat: list[Tensor], scales: list[Tensor], hh: bool = True) -> list[Tensor]:
    """The weights as nn.LSTM has them in a row, with those of 8 bits widened; scales: of these, in their order. hh:
    weight_hh as well, or else weight_ih alone."""
    narrow = iter(zip(scales, cycle((True, hh))))
    wide = []
    for weight in flat:
        if not is_wide(weight):
            scale, chosen = next(narrow)
            weight = widened(weight, scale) if chosen else weight
        wide.append(weight)
    return wide


def projections(weights: tuple[Weights, ...]) -> list[Tensor]:
    """W_hr (P, H) of each; none without."""
    return [w.weight_hr for w in weights if w.weight_hr is not None]


def biases(weights: tuple[Weights, ...]) -> list[Tensor]:
    """(4H) of each; none without."""
    return [bias for bias in (w.bias for w in weights) if bias is not None]


def recurrent_weights(weights: tuple[Weights, ...], fold_projection: bool) -> Tensor:
    """(R, 4H, Hout), the matrix of each recurrence; with folded projections W_hh W_hr, (R, 4H, H)."""
    return stack(
        [w.weight_hh @ w.weight_hr if fold_projection and w.weight_hr is not None else w.weight_hh for w in weights]
    )


def upper_weight_ih(weights: tuple[Weights, ...]) -> Tensor:
    """(L - 1, 4H, H), of the layers above the first."""
    return torch.stack([w.weight_ih for w in weights[1:]])


def upper_bias(weights: tuple[Weights, ...]) -> Tensor:
    """(L - 1, 4H), of the same; zeros without biases."""
    upper = weights[1:]
    return torch.stack(biases(upper) or [w.weight_ih.new_zeros(len(w.weight_ih)) for w in upper])


def cat(tensors: list[Tensor], dim: int = -1) -> Tensor:
    """torch.cat, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def stack(tensors: list[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
