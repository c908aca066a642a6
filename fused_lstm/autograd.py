"""LSTMFunction: one layer and direction under autograd."""

from typing import Any

import torch
from torch import Tensor

from . import chunks, composed, layer
from .layer import Sequence


class Gradients(torch.autograd.Function):
    """The gradients that the kernels have computed, to be differentiated once more.

    Takes the sequence's seven; x, h0, c0 and the five weights; the cotangents of y, hn, cn and the cells; then the
    gradients of the eight, which it passes on. The derivative is that of the layer composed of torch operations: slow,
    but needed by few. Were it a node of the layer itself, all who ask for create_graph, as torch.func.grad always does,
    would pay.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in args[19:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.flags = inputs[5:7]
        ctx.save_for_backward(*inputs[:5], *inputs[7:19])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        sequence, saved = Sequence(*ctx.saved_tensors[:5], *ctx.flags), ctx.saved_tensors[5:]
        present = [k for k, tensor in enumerate(saved) if tensor is not None]
        asked = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]
        if not asked:
            return (None,) * 27

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            """The gradients that were asked for, as the composed layer has them."""
            whole: list[Any] = [None] * 12
            for k, tensor in zip(present, tensors, strict=True):
                whole[k] = tensor

            def layer(*given: Tensor) -> tuple[Tensor, ...]:
                arguments = whole[:8]
                for k, tensor in zip(asked, given, strict=True):
                    arguments[k] = tensor
                return composed.layer(*arguments, sequence)[:4]  # type: ignore[call-arg]

            outputs, pull = torch.func.vjp(layer, *(whole[k] for k in asked))[:2]
            pairs = zip(whole[8:], outputs, strict=True)
            return pull(tuple(torch.zeros_like(output) if by is None else by for by, output in pairs))

        pull = torch.func.vjp(first, *(saved[k] for k in present))[1]
        second = dict(zip(present, pull(tuple(cotangents[k] for k in asked)), strict=True))
        return *[None] * 7, *(second.get(k) for k in range(12)), *[None] * 8


class LSTMFunction(torch.autograd.Function):
    """One layer and direction.

    Inputs: x (T, B, I) or (rows, I) packed; h0 (B, Hout); c0 (B, H); weight_ih (4H, I); weight_hh (4H, Hout);
    bias_ih, bias_hh (4H) or None; weight_hr (P, H) or None; the sequence's seven; save: keep what backward needs;
    states: also return the cells of all steps; ieee: float32 products in full precision; chunk: keep the states between
    chunks of so many steps alone, and recompute the rest in backward; 0: keep h, c and gates of every step.
    Outputs: y like x with Hout features; hn (B, Hout); cn (B, H); the cells like x with H features, None without
    states; and, kept for backward only, h, c and gates, or of recomputing the states h and c between the chunks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, h0: Tensor, c0: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        weights, sequence, (save, states, ieee, chunk) = rest[:5], Sequence(*rest[5:12]), rest[12:]
        if chunk:
            places = *sequence.layout, sequence.earlier, sequence.reverse, sequence.reset_to_hx
            y, hn, cn, cells, h, c = chunks.forward(x, h0, c0, *weights, *places, states, chunk, ieee)
            return y, hn, cn, cells if states else None, h, c, None
        y, hn, cn, h, c, gates = layer.forward(x, h0, c0, weights, sequence, (h0, c0), save or states, ieee)
        cells = c.to(x.dtype, copy=True) if states else None
        return y, hn, cn.to(c0.dtype), cells, None if h is y else h, c, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, reverse, reset_to_hx, save, _, ctx.ieee, ctx.chunk = inputs
        ctx.flags = reverse, reset_to_hx
        y, _, _, _, h, c, gates = output
        ctx.mark_non_differentiable(*(t for t in (h, c, gates) if t is not None))
        ctx.set_materialize_grads(False)
        if save:
            ctx.save_for_backward(*tensors, y, h, c, gates)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, dcells: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under a checkpoint each look unpacks
        with torch.no_grad():
            grads = LSTMFunction.gradients(ctx, saved, dy, dhn, dcn, dcells)
        if torch.is_grad_enabled():  # someone wants to differentiate once more
            tensors, sequence = saved[:8], saved[8:13]
            grads = Gradients.apply(*sequence, *ctx.flags, *tensors, dy, dhn, dcn, dcells, *grads)
        return *grads, *[None] * 11

    @staticmethod
    def gradients(
        ctx: Any,
        saved: tuple[Any, ...],
        dy: Tensor | None,
        dhn: Tensor | None,
        dcn: Tensor | None,
        dcells: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each tensor that forward() takes, None where none is needed."""
        x, h0, c0, *weights = saved[:8]
        y, h, c, gates = saved[13:]
        sequence, needs = Sequence(*saved[8:13], *ctx.flags), list(ctx.needs_input_grad[:8])
        dy = torch.zeros_like(y) if dy is None else dy
        dhn = torch.zeros_like(h0) if dhn is None else dhn
        dcn = torch.zeros_like(c0) if dcn is None else dcn
        inputs = x, h0, c0
        if ctx.chunk:
            places = *sequence.layout, sequence.earlier, *ctx.flags
            given = chunks.backward(
                dy, dhn, dcn, dcells, *inputs, *weights, *places, y, h, c, needs, ctx.chunk, ctx.ieee
            )
            dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr = given
        else:
            hx = h0, c0
            grads = layer.gradients(
                dy, dhn, dcn, dcells, *inputs, tuple(weights), sequence, hx, y, h, c, gates, needs, ctx.ieee
            )
            dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr, dh_reset, dc_reset = grads
            if dc_reset is not None:
                dc0 = dc0 + dc_reset
            if dh0 is not None and dh_reset is not None:
                dh0 = dh0 + dh_reset
            dc0 = dc0.to(c0.dtype)
        dbiases = dbias, dbias.clone() if dbias is not None and needs[6] else None
        results = dx, dh0, dc0, dweight_ih, dweight_hh, *dbiases, dweight_hr
        return tuple(grad if needed else None for grad, needed in zip(results, needs, strict=True))
