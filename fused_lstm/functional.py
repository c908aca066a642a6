"""Layers x directions x dropout: the network around the recurrence of one layer and direction."""

import torch
from torch import Tensor, _VF

from .kernels.plan import Plan, choose


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (bias, num_layers, dropout, training, bidirectional)
    if batch_sizes is None:
        return _VF.lstm(input, hx, weights, *args, batch_first)
    return _VF.lstm(input, batch_sizes, hx, weights, *args)
