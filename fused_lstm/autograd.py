"""LSTMFunction: what runs in one launch under autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunks, composed, recurrence
from .chunks import chunk_for, memory_of
from .gradients import Cotangents, Steps, gradients
from .kernels.planned import saved_bytes
from .operators import unwatched
from .records import flatten, record, save_record, saved_record, unflatten
from .recurrence import Inputs, Outputs, Recurrence
from .weights import Weights


@record
class Saved(NamedTuple):
    """What backward needs. y: of a stack that of all layers."""

    how: Recurrence
    inputs: Inputs
    y: Tensor
    c: Tensor
    gates: Tensor


def run(how: Recurrence, inputs: Inputs) -> Outputs:
    """Runs the recurrences of a launch, with gradients if something is to be saved for them."""
    if not how.save:  # autograd would only cost the host its time
        return forward(how, inputs)
    if not how.direct:
        return Outputs(*LSTMFunction.apply(how, *flatten(inputs)))
    try:
        # Past Function.apply, which looks for the transforms that unwatched() has not found.
        return Outputs(*super(torch.autograd.Function, DirectLSTMFunction).apply(how, *flatten(inputs)))
    except torch.OutOfMemoryError as error:
        raise with_advice(error, how, inputs) from error


def with_advice(error: torch.OutOfMemoryError, how: Recurrence, inputs: Inputs) -> torch.OutOfMemoryError:
    """The error with what makes the layer take less memory."""
    (R, B, H), x = inputs.c0.shape, inputs.x
    if how.chunk:
        advice = f"it recomputes chunks of {how.chunk} steps; recompute={max(1, how.chunk // 2)} takes less at a time"
    else:
        chunk = chunk_for(x.dtype, B, H, memory_of(x.device) or 0)
        kept = x.shape[:-1].numel() * R * saved_bytes(x.dtype, H) / 2**20
        advice = (
            f"for backward it keeps {kept:,.0f} MiB beside its input and output; recompute=True, here in chunks of "
            f"{chunk} steps, keeps the states between these alone and computes the rest once more"
        )
    return torch.OutOfMemoryError(f"{error}\nfused_lstm: of this layer, {B} rows and {H} hidden units: {advice}")


def forward(how: Recurrence, inputs: Inputs) -> Outputs:
    """Runs the recurrences without autograd."""
    if how.chunk:
        return chunks.forward(how, inputs)
    y, hn, cn, c, gates = recurrence.forward(how, inputs)
    last = c.to(y.dtype, copy=True) if how.states else None
    if how.stacked:
        # Without backward a copy, or the last layer's y would hold those of all.
        y, last = (y[-1], y) if how.save else (y[-1].clone(), None)
    # .to() would return the same tensor under a second name, of which torch 2.11's compiler loses the gradient.
    cn = cn if cn.dtype == inputs.c0.dtype else cn.to(inputs.c0.dtype)
    return Outputs(y, hn, cn, c, gates, last)


class LSTMFunction(torch.autograd.Function):
    """forward() with its gradients, for torch.func and torch.compile, too: of the Recurrence, then flatten(Inputs)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(how: Recurrence, *inputs: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(forward(how, unflatten(Inputs, inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        how, *flat = inputs
        keep(ctx, how, unflatten(Inputs, flat), Outputs(*output))

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dy, dhn, dcn, _, _, dcells = of_outputs
        _, *of_inputs = ctx.needs_input_grad
        saved, needs = saved_record(ctx, Saved), unflatten(Inputs, of_inputs)
        with torch.no_grad():
            grads = backward(saved, needs, materialized(saved, dy, dhn, dcn, dcells))
        if torch.is_grad_enabled():  # someone wants to differentiate once more
            cotangents = Cotangents(dy, dhn, dcn, dcells)  # type: ignore[arg-type]
            return None, *Gradients.apply(
                saved.how._replace(direct=False), *flatten(SecondOrder(saved.inputs, cotangents, grads))
            )
        return None, *flatten(grads)


class DirectLSTMFunction(LSTMFunction):
    """The same where nobody looks at it, in the form that costs the host less: torch binds the arguments of a Function
    with setup_context to its signature at every call."""

    @staticmethod
    def forward(ctx: Any, how: Recurrence, *flat: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs = unflatten(Inputs, flat)
        outputs = forward(how, inputs)
        keep(ctx, how, inputs, outputs)
        return tuple(outputs)

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        try:
            return LSTMFunction.backward(ctx, *of_outputs)
        except torch.OutOfMemoryError as error:
            saved = saved_record(ctx, Saved)
            raise with_advice(error, saved.how, saved.inputs) from error


def keep(ctx: Any, how: Recurrence, inputs: Inputs, outputs: Outputs) -> None:
    """What backward finds in ctx."""
    of_layers = [outputs.last] if how.stacked else []
    ctx.mark_non_differentiable(outputs.c, outputs.gates, *of_layers)
    ctx.set_materialize_grads(False)
    y = outputs.last if how.stacked else outputs.y
    save_record(ctx, Saved(how, inputs, y, outputs.c, outputs.gates))  # type: ignore[arg-type]


def materialized(
    saved: Saved, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, dcells: Tensor | None
) -> Cotangents:
    """With zeros in the place of a None, but for the cells."""
    if dy is None:
        dy = torch.zeros_like(saved.y[-1] if saved.how.stacked else saved.y)
    if dhn is None or dcn is None:
        zeros, P = torch.zeros_like(saved.inputs.c0), saved.inputs.h0.shape[2]
        dcn = zeros if dcn is None else dcn
        if dhn is None:
            dhn = zeros if zeros.shape[2] == P else zeros[..., :P]
    return Cotangents(dy, dhn, dcn, dcells)


def backward(saved: Saved, needs: Inputs, cotangents: Cotangents) -> Inputs:
    """The gradients of forward(), None where none is needed."""
    how, inputs, y, c, gates = saved
    if how.direct and not unwatched(cotangents):
        how = how._replace(direct=False)
    if how.chunk:
        dx, dh0, dc0, dweights = chunks.backward(how, inputs, chunks.Between(y, c, gates), cotangents, needs)
    else:
        found, dh_reset, dc_reset = gradients(how, inputs, Steps(y, c, gates), cotangents, needs)
        dx, dh0, dc0, dweights = found
        if dc_reset is not None:
            dc0 = dc0 + dc_reset
        if dh0 is not None and dh_reset is not None:
            dh0 = dh0 + dh_reset
    weights = []
    for (dweight_ih, dweight_hh, of_ih, of_hh, dweight_hr), needed in zip(dweights, needs.weights, strict=True):
        dbias: Any = of_hh if of_ih is None else of_ih
        if dbias is not None:  # each has a gradient of its own memory
            of_ih, of_hh = dbias if needed.bias_ih else None, dbias.clone() if needed.bias_hh else None
        weights.append(Weights(dweight_ih, dweight_hh, of_ih, of_hh, dweight_hr))
    return Inputs(dx, dh0, dc0.to(inputs.c0.dtype) if needs.c0 else None, tuple(weights))  # type: ignore[arg-type]


@record
class SecondOrder(NamedTuple):
    """What Gradients takes. cotangents: None where there is none. grads: of the inputs."""

    inputs: Inputs
    cotangents: Cotangents
    grads: Inputs


class Gradients(torch.autograd.Function):
    """The gradients that the kernels have computed, passed on to be differentiated once more; takes the Recurrence,
    then flatten(SecondOrder).

    Its derivative is that of the recurrence composed of torch operations: slow, but needed by few. It is a node beside
    that of the layer, so that those who use create_graph for first derivatives, as torch.func.grad does, do not pay.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(how: Recurrence, *flat: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = flatten(unflatten(SecondOrder, flat).grads)
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        how, *flat = inputs
        save_record(ctx, Differentiated(how, unflatten(SecondOrder, flat)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *by_grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        how, second_order = saved_record(ctx, Differentiated)
        inputs, cotangents = flatten(second_order.inputs), flatten(second_order.cotangents)
        nothing = unflatten(SecondOrder, [None] * len(flatten(second_order)))
        asked = [k for k, by in enumerate(by_grads) if by is not None]
        if not asked:
            return None, *flatten(nothing)
        primals = dict(enumerate([*inputs, *cotangents]))
        primals = {k: tensor for k, tensor in primals.items() if tensor is not None}

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            """The gradients that were asked for, as the composed recurrence has them."""
            at = dict(zip(primals, tensors, strict=True))
            arguments = [at.get(k) for k in range(len(inputs))]

            def outputs_of(*differentiated: Tensor) -> tuple[Tensor, ...]:
                every = dict(enumerate(arguments)) | dict(zip(asked, differentiated, strict=True))
                return composed.recurrences(how, unflatten(Inputs, list(every.values())))[:4]

            outputs, pull = torch.func.vjp(outputs_of, *(at[k] for k in asked))[:2]
            by = [at.get(len(inputs) + k) for k in range(len(cotangents))]
            pairs = zip(by, outputs, strict=True)
            return pull(tuple(torch.zeros_like(output) if by is None else by for by, output in pairs))

        pull = torch.func.vjp(first, *primals.values())[1]
        second = dict(zip(primals, pull(tuple(by_grads[k] for k in asked)), strict=True))
        found = [second.get(k) for k in range(len(inputs) + len(cotangents))]
        return None, *found, *flatten(nothing.grads)


@record
class Differentiated(NamedTuple):
    """What Gradients saves."""

    how: Recurrence
    second_order: SecondOrder
