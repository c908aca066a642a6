"""A layer that keeps its states between chunks of steps alone, one direction at a time: fused_lstm::forward_in_chunks
and ::backward_in_chunks. Backward recomputes the gates and cells of a chunk at a time, from its end to its beginning.

A chunk is a sequence of its own, which begins with the states that the one before left: what is true of a layer is true
of it, with resets that go to the layer's hx and not to its own. Operators, so that torch.compile takes no loop over the
chunks for a constant.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import gradients, recurrence, stand_in, vmap
from .gradients import Cotangents, Steps
from .kernels.environment import WHY_NO_TRITON
from .kernels.layout import accumulator
from .operators import Operator, beside
from .products import matmul_precision
from .records import record
from .recurrence import Inputs, Outputs, Recurrence, input_gates_of
from .sequence import Sequence
from .weights import Weights, cat, stack

if WHY_NO_TRITON is None:
    from .kernels.scan import scan


# Steps of a chunk: the states between them are then below 1% of what is kept without recompute.
CHUNK = 128


def chunk_for(dtype: torch.dtype, B: int, H: int, memory: int) -> int:
    """How many steps recompute takes at a time on a device of so many bytes of memory: a power of two, 16 to 1024.

    A step's workspace is its gates and their gradients, c and h. Where a chunk's would be more than a sixteenth of the
    memory, the chunk is shorter. Where it is below a thousandth it is longer: the host's part in a chunk, some dozen
    launches, is that of a hundred short steps.
    """
    step = B * H * (9 * dtype.itemsize + (8 if dtype == torch.float64 else 4))
    chunk = CHUNK
    while chunk > 16 and 16 * chunk * step > memory:
        chunk //= 2
    while chunk < 1024 and 2000 * chunk * step <= memory:
        chunk *= 2
    return chunk


@cache
def memory_of(device: torch.device) -> int | None:
    """The bytes that a device has in all, and not what is free: that changes from call to call, and results with it by
    the order of their sums. None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@record
class ForwardArgs(NamedTuple):
    """Of one direction: x as Inputs has it, h0 (B, Hout), c0 (B, H); the options as Recurrence has them."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: Weights
    sequence: Sequence
    states: bool
    chunk: int
    ieee: bool
    project_in_kernel: bool
    scale: Tensor | None = None

    @property
    def how(self) -> Recurrence:
        """Of a chunk."""
        # Within an operator nobody looks.
        how = Recurrence(self.sequence, states=self.states, ieee=self.ieee, direct=True, scale=self.scale)
        return how._replace(project_in_kernel=self.project_in_kernel)

    def chunks(self) -> Iterator[tuple[Sequence, slice, int]]:
        offsets = self.sequence.offsets
        T = len(self.x if offsets is None else offsets)
        return self.sequence.chunks(T, len(self.h0), len(self.x), self.chunk)


def _forward(a: ForwardArgs) -> tuple[Tensor, ...]:
    """y, hn, cn, the cells (empty without states), and c and h between the chunks, in the direction's order."""
    x, h, c = a.x, a.h0, a.c0.to(accumulator(a.c0.dtype))
    y = x.new_empty((*x.shape[:-1], h.shape[1]))
    cells = x.new_empty((*x.shape[:-1], c.shape[1]) if a.states else 0)
    between: list[tuple[Tensor, Tensor]] = []
    for k, (part, span, B) in enumerate(a.chunks()):
        if k > 0:
            between.append((c, h))
        inputs, hx = Inputs(x[span], h[None, :B], c[None, :B], (a.weights,)), (a.h0[None, :B], a.c0[None, :B])
        y[span], hn, cn, c_steps, _ = recurrence.forward(a.how._replace(sequence=part), inputs, hx)
        if a.states:
            cells[span] = c_steps
        h, c = torch.cat([hn[0], h[B:]]), torch.cat([cn[0], c[B:]])
    if between:
        c_between, h_between = map(torch.stack, zip(*between, strict=True))
    else:
        c_between, h_between = c.new_empty((0, *c.shape)), h.new_empty((0, *h.shape))
    return y, h, c.to(a.c0.dtype, copy=True), cells, c_between, h_between


def _forward_fake(a: ForwardArgs) -> tuple[Tensor, ...]:
    x, h0, c0, offsets = a.x, a.h0, a.c0, a.sequence.offsets
    count = ((x if offsets is None else offsets).shape[0] + a.chunk - 1) // a.chunk - 1
    cells = x.new_empty((*x.shape[:-1], c0.shape[1]) if a.states else 0)
    between = c0.new_empty((count, *c0.shape), dtype=accumulator(c0.dtype)), h0.new_empty((count, *h0.shape))
    return x.new_empty((*x.shape[:-1], h0.shape[1])), h0.new_empty(h0.shape), c0.new_empty(c0.shape), cells, *between


class Between(NamedTuple):
    """What forward leaves for backward, of all directions: y, and the states between chunks (D, chunks - 1, B, H)."""

    y: Tensor
    c: Tensor
    h: Tensor


@record
class Wanted(NamedTuple):
    """Which gradients backward is asked for; those of h0 and c0 lead from chunk to chunk and are always there."""

    dx: bool
    dweight_ih: bool
    dweight_hh: bool
    dbias: bool
    dweight_hr: bool


@record
class BackwardArgs(NamedTuple):
    """Of one direction: what the gradients are of, what forward() took, and what it left."""

    dy: Tensor
    dhn: Tensor
    dcn: Tensor
    dcells: Tensor | None
    args: ForwardArgs
    y: Tensor
    c_between: Tensor
    h_between: Tensor
    wanted: Wanted


def _backward(b: BackwardArgs) -> tuple[Tensor, ...]:
    """The gradients of x, h0, c0, weight_ih, weight_hh, either bias, and weight_hr; empty where not wanted."""
    a, wanted, wide = b.args, b.wanted, accumulator(b.args.c0.dtype)
    needed = Weights(wanted.dweight_ih, wanted.dweight_hh, wanted.dbias, wanted.dbias, wanted.dweight_hr)  # type: ignore[arg-type]
    needs = Inputs(wanted.dx, True, True, (needed,))  # type: ignore[arg-type]
    dx = a.x.new_empty(a.x.shape if wanted.dx else 0)
    dh, dc = b.dhn, b.dcn.to(wide)
    totals: dict[str, Tensor | None] = {}  # over the chunks
    for k, (part, span, B) in reversed(list(enumerate(a.chunks()))):
        how, hx = a.how._replace(sequence=part), (a.h0[None, :B], a.c0[None, :B])
        h, c = (a.h0[:B], a.c0[:B].to(wide)) if k == 0 else (b.h_between[k - 1, :B], b.c_between[k - 1, :B])
        inputs, y = Inputs(a.x[span], h[None], c[None], (a.weights,)), b.y[span]
        gates, c_steps = recompute(how, inputs, y, hx)
        cells = None if b.dcells is None else b.dcells[span]
        cotangents = Cotangents(b.dy[span], dh[None, :B], dc[None, :B], cells)
        steps = Steps(y, c_steps, gates)
        grads = gradients.gradients(how, inputs, steps, cotangents, needs, hx, accumulate=True)
        if wanted.dx:
            dx[span] = grads.inputs.x
        dh, dc = torch.cat([grads.inputs.h0[0], dh[B:]]), torch.cat([grads.inputs.c0[0], dc[B:]])
        dw_ih, dw_hh, dbias, _, dw_hr = grads.inputs.weights[0]
        of_chunk = {"w_ih": dw_ih, "w_hh": dw_hh, "bias": dbias, "w_hr": dw_hr}
        for name, grad in (of_chunk | {"h_reset": grads.h_reset, "c_reset": grads.c_reset}).items():
            total = totals.get(name)
            totals[name] = grad if total is None or grad is None else total.add_(grad)
    dh_reset, dc_reset = totals["h_reset"], totals["c_reset"]
    if dh_reset is not None and dc_reset is not None:  # resets have no packed sequences: of all batch rows
        dh, dc = dh + dh_reset[0], dc + dc_reset[0]
    of_weights = (totals[name] for name in ("w_ih", "w_hh", "bias", "w_hr"))
    dweights = (a.x.new_empty(0) if total is None else total.to(a.x.dtype) for total in of_weights)
    return dx, dh, dc.to(a.c0.dtype, copy=True), *dweights


def _backward_fake(b: BackwardArgs) -> tuple[Tensor, ...]:
    (x, h0, c0, weights, *_), wanted = b.args, b.wanted
    of_weights = (
        (weights.weight_ih, wanted.dweight_ih),
        (weights.weight_hh, wanted.dweight_hh),
        (weights.bias_ih, wanted.dbias),
        (weights.weight_hr, wanted.dweight_hr),
    )
    dweights = (x.new_empty(w.shape if w is not None and asked else 0) for w, asked in of_weights)
    return x.new_empty(x.shape if wanted.dx else 0), h0.new_empty(h0.shape), c0.new_empty(c0.shape), *dweights


def recompute(how: Recurrence, inputs: Inputs, y: Tensor, reset_to: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """gates and c of a chunk, as its forward pass had them: y is known, so all but c is parallel over time."""
    x, h0, c0, weights = inputs
    sequence, weight_hh, (h_reset, c_reset) = how.sequence, weights[0].weight_hh, reset_to
    c_start = None
    with matmul_precision(x, how.ieee):
        gates = input_gates_of(x, weights, [sequence], h0, h_reset)
        flat = gates.view(-1, gates.shape[-1])
        _, _, later, previous = sequence.step_rows(h0.shape[1], len(flat))
        h_prev = y.reshape(-1, y.shape[-1])[previous]
        if sequence.starts is not None:
            h_prev = h_prev * ~sequence.starts.reshape(-1, 1)[later]
            c_start = c_reset[0].to(c0.dtype).contiguous() if sequence.reset_to_hx else torch.zeros_like(c0[0])
        if isinstance(later, slice):
            flat[later].addmm_(h_prev, weight_hh.T)
        else:
            flat[later] = torch.addmm(flat[later], h_prev, weight_hh.T)
    options = {"reverse": sequence.reverse, "layout": sequence.layout, "c_reset": c_start}
    return gates, beside("scan", scan, stand_in.scan, gates, c0[0].contiguous(), **options)


forward_in_chunks = Operator(
    "forward_in_chunks", ForwardArgs, "(" + ", ".join(["Tensor"] * 6) + ")", _forward, _forward_fake
)
backward_in_chunks = Operator(
    "backward_in_chunks", BackwardArgs, "(" + ", ".join(["Tensor"] * 7) + ")", _backward, _backward_fake
)
for _operator in (forward_in_chunks, backward_in_chunks):
    _operator.custom.register_vmap(vmap.one_by_one(_operator.overload))


def _args_of_directions(how: Recurrence, inputs: Inputs) -> list[ForwardArgs]:
    """Of each direction."""
    x, h0, c0, weights = inputs
    options = how.states, how.chunk, how.ieee, how.project_in_kernel
    directions = zip(h0, c0, weights, how.sequences(weights), strict=True)
    scales = [None] * len(weights) if how.scale is None else how.scale[:, None]  # each (1, 4H)
    return [ForwardArgs(x, *direction, *options, scales[d]) for d, direction in enumerate(directions)]


def forward(how: Recurrence, inputs: Inputs) -> Outputs:
    """Of all directions."""
    of_each = [forward_in_chunks(args, how.direct) for args in _args_of_directions(how, inputs)]
    y, hn, cn, cells, c, h = (list(tensors) for tensors in zip(*of_each, strict=True))
    return Outputs(cat(y), stack(hn), stack(cn), stack(c), stack(h), cat(cells) if how.states else None)


def backward(how: Recurrence, inputs: Inputs, between: Between, cotangents: Cotangents, needs: Inputs) -> Inputs:
    """The gradients of forward(); each direction's chunks are in an order of their own."""
    D = len(inputs.weights)
    dx, dh0, dc0, dweights = [], [], [], []
    for d, forward_args in enumerate(_args_of_directions(how, inputs)):
        w = needs.weights[d]
        wanted = Wanted(needs.x, w.weight_ih, w.weight_hh, bool(w.bias_ih or w.bias_hh), w.weight_hr)  # type: ignore[arg-type]
        dy, dcells = cotangents.y.chunk(D, -1)[d], None
        if cotangents.cells is not None:
            dcells = cotangents.cells.chunk(D, -1)[d]
        saved = between.y.chunk(D, -1)[d], between.c[d], between.h[d]
        args = BackwardArgs(dy, cotangents.hn[d], cotangents.cn[d], dcells, forward_args, *saved, wanted)
        of_x, of_h, of_c, dweight_ih, dweight_hh, dbias, dweight_hr = backward_in_chunks(args, how.direct)
        dx.append(of_x)
        dh0.append(of_h)
        dc0.append(of_c)
        pairs = zip((dweight_ih, dweight_hh, dbias, dbias, dweight_hr), w, strict=True)
        dweights.append(Weights(*(grad if needed else None for grad, needed in pairs)))  # type: ignore[arg-type]
    of_x = sum(dx[1:], dx[0]) if needs.x else None
    return Inputs(of_x, stack(dh0) if needs.h0 else None, stack(dc0), tuple(dweights))  # type: ignore[arg-type]
