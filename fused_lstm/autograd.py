"""LSTMFunction: what runs in one launch, a layer's directions or a stack of layers, under autograd."""

import inspect
from typing import Any

import torch
from torch import Tensor

from . import chunks, composed, layer
from .layer import Members, Weights, stacked, together
from .sequence import Sequence

OF_MEMBER = 5  # tensors


def by_member(flat: tuple[Any, ...]) -> list[Weights]:
    return [flat[k : k + OF_MEMBER] for k in range(0, len(flat), OF_MEMBER)]


class Gradients(torch.autograd.Function):
    """The gradients that the kernels have computed, to be differentiated once more.

    Takes reverse, reset_to_hx, batch_first and whether the members are layers; the sequence's five tensors, seed and
    keep; how many tensors have a gradient; those: x, h0, c0 and the weights; the cotangents of y, hn, cn and the cells;
    then the gradients, which it passes on. The derivative is that of the recurrence composed of torch operations: slow,
    but needed by few. Were it a node of the layer itself, all who ask for create_graph, as torch.func.grad always does,
    would pay.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in args[16 + args[11] :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.flags, ctx.count = inputs[:4], inputs[11]
        ctx.save_for_backward(*inputs[4:11], *inputs[12 : 16 + ctx.count])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count, saved = ctx.count, ctx.saved_tensors[7:]
        *of_sequence, layers = ctx.flags
        sequence = Sequence(*ctx.saved_tensors[:5], *of_sequence)
        members = Members(layers, False, *ctx.saved_tensors[5:7])
        present = [k for k, tensor in enumerate(saved) if tensor is not None]
        asked = [k for k, cotangent in enumerate(cotangents) if cotangent is not None]
        if not asked:
            return (None,) * (16 + 2 * count)

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            """The gradients that were asked for, as the composed recurrence has them."""
            whole: list[Any] = [None] * (count + 4)
            for k, tensor in zip(present, tensors, strict=True):
                whole[k] = tensor

            def recurrence(*given: Tensor) -> tuple[Tensor, ...]:
                arguments = whole[:count]
                for k, tensor in zip(asked, given, strict=True):
                    arguments[k] = tensor
                x, h0, c0, *weights = arguments
                return composed.members(x, h0, c0, by_member(tuple(weights)), sequence, members)[:4]

            outputs, pull = torch.func.vjp(recurrence, *(whole[k] for k in asked))[:2]
            pairs = zip(whole[count:], outputs, strict=True)
            return pull(tuple(torch.zeros_like(output) if by is None else by for by, output in pairs))

        pull = torch.func.vjp(first, *(saved[k] for k in present))[1]
        second = dict(zip(present, pull(tuple(cotangents[k] for k in asked)), strict=True))
        return *[None] * 12, *(second.get(k) for k in range(count + 4)), *[None] * count


class LSTMFunction(torch.autograd.Function):
    """The directions of a layer, or a stack of layers: M members.

    Inputs: x (T, B, I), (B, T, I) or (rows, I) packed; h0 (M, B, Hout); c0 (M, B, H); the sequence's eight; the
    Members' four; save: keep what backward needs; states: also return the cells of all steps, not of a stack; ieee:
    float32 products in full precision; chunk: keep the states between chunks of so many steps alone, and recompute the
    rest in backward; 0: keep c and gates of every step; then of each member weight_ih (4H, I), weight_hh (4H, Hout),
    bias_ih and bias_hh (4H) or None, weight_hr (P, H) or None.
    Outputs: y like x with D*Hout features; hn (M, B, Hout); cn (M, B, H); kept for backward only, c and gates, or of
    recomputing the states c and h between the chunks of each direction; last, with states, the cells like x with D*H
    features, or of a stack, kept for backward only, y of all layers; otherwise None. It is last because torch 2.11's
    compiler counts the outputs behind a None wrong, and would take hn for one that has no gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, h0: Tensor, c0: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        sequence, members, (save, states, ieee, chunk) = Sequence(*rest[:8]), Members(*rest[8:12]), rest[12:16]
        weights = by_member(rest[16:])
        if chunk:
            parts = []
            for d, own in enumerate(sequence.each(len(weights))):
                parts.append(
                    chunks.forward(x, h0[d], c0[d], *weights[d], *places(own), states, chunk, ieee, members.projects)
                )
            of_y, of_h, of_c, of_cells, *between = (list(tensors) for tensors in zip(*parts, strict=True))
            h, c = map(stacked, between)
            return together(of_y), stacked(of_h), stacked(of_c), c, h, together(of_cells) if states else None
        y, hn, cn, c, gates = layer.forward(x, h0, c0, weights, sequence, members, (h0, c0), save or states, ieee)
        top, last = y, c.to(x.dtype, copy=True) if states else None
        if members.layers:
            # Without backward a copy, or the last layer's y would hold those of all.
            top, last = (y[-1], y) if save else (y[-1].clone(), None)
        # .to() would return the same tensor under a second name, of which torch 2.11's compiler loses the gradient.
        return top, hn, cn if cn.dtype == c0.dtype else cn.to(c0.dtype), c, gates, last

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, h0, c0, *places = inputs[:8]
        *ctx.flags, ctx.projects, seed, keep, save, _, ctx.ieee, ctx.chunk = inputs[8:19]
        y, _, _, *kept, last = output
        of_layers = ctx.flags[-1] and save
        ctx.mark_non_differentiable(*kept, *([last] if of_layers else []))
        ctx.set_materialize_grads(False)
        if save:
            ctx.save_for_backward(*places, seed, keep, last if of_layers else y, *kept, x, h0, c0, *inputs[19:])

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *_, dcells = rest  # what is kept has none
        saved = ctx.saved_tensors  # once: under a checkpoint each look unpacks
        with torch.no_grad():
            grads = LSTMFunction.gradients(ctx, saved, dy, dhn, dcn, dcells)
        if torch.is_grad_enabled():  # someone wants to differentiate once more
            tensors = saved[10:]
            cotangents = dy, dhn, dcn, dcells
            grads = Gradients.apply(*ctx.flags, *saved[:7], len(tensors), *tensors, *cotangents, *grads)
        return *grads[:3], *[None] * 16, *grads[3:]

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
        *of_sequence, layers = ctx.flags
        sequence, members = Sequence(*saved[:5], *of_sequence), Members(layers, ctx.projects, *saved[5:7])
        y, c, gates_or_h, x, h0, c0 = saved[7:13]
        weights = by_member(saved[13:])
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[19:]]
        dy = torch.zeros_like(y[-1] if members.layers else y) if dy is None else dy
        if dhn is None or dcn is None:
            zeros = torch.zeros_like(c0)
            dhn = zeros[..., : h0.shape[2]] if dhn is None else dhn
            dcn = zeros if dcn is None else dcn
        if ctx.chunk:
            grads = LSTMFunction.in_chunks(
                ctx, dy, dhn, dcn, dcells, x, h0, c0, weights, sequence, y, gates_or_h, c, needs
            )
        else:
            hx, of_time = (h0, c0), (y, c, gates_or_h)
            found = layer.gradients(
                dy, dhn, dcn, dcells, x, *hx, weights, sequence, members, hx, *of_time, needs, ctx.ieee
            )
            dh0, dc0 = found.h0, found.c0
            if found.c_reset is not None:
                dc0 = dc0 + found.c_reset
            if dh0 is not None and found.h_reset is not None:
                dh0 = dh0 + found.h_reset
            grads = [found.x, dh0, dc0.to(c0.dtype)]
            for m, (dweight_ih, dweight_hh, dbias, dweight_hr) in enumerate(found.weights):
                other = dbias.clone() if dbias is not None and needs[6 + OF_MEMBER * m] else None
                grads += [dweight_ih, dweight_hh, dbias, other, dweight_hr]
        return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))

    @staticmethod
    def in_chunks(
        ctx: Any,
        dy: Tensor,
        dhn: Tensor,
        dcn: Tensor,
        dcells: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weights: list[Weights],
        sequence: Sequence,
        y: Tensor,
        h: Tensor,
        c: Tensor,
        needs: list[bool],
    ) -> list[Tensor | None]:
        """As gradients(); each direction's chunks in an order of their own."""
        D, of_x, of_states, grads = len(weights), [], [], []
        for d, own in enumerate(sequence.each(D)):
            asked = needs[:3] + needs[3 + OF_MEMBER * d : 8 + OF_MEMBER * d]
            by_y, by_cells = dy.chunk(D, -1)[d], None if dcells is None else dcells.chunk(D, -1)[d]
            inputs = x, h0[d], c0[d], *weights[d], *places(own), y.chunk(D, -1)[d], h[d], c[d]
            given = chunks.backward(by_y, dhn[d], dcn[d], by_cells, *inputs, asked, ctx.chunk, ctx.ieee, ctx.projects)
            dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr = given
            of_x.append(dx)
            of_states.append((dh0, dc0))
            other = dbias.clone() if needs[6 + OF_MEMBER * d] else None
            grads += [dweight_ih, dweight_hh, dbias, other, dweight_hr]
        dh0, dc0 = (stacked(list(states)) for states in zip(*of_states, strict=True))
        return [sum(of_x[1:], of_x[0]), dh0, dc0, *grads]


# torch binds the arguments of every call to it, and would make it anew each time.
LSTMFunction.forward.__signature__ = inspect.signature(LSTMFunction.forward)  # type: ignore[attr-defined]


def places(sequence: Sequence) -> tuple[Any, ...]:
    """What the operators of chunks.py take of a sequence."""
    return *sequence.layout[:3], sequence.earlier, sequence.reverse, sequence.reset_to_hx
