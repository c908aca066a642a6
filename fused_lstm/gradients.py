"""The gradients of what recurrence.forward() takes: the backward kernel, and the products around it. The numbers are
those of kernels/README.md."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .kernels.layout import Layout, accumulator
from .products import matmul_precision, matmul_tn
from .records import record
from .recurrence import Inputs, Recurrence, layout_of
from .sequence import Sequence
from .weights import Weights, cat, projections, recurrent_weights, stack


@record
class Cotangents(NamedTuple):
    """dL/d of what a recurrence gives: y, of a stack that of its last layer, hn, cn, and the cells of all steps, None
    where these have none, as those of a stack."""

    y: Tensor
    hn: Tensor
    cn: Tensor
    cells: Tensor | None


class Steps(NamedTuple):
    """What recurrence.forward() has left of all steps, as its Results have it."""

    y: Tensor
    c: Tensor
    gates: Tensor


class Grads(NamedTuple):
    """inputs: None for what needs none; that of c0 in the accumulator's dtype; the biases have one for both.
    h_reset, c_reset: of the states that resets go to, None where there are none."""

    inputs: Inputs
    h_reset: Tensor | None
    c_reset: Tensor | None


class BySource(NamedTuple):
    """dgates of one recurrence by where their W_hh h comes from.

    first: (B, 4H), from h0. reset: (B, 4H), from h at resets to hx, None without. later: (rows, 4H), of all steps but
        the first, from the h of the step before.
    """

    first: Tensor
    reset: Tensor | None
    later: Tensor


def gradients(
    how: Recurrence,
    inputs: Inputs,
    steps: Steps,
    cotangents: Cotangents,
    needs: Inputs,
    reset_to: tuple[Tensor, Tensor] | None = None,
    accumulate: bool = False,
) -> Grads:
    """The gradients of recurrence.forward().

    Args:
        how, inputs, reset_to: as it took them. steps: as it returned them.
        needs: whether an input needs one. accumulate: those of the weights in the accumulator's dtype.
    """
    x, h0, c0, weights = inputs
    h_reset, c_reset = reset_to or (h0, c0)
    sequences, R, B = how.sequences(weights), len(weights), h0.shape[1]
    dx: Tensor | None = None
    dh0: list[Tensor] = []
    dh_reset: list[Tensor] = []
    dweights: list[Weights] = []
    with matmul_precision(x, how.ieee):
        dgates_of_all, dc0, dc_reset, dh_steps = backward_kernel(how, inputs, steps, cotangents, c_reset)

        # From here on everything is parallel over time.
        every_dgates, every_y = how.unbind(dgates_of_all, R), how.unbind(steps.y, R)
        if needs.x:
            weight_ih = cat([w.weight_ih for w in weights[: len(sequences)]], 0)
            of_x = every_dgates[0] if len(sequences) == 1 else dgates_of_all.reshape(-1, weight_ih.shape[0])
            dx = (of_x @ weight_ih).view(x.shape)  # (9)
        for k, (w, dgates, y) in enumerate(zip(weights, every_dgates, every_y, strict=True)):
            needed, sequence = needs.weights[k], sequences[0 if how.stacked else k]
            _, last_rows, _, previous_rows = sequence.step_rows(B, dgates.shape[0])
            dweight_ih = dweight_hh = dbias = dweight_hr = None
            if needed.weight_ih:
                below = how.drop(every_y[k - 1], k - 1, B) if how.stacked and k > 0 else x.reshape(-1, x.shape[-1])
                dweight_ih = matmul_tn(dgates, below, None, accumulate)  # (11)
            if w.bias_ih is not None and (needed.bias_ih or needed.bias_hh):
                dbias = dgates.sum(0, dtype=accumulator(x.dtype) if accumulate else None)  # (13)

            first, reset, later = by_source(dgates, sequence, B)
            if needs.h0:
                dh = first @ w.weight_hh  # (10)
                if (without_steps := sequence.without_steps()) is not None:
                    dh = torch.where(without_steps, cotangents.hn[k], dh)
                dh0.append(dh)
                if reset is not None:
                    dh_reset.append(reset @ w.weight_hh)
            if needed.weight_hh:
                by_states = matmul_tn(first, h0[k], None, accumulate)
                if reset is not None:
                    by_states = matmul_tn(reset, h_reset[k], by_states, accumulate)
                dweight_hh = matmul_tn(later, y[previous_rows], by_states, accumulate)  # (12)
            if needed.weight_hr and w.weight_hr is not None:
                h = h_of(steps, k, R, sequence.layout)
                if dh_steps is not None:
                    dweight_hr = matmul_tn(how.unbind(dh_steps, R)[k], h, None, accumulate)
                else:
                    dy, dhn = how.unbind(cotangents.y, R)[k], cotangents.hn[k]
                    by_outputs = matmul_tn(dy, h, matmul_tn(dhn, h[last_rows], None, accumulate), accumulate)
                    by_steps = later @ w.weight_hh
                    dweight_hr = matmul_tn(by_steps, h[previous_rows], by_outputs, accumulate)  # (14)
            dweights.append(Weights(dweight_ih, dweight_hh, dbias, dbias, dweight_hr))  # type: ignore[arg-type]
    return Grads(
        Inputs(dx, stack(dh0) if dh0 else None, dc0, tuple(dweights)),  # type: ignore[arg-type]
        stack(dh_reset) if dh_reset else None,
        dc_reset,
    )


def backward_kernel(
    how: Recurrence, inputs: Inputs, steps: Steps, cotangents: Cotangents, c_reset: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dgates as steps.gates, dc0, dc_reset or None without resets to hx, and dh of all steps, None if no kernel
    projects."""
    c0, weights, sequence = inputs.c0, inputs.weights, how.sequence
    sequences, folds = how.sequences(weights), how.folds(weights)
    by = projections(weights)
    dh, dh_end = cotangents.y, cotangents.hn
    if folds:
        of_each = zip(how.unbind(dh, len(weights)), by, strict=True)
        of_h = cat([rows @ w_hr for rows, w_hr in of_each])
        dh = of_h.view(*dh.shape[:-1], of_h.shape[-1])
        dh_end = dh_end @ torch.stack(by)
    c_first, c_start = c0.to(steps.c.dtype).contiguous(), None
    to_hx = sequence.starts is not None and sequence.reset_to_hx
    if sequence.starts is not None:
        c_start = c_reset.to(c_first.dtype).contiguous() if to_hx else torch.zeros_like(c_first)
    args = operators.BackwardArgs(
        dh,
        dh_end,
        cotangents.cn,
        recurrent_weights(weights, folds),
        c_first,
        steps.c,
        steps.gates,
        cotangents.cells,
        c_start,
        layout_of(sequences),
        stack(by) if how.project_in_kernel else None,
        how.stack(weights, backward=True),
        sequence.reverse,
        how.ieee,
    )
    dgates, dc0, dc_reset, dh_steps = operators.backward(args, how.direct)
    return dgates, dc0, dc_reset if to_hx else None, dh_steps if how.project_in_kernel else None


def by_source(dgates: Tensor, sequence: Sequence, B: int) -> BySource:
    """dgates: (rows, 4H), whose memory is used."""
    first_rows, _, later_rows, _ = sequence.step_rows(B, dgates.shape[0])
    reset = None
    if sequence.starts is not None:
        starts = sequence.starts.reshape(-1, 1)
        if sequence.reset_to_hx:
            sizes = (B, -1) if sequence.batch_first else (-1, B)
            each_step = (dgates * starts).view(*sizes, dgates.shape[-1])
            reset = each_step.sum(1 if sequence.batch_first else 0)
        dgates.masked_fill_(starts, 0)
    first = dgates[first_rows]
    if sequence.batch_first:
        first = first.clone()
        dgates[first_rows] = 0
    return BySource(first, reset, dgates[later_rows])


def h_of(steps: Steps, k: int, R: int, layout: Layout) -> Tensor:
    """h of every step of recurrence k by (4), (rows, H); zero past a row's length, where c and gates are as the memory
    was."""
    c, gates = steps.c.chunk(R, -1)[k], steps.gates.chunk(R, -1)[k]
    h = c.tanh().mul_(gates[..., -c.shape[-1] :]).to(gates.dtype)
    h = h.masked_fill(layout.past(h.shape), 0) if layout.padded else h
    return h.view(-1, h.shape[-1])
