"""A layer of a cell on the kernels, as a node of autograd's graph: the products around them, and its gradients."""

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..gradients import by_source
from ..kernels.layout import Layout, accumulator
from ..operators import unwatched
from ..products import matmul_precision
from ..records import flatten, record, unflatten
from ..recurrence import layout_of
from ..sequence import Sequence
from ..weights import cat, stack
from . import operators
from .definition import Cell, by_key
from .layers import CellCall, directions, sequence_of
from .weights import Weights


@record
class How(NamedTuple):
    """How a layer runs. sequence: of the first direction, time first. cell: a Cell's key. save: for backward, too."""

    sequence: Sequence
    cell: str
    bias: bool
    save: bool
    ieee: bool
    directions: int

    def sequences(self) -> list[Sequence]:
        return self.sequence.per_direction(self.directions)


class Inputs(NamedTuple):
    """All that has a gradient. hx: h and the cell's states, each (D, B, H). weights: of each direction, as the layer
    lists them."""

    x: Tensor
    hx: list[Tensor]
    weights: list[Tensor]

    @staticmethod
    def of(how: How, flat: Any) -> "Inputs":
        x, *others = flat
        n = len(by_key(how.cell).S._fields)
        return Inputs(x, others[:n], others[n:])

    @property
    def flat(self) -> list[Tensor]:
        return [self.x, *self.hx, *self.weights]


class Outputs(NamedTuple):
    """steps, ends: as the kernel gives them. kept: empty where nothing is."""

    steps: list[Tensor]
    ends: list[Tensor]
    kept: Tensor

    @staticmethod
    def of(n: int, flat: Any) -> "Outputs":
        values = list(flat)
        return Outputs(values[:n], values[n : 2 * n], values[2 * n])


def states_of(how: How, hx: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The initial states as the kernels take them, and those of resets, none without."""
    initial = [state.to(accumulator(state.dtype)) if k else state for k, state in enumerate(hx)]
    if how.sequence.starts is None:
        return initial, []
    return initial, initial if how.sequence.reset_to_hx else [torch.zeros_like(state) for state in initial]


def arguments(how: How, inputs: Inputs, cell: Cell) -> tuple[list[Weights], Tensor, list[Tensor], Layout]:
    """The weights of each direction; weight_hh and the vectors of all; the layout."""
    weights = Weights.of(cell, inputs.weights, how.bias)
    vectors = [stack(list(of_all)) for of_all in zip(*(w.vectors for w in weights), strict=True)]
    return weights, stack([w.weight_hh for w in weights]), vectors, layout_of(how.sequences())


def forward(how: How, inputs: Inputs) -> list[Tensor]:
    """As operators.forward."""
    cell = by_key(how.cell)
    weights, weight_hh, vectors, layout = arguments(how, inputs, cell)
    initial, resets = states_of(how, inputs.hx)
    bias = bias_hh = None
    if how.bias:
        bias = cat([w.bias_ih for w in weights], 0)  # type: ignore[misc]
        bias_hh = stack([w.bias_hh for w in weights])  # type: ignore[misc]
        if not cell.graph.apart:  # both parts of each gate are summed in any case
            bias, bias_hh = bias + bias_hh.flatten(), None
    with matmul_precision(inputs.x, how.ieee):
        pre = linear(inputs.x, cat([w.weight_ih for w in weights], 0), bias)
    flags = how.cell, how.sequence.reverse, how.save, how.ieee
    args = operators.ForwardArgs(pre, weight_hh, bias_hh, vectors, initial, resets, layout, *flags)
    return operators.forward(args, unwatched(inputs.flat))


class CellFunction(torch.autograd.Function):
    """forward() with its gradients: of How, then Inputs.flat. It returns Outputs, flat."""

    @staticmethod
    def forward(how: How, *flat: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(forward(how, Inputs.of(how, flat)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        how, *flat = inputs
        n = len(by_key(how.cell).S._fields)
        outputs = Outputs.of(n, output)
        ctx.mark_non_differentiable(outputs.kept)
        ctx.set_materialize_grads(False)
        kept_for_backward(ctx, how, [*flat, *outputs.steps, outputs.kept])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        how, values = found_in_backward(ctx)
        flat, (*steps, kept) = values[: len(ctx.needs_input_grad) - 1], values[len(ctx.needs_input_grad) - 1 :]
        n, dsteps_and_dends, needed = len(steps), list(cotangents[: 2 * len(steps)]), ctx.needs_input_grad[1:]
        of_outputs = dsteps_and_dends[:n], dsteps_and_dends[n:]
        with torch.no_grad():
            grads = gradients(how, Inputs.of(how, flat), steps, kept, *of_outputs, needed[0])
        grads = [grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)]
        if torch.is_grad_enabled():  # someone wants to differentiate once more
            return None, *CellGradients.apply(how, *flat, *dsteps_and_dends, *grads)
        return None, *grads


class CellGradients(torch.autograd.Function):
    """The gradients that the kernels have computed, passed on to be differentiated once more: of How, Inputs.flat, the
    cotangents of steps and ends and the gradients. Its derivative is that of the layer composed of torch operations."""

    @staticmethod
    def forward(how: How, *flat: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = flat[-inputs_in(how, len(flat)) :]
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        how, *flat = inputs
        kept_for_backward(ctx, how, flat[: -inputs_in(how, len(flat))])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *by_grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        how, flat = found_in_backward(ctx)
        count, asked = len(by_grads), [k for k, by in enumerate(by_grads) if by is not None]
        primals = {k: tensor for k, tensor in enumerate(flat) if tensor is not None}

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            """The gradients that were asked for, as the composed layer has them."""
            at = dict(zip(primals, tensors, strict=True))

            def outputs_of(*differentiated: Tensor) -> tuple[Tensor, ...]:
                every = {k: at[k] for k in range(count)} | dict(zip(asked, differentiated, strict=True))
                x, hx, weights = Inputs.of(how, every.values())
                of_steps, ends = directions(by_key(how.cell), x, hx, weights, how.bias, how.sequences())
                return *of_steps, *ends

            outputs, pull = torch.func.vjp(outputs_of, *(at[k] for k in asked))[:2]
            pairs = zip(outputs, range(count, len(flat)), strict=True)
            return pull(tuple(at[k].to(o.dtype) if k in at else torch.zeros_like(o) for o, k in pairs))

        second: dict[int, Tensor] = {}
        if asked:
            pull = torch.func.vjp(first, *primals.values())[1]
            second = dict(zip(primals, pull(tuple(by_grads[k] for k in asked)), strict=True))
        return None, *(second.get(k) for k in range(len(flat))), *([None] * count)


def inputs_in(how: How, count: int) -> int:
    """How many Inputs there are among so many arguments of CellGradients: these twice, and two cotangents a state."""
    return (count - 2 * len(by_key(how.cell).S._fields)) // 2


def kept_for_backward(ctx: Any, how: How, tensors: Any) -> None:
    """Saves how and tensors, which may be None, for found_in_backward()."""
    options = flatten(how)
    ctx.count = len(options)
    values = [*options, *tensors]
    ctx.places = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
    ctx.options = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*(values[k] for k in ctx.places))


def found_in_backward(ctx: Any) -> tuple[How, list[Any]]:
    values = list(ctx.options)
    for k, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        values[k] = tensor
    return unflatten(How, values[: ctx.count]), values[ctx.count :]


def kernel_layer(call: CellCall, save: bool, ieee: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A Layer on the kernels. save: for backward."""
    options, n = call.options, len(call.hx)
    flags = call.cell.key, bool(options.bias), save or options.return_states, ieee, options.directions
    how, inputs = How(sequence_of(call), *flags), Inputs(call.input, list(call.hx), call.weights)
    outputs = list(CellFunction.apply(how, *inputs.flat)) if save else forward(how, inputs)
    return (outputs[:n], outputs[n : 2 * n]) if how.save else (outputs[:1], outputs[1:])


def gradients(
    how: How,
    inputs: Inputs,
    steps: list[Tensor],
    kept: Tensor,
    dsteps: list[Tensor | None],
    dends: list[Tensor | None],
    needs_x: bool,
) -> list[Tensor | None]:
    """The gradients of Inputs.flat. dsteps, dends: None for zeros. needs_x: whether that of x is wanted."""
    cell, (x, hx, _) = by_key(how.cell), inputs
    (D, B, H), G = hx[0].shape, len(cell.gates)
    weights, weight_hh, vectors, layout = arguments(how, inputs, cell)
    initial, resets = states_of(how, hx)
    of_y = torch.zeros_like(steps[0]) if dsteps[0] is None else dsteps[0]
    ends = [torch.zeros_like(s) if end is None else end for s, end in zip(initial, dends, strict=True)]
    of_outputs = [of_y, *dsteps[1:]], ends
    saved = weight_hh, vectors, initial, resets, steps, kept
    with matmul_precision(x, how.ieee):
        args = *of_outputs, *saved, layout, how.cell, how.sequence.reverse, how.ieee
        found = iter(operators.backward(operators.BackwardArgs(*args), unwatched([*inputs.flat, *dsteps, *ends])))
        every_dr, every_apart = next(found), next(found)
        dstates, dresets, dvectors = (list(islice(found, count)) for count in (len(initial), len(resets), len(vectors)))
        of_weights: list[Tensor | None] = []
        dinput = None
        dh0, dh_reset = [], []
        for d, (w, sequence) in enumerate(zip(weights, how.sequences(), strict=True)):
            dr = every_dr.chunk(D, -1)[d].reshape(-1, G * H)
            dx = of_input(cell, dr, every_apart.chunk(D, -1)[d])
            if needs_x:
                of_direction = dx @ w.weight_ih
                dinput = of_direction if dinput is None else dinput + of_direction
            dweight_ih = dx.T @ x.reshape(-1, x.shape[-1])
            biases = [dx.sum(0), dr.sum(0)] if how.bias else []
            y = steps[0].chunk(D, -1)[d].reshape(-1, H)
            _, _, _, previous = sequence.step_rows(B, len(dr))
            first, reset, later = by_source(dr.clone(), sequence, B)
            dweight_hh = first.T @ hx[0][d] + later.T @ y[previous]
            dh = first @ w.weight_hh
            if (without_steps := sequence.without_steps()) is not None:
                dh = torch.where(without_steps, ends[0][d], dh)
            if reset is not None:
                dweight_hh = dweight_hh + reset.T @ hx[0][d]
                dh_reset.append(reset @ w.weight_hh)
            dh0.append(dh)
            of_vectors = [dvector[d].sum(0).to(x.dtype) for dvector in dvectors]
            of_weights += [dweight_ih, dweight_hh, *biases, *of_vectors]
    dstates[0] = dstates[0] + torch.stack(dh0)
    if how.sequence.reset_to_hx and resets:
        dresets[0] = dresets[0] + torch.stack(dh_reset)
        dstates = [a + b for a, b in zip(dstates, dresets, strict=True)]
    of_x = None if dinput is None else dinput.view(x.shape)
    return [of_x, *(state.to(x.dtype) for state in dstates), *of_weights]


def of_input(cell: Cell, dr: Tensor, apart: Tensor) -> Tensor:
    """The gradient of the input's part of all gates, (rows, G*H), of that of the recurrent part and, of the gates that
    are apart, of its own."""
    if not cell.graph.apart:
        return dr
    gates, A = list(dr.chunk(len(cell.gates), -1)), len(cell.graph.apart)
    each = apart.reshape(len(dr), A * gates[0].shape[-1]).chunk(A, -1)
    for gate, of_gate in zip(cell.graph.apart, each, strict=True):
        gates[cell.gates.index(gate)] = of_gate
    return torch.cat(gates, -1)
