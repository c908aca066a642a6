"""LSTMFunction: one layer and direction under autograd, and the matrix products that are parallel over time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composed, operators
from .kernels.launch import Layout, accumulator

Rows = slice | Tensor


class Sequence(NamedTuple):
    """Where the steps of one direction lie among the rows of the flattened (rows, features) sequence.

    It holds tensors and flags alone, no sizes: torch.compile would take those for constants. The tensors come first and
    are arguments of the Functions in their own right: torch.vmap sees no others.

    lengths, offsets, starts: the layout of the kernels.
    last: the rows of each batch row's last step in time, where they are not the last B rows; of a batch row without
        steps some row that no kernel touches.
    earlier: the rows of the step before that of each row from B on, where it is not B rows before.
    reverse: the direction runs from the last step to the first.
    reset_to_hx: at layout.starts the state becomes hx; otherwise zero.
    """

    lengths: Tensor | None = None
    offsets: Tensor | None = None
    starts: Tensor | None = None
    last: Tensor | None = None
    earlier: Tensor | None = None
    reverse: bool = False
    reset_to_hx: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(*self[:3])

    @staticmethod
    def padded(layout: Layout, reset_to_hx: bool) -> "Sequence":
        """layout: with lengths (B,) and starts (T, B), if any."""
        whole = Sequence(layout.lengths, None, layout.starts, reset_to_hx=reset_to_hx)
        if layout.lengths is None:
            return whole
        B, device = layout.lengths.shape[0], layout.lengths.device
        return whole._replace(last=(layout.lengths - 1).clamp(min=0) * B + torch.arange(B, device=device))

    @staticmethod
    def packed(batch_sizes: Tensor, device: torch.device) -> "Sequence":
        """batch_sizes: (T,) int64 on the CPU, as in a PackedSequence."""
        B = int(batch_sizes[0])
        offsets = batch_sizes.cumsum(0) - batch_sizes
        # Step t has batch_sizes[t] - batch_sizes[t + 1] rows more than the next: so many sequences end with it.
        ended = torch.diff(batch_sizes, append=batch_sizes.new_zeros(1)).neg()
        lengths = torch.arange(1, len(batch_sizes) + 1).repeat_interleave(ended).flip(0)
        last = offsets[lengths - 1] + torch.arange(B)
        earlier = torch.arange(B, int(batch_sizes.sum())) - batch_sizes[:-1].repeat_interleave(batch_sizes[1:])
        lengths, offsets, last, earlier = (index.to(device) for index in (lengths, offsets, last, earlier))
        return Sequence(lengths, offsets, None, last, earlier)

    def reversed(self) -> "Sequence":
        """The other direction over the same rows: what is cut before a step in one is cut after it in the other."""
        starts = self.starts
        if starts is not None:
            starts = torch.cat([starts[1:], torch.zeros_like(starts[:1])])
            if self.lengths is not None:
                following = torch.arange(1, len(starts) + 1, device=starts.device)[:, None]
                starts &= following < self.lengths
        return self._replace(starts=starts, reverse=not self.reverse)

    def places(self, B: int, rows: int) -> tuple[Rows, Rows, Rows, Rows]:
        """The rows of each batch row's first step in the direction's order, of its last, of all steps but the first,
        and of the step before each of those."""
        first, last = slice(B), slice(rows - B, rows) if self.last is None else self.last
        later, earlier = slice(B, rows), slice(rows - B) if self.earlier is None else self.earlier
        return (last, first, earlier, later) if self.reverse else (first, last, later, earlier)

    def without_steps(self) -> Tensor | None:
        """(B, 1) bool, the batch rows of no step at all; None where there are none."""
        return (self.lengths == 0)[:, None] if self.lengths is not None and self.offsets is None else None


@contextmanager
def matmul_precision(like: Tensor, ieee: bool) -> Iterator[None]:
    """Holds torch's float32 matrix products on CUDA to the precision that cuDNN's own switch asks of nn.LSTM.

    A compiled graph cannot change a global switch: there they follow torch's own, as the rest of the graph does.
    """
    if not like.is_cuda or like.dtype != torch.float32 or torch.compiler.is_compiling():
        yield
        return
    matmul = torch.backends.cuda.matmul
    saved, matmul.fp32_precision = matmul.fp32_precision, "ieee" if ieee else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = saved


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
    states: also return the cells of all steps; ieee: float32 products in full precision.
    Outputs: y like x with Hout features; hn (B, Hout); cn (B, H); the cells like x with H features, None without
    states; and, kept for backward only, h, c and gates.

    A projection W_hr needs no kernel of its own: with y_t = W_hr h_t, the recurrent term W_hh y_{t-1} equals
    (W_hh W_hr) h_{t-1}. So the kernels run on h with the product of both weights, only the first step takes
    W_hh h0, and projecting h is one product parallel over time. A reset takes the same way: the kernels go on from
    h = 0, and where the state becomes hx, W_hh h0 is in input_gates.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        sequence, (save, states, ieee) = Sequence(*rest[:7]), rest[7:]
        lead = x.shape[:-1]
        bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
        with matmul_precision(x, ieee):
            input_gates = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight_ih, bias)
            begin, end, _, _ = sequence.places(h0.shape[0], input_gates.shape[0])
            recurrent, start, layout, c_reset = weight_hh, h0, sequence.layout, None
            if layout.starts is not None:
                starts = layout.starts.reshape(-1, 1)
                c_reset = (c0 if sequence.reset_to_hx else torch.zeros_like(c0)).to(accumulator(c0.dtype)).contiguous()
            to_hx = c_reset is not None and sequence.reset_to_hx
            if weight_hr is not None or to_hx:
                gates_of_h0 = h0 @ weight_hh.T
            if weight_hr is not None:
                input_gates[begin] += gates_of_h0 if c_reset is None else gates_of_h0 * ~starts[begin]
                recurrent, start = weight_hh @ weight_hr, torch.zeros_like(c0)
            if to_hx:
                every_step = gates_of_h0.expand(*lead, -1).reshape(input_gates.shape)
                input_gates.addcmul_(starts.to(x.dtype), every_step)
            h, cn, c, gates = operators.forward(
                input_gates.view(*lead, input_gates.shape[-1]),
                recurrent,
                start,
                c0,
                c_reset,
                *layout,
                sequence.reverse,
                save or states,
                ieee,
            )
            y = h if weight_hr is None else h @ weight_hr.T
        hn = y.view(-1, y.shape[-1])[end]
        if (without_steps := sequence.without_steps()) is not None:
            hn = torch.where(without_steps, h0, hn)
        elif isinstance(end, slice):
            hn = hn.clone()  # shares no memory with y
        cells = c.to(x.dtype, copy=True) if states else None
        return y, hn, cn.to(c0.dtype), cells, None if weight_hr is None else h, c, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, reverse, reset_to_hx, save, _, ctx.ieee = inputs
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
        with torch.no_grad():
            grads = LSTMFunction.gradients(ctx, dy, dhn, dcn, dcells)
        if torch.is_grad_enabled():  # someone wants to differentiate once more
            tensors, sequence = ctx.saved_tensors[:8], ctx.saved_tensors[8:13]
            grads = Gradients.apply(*sequence, *ctx.flags, *tensors, dy, dhn, dcn, dcells, *grads)
        return *grads, *[None] * 10

    @staticmethod
    def gradients(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None, dcells: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each tensor that forward() takes, None where none is needed."""
        x, h0, c0, weight_ih, weight_hh, bias, _, weight_hr, *places, y, h, c, gates = ctx.saved_tensors
        sequence, ieee, needs = Sequence(*places, *ctx.flags), ctx.ieee, ctx.needs_input_grad
        layout = sequence.layout
        dy = torch.zeros_like(y) if dy is None else dy
        dhn = torch.zeros_like(h0) if dhn is None else dhn
        dcn = torch.zeros_like(c0) if dcn is None else dcn
        dx = dh0 = dc0 = dweight_ih = dweight_hh = dbias = dweight_hr = None
        with matmul_precision(x, ieee):
            dh, dh_end, recurrent = dy, dhn, weight_hh
            if weight_hr is not None:
                dh, dh_end, recurrent = dy @ weight_hr, dhn @ weight_hr, weight_hh @ weight_hr
            c_first, c_reset = c0.to(c.dtype).contiguous(), None
            if layout.starts is not None:
                c_reset = c_first if sequence.reset_to_hx else torch.zeros_like(c_first)
            dgates, dc0, dc_reset = operators.backward(
                dh,
                dh_end,
                dcn,
                recurrent,
                c_first,
                c,
                gates,
                dcells,
                c_reset,
                *layout,
                sequence.reverse,
                ieee,
            )

            # From here on everything is parallel over time; the numbers are those of kernels/README.md.
            dgates, y = dgates.view(-1, dgates.shape[-1]), y.view(-1, y.shape[-1])
            start, end, current, previous = sequence.places(h0.shape[0], dgates.shape[0])
            # What went into the gates from h0, (B, 4H), and from the step before.
            from_h0, from_h = dgates[start], dgates[current]
            if layout.starts is not None:
                starts = layout.starts.reshape(-1, 1)
                from_h0, from_h = from_h0 * ~starts[start], from_h * ~starts[current]
                if sequence.reset_to_hx:
                    from_h0 = from_h0 + (dgates * starts).view(-1, *from_h0.shape).sum(0)
                    dc0 = dc0 + dc_reset
            if needs[0]:
                dx = (dgates @ weight_ih).view(x.shape)  # (9)
            if needs[1]:
                dh0 = from_h0 @ weight_hh  # (10)
                if (without_steps := sequence.without_steps()) is not None:
                    dh0 = torch.where(without_steps, dhn, dh0)
            if needs[3]:
                dweight_ih = dgates.T @ x.reshape(-1, x.shape[-1])  # (11)
            if needs[4]:
                dweight_hh = torch.addmm(from_h0.T @ h0, from_h.T, y[previous])  # (12)
            if bias is not None and (needs[5] or needs[6]):
                dbias = dgates.sum(0)  # (13)
            if needs[7]:
                h = h.view(-1, h.shape[-1])
                ends = torch.addmm(dhn.T @ h[end], dy.reshape(-1, dy.shape[-1]).T, h)
                dweight_hr = torch.addmm(ends, (from_h @ weight_hh).T, h[previous])  # (14)
        return (
            dx,
            dh0,
            dc0.to(c0.dtype) if needs[2] else None,
            dweight_ih,
            dweight_hh,
            dbias if needs[5] else None,
            dbias.clone() if dbias is not None and needs[6] else None,
            dweight_hr,
        )
