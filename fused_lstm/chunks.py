"""One layer and direction that keeps its states between chunks of steps alone, as fused_lstm::forward_in_chunks and
::backward_in_chunks: backward recomputes the gates and cells of a chunk at a time, from its end to its beginning.

A chunk is a sequence of its own, which begins with the states that the one before left: what is true of a layer is true
of it, with resets that go to the layer's hx and not to its own. Operators, so that torch.compile takes no loop over the
chunks for a constant.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import layer
from .kernels.environment import WHY_NO_TRITON
from .kernels.layout import accumulator
from .layer import Members, Weights, matmul_precision
from .operators import one_by_one
from .sequence import Sequence

if WHY_NO_TRITON is None:
    from .kernels.scan import scan


@torch.library.custom_op("fused_lstm::forward_in_chunks", mutates_args=())
def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    earlier: Tensor | None,
    reverse: bool,
    reset_to_hx: bool,
    states: bool,
    chunk: int,
    ieee: bool,
    projects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, hn, cn, the cells (empty without states), and h and c between the chunks, in the direction's order."""
    sequence = Sequence(lengths, offsets, starts, None, earlier, reverse, reset_to_hx)
    weights = weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    h, c, between = h0, c0.to(accumulator(c0.dtype)), []
    y = x.new_empty((*x.shape[:-1], h0.shape[1]))
    cells = x.new_empty((*x.shape[:-1], c0.shape[1]) if states else 0)
    for k, (part, span, B) in enumerate(_chunks(sequence, x, h0, chunk)):
        if k > 0:
            between.append((h, c))
        hx = h0[None, :B], c0[None, :B]
        given = x[span], h[None, :B], c[None, :B], [weights], part
        y[span], hn, cn, c_steps, _ = layer.forward(*given, Members(projects=projects), hx, states, ieee)
        if states:
            cells[span] = c_steps
        h, c = torch.cat([hn[0], h[B:]]), torch.cat([cn[0], c[B:]])
    return y, h, c.to(c0.dtype, copy=True), cells, *_stacked(between, h, c)


@forward.register_fake
def _(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    earlier: Tensor | None,
    reverse: bool,
    reset_to_hx: bool,
    states: bool,
    chunk: int,
    ieee: bool,
    projects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = ((x if offsets is None else offsets).shape[0] + chunk - 1) // chunk - 1
    cells = x.new_empty((*x.shape[:-1], c0.shape[1]) if states else 0)
    between = h0.new_empty((count, *h0.shape)), c0.new_empty((count, *c0.shape), dtype=accumulator(c0.dtype))
    return x.new_empty((*x.shape[:-1], h0.shape[1])), h0.new_empty(h0.shape), c0.new_empty(c0.shape), cells, *between


@torch.library.custom_op("fused_lstm::backward_in_chunks", mutates_args=())
def backward(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    earlier: Tensor | None,
    reverse: bool,
    reset_to_hx: bool,
    y: Tensor,
    h_between: Tensor,
    c_between: Tensor,
    needs: list[bool],
    chunk: int,
    ieee: bool,
    projects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, h0, c0, weight_ih, weight_hh, either bias, and weight_hr; empty where not needed, but dh0 and
    dc0 are always there: they lead from chunk to chunk."""
    sequence = Sequence(lengths, offsets, starts, None, earlier, reverse, reset_to_hx)
    weights = weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    wide = accumulator(c0.dtype)
    dx = x.new_empty(x.shape if needs[0] else 0)
    totals: list[Tensor | None] = [None] * 6  # of the four kinds of weights, and of h and c at resets to hx
    dh, dc = dhn, dcn.to(wide)
    parts = list(enumerate(_chunks(sequence, x, h0, chunk)))
    for k, (part, span, B) in reversed(parts):
        hx, h, c = (h0[:B], c0[:B]), h0[:B], c0[:B].to(wide)
        if k > 0:
            h, c = h_between[k - 1, :B], c_between[k - 1, :B]
        gates, c_steps = _recompute(x[span], h, c, weights, part, hx, y[span], ieee)
        grads = layer.gradients(
            dy[span],
            dh[None, :B],
            dc[None, :B],
            None if dcells is None else dcells[span],
            x[span],
            h[None],
            c[None],
            [weights],
            part,
            Members(projects=projects),
            (hx[0][None], hx[1][None]),
            y[span],
            c_steps,
            gates,
            [needs[0], True, True, *needs[3:]],
            ieee,
            wide=True,
        )
        if grads.x is not None:
            dx[span] = grads.x
        assert grads.h0 is not None
        dh, dc = torch.cat([grads.h0[0], dh[B:]]), torch.cat([grads.c0[0], dc[B:]])
        of_resets = (None if grad is None else grad[0] for grad in (grads.h_reset, grads.c_reset))
        for of, grad in enumerate((*grads.weights[0], *of_resets)):
            total = totals[of]
            totals[of] = grad if total is None or grad is None else total.add_(grad)
    if totals[4] is not None and totals[5] is not None:  # resets have no packed sequences: of all batch rows
        dh, dc = dh + totals[4], dc + totals[5]
    dw_ih, dw_hh, db, dw_hr = (x.new_empty(0) if total is None else total.to(x.dtype) for total in totals[:4])
    return dx, dh, dc.to(c0.dtype, copy=True), dw_ih, dw_hh, db, dw_hr


@backward.register_fake
def _(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    earlier: Tensor | None,
    reverse: bool,
    reset_to_hx: bool,
    y: Tensor,
    h_between: Tensor,
    c_between: Tensor,
    needs: list[bool],
    chunk: int,
    ieee: bool,
    projects: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias = bias_ih if needs[5] or needs[6] else None
    asked = zip((weight_ih, weight_hh, bias, weight_hr), (needs[3], needs[4], True, needs[7]), strict=True)
    dw_ih, dw_hh, db, dw_hr = (x.new_empty(0 if w is None or not needed else w.shape) for w, needed in asked)
    dx = x.new_empty(x.shape if needs[0] else 0)
    return dx, h0.new_empty(h0.shape), c0.new_empty(c0.shape), dw_ih, dw_hh, db, dw_hr


forward.register_vmap(one_by_one(forward))
backward.register_vmap(one_by_one(backward))


def _chunks(sequence: Sequence, x: Tensor, h0: Tensor, chunk: int) -> Iterator[tuple[Sequence, slice, int]]:
    T = len(x) if sequence.offsets is None else len(sequence.offsets)
    return sequence.chunks(T, len(h0), len(x), chunk)


def _stacked(between: list[tuple[Tensor, Tensor]], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    if not between:
        return h.new_empty((0, *h.shape)), c.new_empty((0, *c.shape))
    h_between, c_between = (torch.stack(tensors) for tensors in zip(*between, strict=True))
    return h_between, c_between


def _recompute(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Weights,
    sequence: Sequence,
    reset_to: tuple[Tensor, Tensor],
    y: Tensor,
    ieee: bool,
) -> tuple[Tensor, Tensor]:
    """gates and c, as layer.forward() had them: y is known, so all but c is parallel in time."""
    weight_hh = weights[1]
    with matmul_precision(x, ieee):
        gates = layer.gates_of(x, h0[None], [weights], [sequence], reset_to[0][None])
        _, _, current, previous = sequence.places(len(h0), len(gates))
        h_prev, c_reset = y.reshape(-1, y.shape[-1])[previous], None
        if sequence.starts is not None:
            h_prev = h_prev * ~sequence.starts.reshape(-1, 1)[current]
            c_reset = reset_to[1].to(c0.dtype) if sequence.reset_to_hx else torch.zeros_like(c0)
        if isinstance(current, slice):
            gates[current].addmm_(h_prev, weight_hh.T)
        else:
            gates[current] = torch.addmm(gates[current], h_prev, weight_hh.T)
    gates = gates.view(*x.shape[:-1], gates.shape[-1])
    c = scan(
        gates,
        c0.contiguous(),
        reverse=sequence.reverse,
        layout=sequence.layout,
        c_reset=None if c_reset is None else c_reset.contiguous(),
    )
    return gates, c
