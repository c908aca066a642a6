"""What runs in one launch, a layer with its directions or a stack of layers: its forward pass around the kernels.

A launch has R recurrences, each with weights of its own: the D directions of a layer, or the L layers of a stack, of
which each takes what the one below gives.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import operators
from .kernels.layout import NO_STACK, Layout, Stack, accumulator
from .products import matmul_precision
from .records import record
from .sequence import Sequence
from .weights import (
    Weights,
    biases,
    cat,
    projections,
    recurrent_weights,
    stack,
    upper_bias,
    upper_weight_ih,
)


@record
class Dropout(NamedTuple):
    """Between the layers of a stack.

    seed: (1,) int64. keep_prob: (1,) in the accumulator's dtype, the share of units that is kept. None: no dropout.
    """

    seed: Tensor | None = None
    keep_prob: Tensor | None = None


@record
class Inputs(NamedTuple):
    """All that has a gradient; also the gradients, or whether one is needed.

    x: (T, B, I), (B, T, I) if the sequence is so, or (rows, I) packed. h0: (R, B, Hout). c0: (R, B, H), in its dtype or
    the accumulator's. weights: of each recurrence.
    """

    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: tuple[Weights, ...]


@record
class Recurrence(NamedTuple):
    """How the inputs run.

    sequence: where the steps lie, of the first direction. dropout: between stacked layers.
    stacked: the recurrences are layers; otherwise the directions of one.
    project_in_kernel: the kernels project, if there is a projection; otherwise it is folded into W_hh.
    save: keep what backward needs. states: also return the cells of all steps, not of a stack.
    ieee: float32 products in full precision.
    chunk: keep the states between chunks of so many steps alone and recompute the rest in backward; 0: keep c and gates
        of every step.
    direct: operators.unwatched() holds.
    scale: (R, 4H), of a W_hh of 8 bits what a 1 in each of its rows stands for; only of layers without gradients,
        projections, states of all steps and resets to hx.
    """

    sequence: Sequence
    dropout: Dropout = Dropout()
    stacked: bool = False
    project_in_kernel: bool = False
    save: bool = False
    states: bool = False
    ieee: bool = False
    chunk: int = 0
    direct: bool = False
    scale: Tensor | None = None

    def sequences(self, weights: tuple[Weights, ...]) -> list[Sequence]:
        """The Sequence of each direction."""
        return self.sequence.per_direction(1 if self.stacked else len(weights))

    def folds(self, weights: tuple[Weights, ...]) -> bool:
        """Whether projections are folded into W_hh."""
        return weights[0].weight_hr is not None and not self.project_in_kernel

    def stack(self, weights: tuple[Weights, ...], backward: bool = False) -> Stack:
        """What leads from a layer to the next, as the kernels take it."""
        if not self.stacked:
            return NO_STACK
        bias = None if backward else upper_bias(weights)
        return Stack(upper_weight_ih(weights), bias, self.dropout.seed, self.dropout.keep_prob)

    def unbind(self, tensor: Tensor, count: int) -> list[Tensor]:
        """The (rows, features) of each of `count` recurrences in a tensor of all, as the kernels lay them out."""
        if self.stacked:
            return list(tensor.reshape(count, -1, tensor.shape[-1]).unbind())
        flat = tensor.reshape(-1, tensor.shape[-1])
        return [flat] if count == 1 else list(flat.chunk(count, -1))

    def drop(self, y: Tensor, layer: int, B: int) -> Tensor:
        """What the layer above takes of a layer's y, (rows, H)."""
        seed, keep_prob = self.dropout
        if seed is None or keep_prob is None:
            return y
        sizes = (B, -1) if self.sequence.batch_first else (-1, B)
        of_steps = y if self.sequence.offsets is not None else y.view(*sizes, y.shape[-1])
        args = operators.DropoutArgs(of_steps, seed, keep_prob, self.sequence.layout, layer, B)
        return operators.dropout(args, self.direct).view(y.shape)


class Results(NamedTuple):
    """y: like x with D*Hout features, of a stack the same of each layer, (L, ...). hn: (R, B, Hout). cn: (R, B, H) in
    the accumulator's dtype. c, gates: as the kernel saves them; if nothing is saved, None or empty."""

    y: Tensor
    hn: Tensor
    cn: Tensor
    c: Tensor
    gates: Tensor


class Outputs(NamedTuple):
    """What autograd.LSTMFunction returns.

    y: like x with D*Hout features. hn: (R, B, Hout). cn: (R, B, H).
    c, gates: kept for backward only; under recompute c and h between the chunks, (R, chunks - 1, B, ...).
    last: with states the cells of all steps, like x with D*H features; of a stack y of all layers, kept for backward
        only; otherwise None. Last, because torch 2.11's compiler counts the outputs behind a None wrong.
    """

    y: Tensor
    hn: Tensor
    cn: Tensor
    c: Tensor
    gates: Tensor
    last: Tensor | None


def layout_of(sequences: list[Sequence]) -> Layout:
    """The layout of all directions; torch.vmap must see where the steps and rows of each are."""
    starts = [sequence.starts for sequence in sequences if sequence.starts is not None]
    layout = sequences[0].layout
    return layout._replace(starts=torch.stack(starts)) if len(starts) > 1 else layout


def input_gates_of(
    x: Tensor, weights: tuple[Weights, ...], sequences: list[Sequence], h_first: Tensor | None, h_reset: Tensor
) -> Tensor:
    """x W_ih^T + b, (..., D*4H), with W_hh h of the states that each direction is set to: h_first (D, B, Hout) in the
    first step, if it is not the kernels' to add, and h_reset (D, B, Hout) at resets to hx."""
    of_all = biases(weights)
    weight_ih, bias = cat([w.weight_ih for w in weights], 0), cat(of_all, 0) if of_all else None
    if x.dim() == 2 or x.is_contiguous():
        input_gates = linear(x, weight_ih, bias)
    else:
        input_gates = linear(x.reshape(-1, x.shape[-1]), weight_ih, bias).view(*x.shape[:-1], weight_ih.shape[0])
    if h_first is None and sequences[0].starts is None:
        return input_gates
    flat = input_gates.view(-1, input_gates.shape[-1])
    for d, (sequence, w) in enumerate(zip(sequences, weights, strict=True)):
        gates = flat if len(weights) == 1 else flat.chunk(len(weights), -1)[d]
        starts = None if sequence.starts is None else sequence.starts.reshape(-1, 1)
        if h_first is not None:
            first, _, _, _ = sequence.step_rows(h_first.shape[1], gates.shape[0])
            of_h = h_first[d] @ w.weight_hh.T
            gates[first] += of_h if starts is None else of_h * ~starts[first]
        if starts is not None and sequence.reset_to_hx:
            of_reset = (h_reset[d] @ w.weight_hh.T).unsqueeze(1 if sequence.batch_first else 0)
            every_step = of_reset.expand(*x.shape[:-1], -1).reshape(gates.shape)
            gates.addcmul_(starts.to(x.dtype), every_step)
    return input_gates


def forward(how: Recurrence, inputs: Inputs, reset_to: tuple[Tensor, Tensor] | None = None) -> Results:
    """Runs the directions of a layer, or a stack of layers.

    A projection W_hr can be folded: with y_t = W_hr h_t, the recurrent term W_hh y_{t-1} equals (W_hh W_hr) h_{t-1}.
    Then the kernels run on h with the product of both weights, only the first step takes W_hh h0, and projecting h is
    one product parallel over time. Where P is far below H that product is much more than both weights, and the kernels
    project. Under a folded projection a reset goes the way of h0: the kernels go on from h = 0, and where the state
    becomes hx, W_hh h0 is in input_gates.

    Args:
        inputs: their layers, if stacked, neither project nor reset to hx.
        reset_to: the state at resets to hx, of the shapes of h0 and c0; None: these.
    """
    x, h0, c0, weights = inputs
    h_reset, c_reset = reset_to or (h0, c0)
    sequence, sequences, folds = how.sequence, how.sequences(weights), how.folds(weights)
    c_start = None
    with matmul_precision(x, how.ieee):
        input_gates = input_gates_of(x, weights[: len(sequences)], sequences, h0 if folds else None, h_reset)
        if sequence.starts is not None:
            c_start = c_reset if sequence.reset_to_hx else torch.zeros_like(c0)
            c_start = c_start.to(accumulator(c0.dtype)).contiguous()
        args = operators.ForwardArgs(
            input_gates,
            recurrent_weights(weights, folds),
            torch.zeros_like(c0, dtype=x.dtype) if folds else h0,
            c0,
            c_start,
            layout_of(sequences),
            stack(projections(weights)) if how.project_in_kernel else None,
            how.stack(weights),
            sequence.reverse,
            how.save or how.states,
            how.ieee,
            how.scale,
        )
        y, hn, cn, c, gates = operators.forward(args, how.direct)
        if folds:
            y, hn = projected(how, inputs, y)
    return Results(y, hn, cn, c, gates)


def projected(how: Recurrence, inputs: Inputs, h: Tensor) -> tuple[Tensor, Tensor]:
    """y and hn of the h of all steps, which a kernel left that knows nothing of the projection."""
    h0, weights = inputs.h0, inputs.weights
    by, R, B = projections(weights), len(weights), h0.shape[1]
    y = cat([rows @ w_hr.T for rows, w_hr in zip(how.unbind(h, R), by, strict=True)])
    ends = [last for _, last, _, _ in (sequence.step_rows(B, y.shape[0]) for sequence in how.sequences(weights))]
    # Shares no memory with y.
    hn = torch.stack([of_d[last] for of_d, last in zip(how.unbind(y, R), ends, strict=True)])
    if (without_steps := how.sequence.without_steps()) is not None:
        hn = torch.where(without_steps, h0, hn)
    return y.view(*h.shape[:-1], y.shape[-1]), hn
