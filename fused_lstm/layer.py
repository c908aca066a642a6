"""One layer and direction around the kernels: where its steps lie, and the products that are parallel over time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .kernels.launch import Layout, accumulator

Rows = slice | Tensor
# weight_ih (4H, I), weight_hh (4H, Hout), bias_ih and bias_hh (4H) or None, weight_hr (P, H) or None.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


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

    def chunks(self, T: int, B: int, rows: int, length: int) -> Iterator[tuple["Sequence", slice, int]]:
        """Cuts T steps into chunks of `length` steps, in the direction's order: yields each as a Sequence of its own,
        where it lies in the first dimension of the whole, and how many batch rows it has."""
        begins = range(0, T, length)
        # Where packed steps lie has to be asked for, once.
        firsts = [] if self.offsets is None else [*self.offsets.tolist(), rows]
        for k in reversed(range(len(begins))) if self.reverse else range(len(begins)):
            begin, end = begins[k], min(begins[k] + length, T)
            lengths = None if self.lengths is None else (self.lengths - begin).clamp(0, end - begin)
            if self.offsets is None or self.earlier is None or lengths is None:
                starts = None if self.starts is None else self.starts[begin:end]
                chunk = Sequence.padded(Layout(lengths, None, starts), self.reset_to_hx)
                yield chunk._replace(reverse=self.reverse), slice(begin, end), B
                continue
            first, last, present = firsts[begin], firsts[end], firsts[begin + 1] - firsts[begin]
            lengths, steps = lengths[:present], self.offsets[begin:end] - first
            ends = steps[lengths - 1] + torch.arange(present, device=steps.device)
            earlier = self.earlier[first + present - B : last - B] - first
            yield Sequence(lengths, steps, None, ends, earlier, self.reverse), slice(first, last), present

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


def outer(a: Tensor, b: Tensor, sum: Tensor | None = None, wide: bool = False) -> Tensor:
    """sum + a^T b; wide: in the accumulator's dtype."""
    if wide and a.dtype != accumulator(a.dtype):
        product = torch.mm(a.T, b, out_dtype=torch.float32) if a.is_cuda else a.T.float() @ b.float()
        return product if sum is None else product + sum
    return a.T @ b if sum is None else torch.addmm(sum, a.T, b)


def gates_of(
    x: Tensor,
    h0: Tensor | None,
    weights: Weights,
    sequence: Sequence,
    h_reset: Tensor,
) -> Tensor:
    """x W_ih^T + b, (rows, 4H), with W_hh h of the states that the layer is set to: h0 (B, Hout) in the first step, if
    it is not the kernels' to add, and h_reset (B, Hout) at resets to hx."""
    weight_ih, weight_hh, bias_ih, bias_hh, _ = weights
    bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
    gates = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight_ih, bias)
    starts = None if sequence.starts is None else sequence.starts.reshape(-1, 1)
    if h0 is not None:
        begin, _, _, _ = sequence.places(h0.shape[0], gates.shape[0])
        gates_of_h0 = h0 @ weight_hh.T
        gates[begin] += gates_of_h0 if starts is None else gates_of_h0 * ~starts[begin]
    if starts is not None and sequence.reset_to_hx:
        every_step = (h_reset @ weight_hh.T).expand(*x.shape[:-1], -1).reshape(gates.shape)
        gates.addcmul_(starts.to(x.dtype), every_step)
    return gates


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Weights,
    sequence: Sequence,
    reset_to: tuple[Tensor, Tensor],
    save: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the layer.

    A projection W_hr needs no kernel of its own: with y_t = W_hr h_t, the recurrent term W_hh y_{t-1} equals
    (W_hh W_hr) h_{t-1}. So the kernels run on h with the product of both weights, only the first step takes
    W_hh h0, and projecting h is one product parallel over time. A reset takes the same way: the kernels go on from
    h = 0, and where the state becomes hx, W_hh h0 is in input_gates.

    Args:
        x: (T, B, I), or (rows, I) packed. h0: (B, Hout). c0: (B, H), in its dtype or the accumulator's.
        reset_to: the state at resets to hx, of the shapes of h0 and c0.
        save: keep c and gates. ieee: float32 products in full precision.

    Returns:
        y: like x with Hout features; hn: (B, Hout); cn: (B, H) in the accumulator's dtype; h: like x with H features, y
        itself without a projection; c and gates, as the kernel saves them, empty without save.
    """
    weight_hh, weight_hr = weights[1], weights[4]
    lead = x.shape[:-1]
    with matmul_precision(x, ieee):
        input_gates = gates_of(x, None if weight_hr is None else h0, weights, sequence, reset_to[0])
        recurrent, start, layout, c_reset = weight_hh, h0, sequence.layout, None
        if layout.starts is not None:
            c_reset = reset_to[1] if sequence.reset_to_hx else torch.zeros_like(c0)
            c_reset = c_reset.to(accumulator(c0.dtype)).contiguous()
        if weight_hr is not None:
            recurrent, start = weight_hh @ weight_hr, torch.zeros_like(c0, dtype=x.dtype)
        h, cn, c, gates = operators.forward(
            input_gates.view(*lead, input_gates.shape[-1]),
            recurrent,
            start,
            c0,
            c_reset,
            *layout,
            sequence.reverse,
            save,
            ieee,
        )
        y = h if weight_hr is None else h @ weight_hr.T
    _, end, _, _ = sequence.places(h0.shape[0], input_gates.shape[0])
    hn = y.view(-1, y.shape[-1])[end]
    if (without_steps := sequence.without_steps()) is not None:
        hn = torch.where(without_steps, h0, hn)
    elif isinstance(end, slice):
        hn = hn.clone()  # shares no memory with y
    return y, hn, cn, h, c, gates


class Grads(NamedTuple):
    """The gradients of what the layer takes, and of the states that its resets go to; None where none is needed."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor
    weight_ih: Tensor | None
    weight_hh: Tensor | None
    bias: Tensor | None
    weight_hr: Tensor | None
    h_reset: Tensor | None
    c_reset: Tensor | None


def gradients(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Weights,
    sequence: Sequence,
    reset_to: tuple[Tensor, Tensor],
    y: Tensor,
    h: Tensor | None,
    c: Tensor,
    gates: Tensor,
    needs: Iterable[bool],
    ieee: bool,
    wide: bool = False,
) -> Grads:
    """The gradients of forward().

    Args:
        dy, dhn, dcn: as y, hn and cn; dcells: as c, None if the cells of all steps have none.
        x to reset_to: as given to forward(). y, c, gates: as it returned them; h too, under a projection.
        needs: whether x, h0, c0 and the five weights need one. ieee: as given to forward().
        wide: those of the weights in the accumulator's dtype.

    Returns:
        The Grads, that of c0 and c_reset in the accumulator's dtype.
    """
    weight_ih, weight_hh, bias, _, weight_hr = weights
    layout, needs = sequence.layout, list(needs)
    dx = dh0 = dweight_ih = dweight_hh = dbias = dweight_hr = from_reset = None
    with matmul_precision(x, ieee):
        dh, dh_end, recurrent = dy, dhn, weight_hh
        if weight_hr is not None:
            dh, dh_end, recurrent = dy @ weight_hr, dhn @ weight_hr, weight_hh @ weight_hr
        c_first, c_reset = c0.to(c.dtype).contiguous(), None
        if layout.starts is not None:
            c_reset = reset_to[1].to(c.dtype).contiguous() if sequence.reset_to_hx else torch.zeros_like(c_first)
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
                from_reset = (dgates * starts).view(-1, *from_h0.shape).sum(0)
        if needs[0]:
            dx = (dgates @ weight_ih).view(x.shape)  # (9)
        if needs[1]:
            dh0 = from_h0 @ weight_hh  # (10)
            if (without_steps := sequence.without_steps()) is not None:
                dh0 = torch.where(without_steps, dhn, dh0)
        if needs[3]:
            dweight_ih = outer(dgates, x.reshape(-1, x.shape[-1]), None, wide)  # (11)
        if needs[4]:
            of_h0 = outer(from_h0, h0, None, wide)
            if from_reset is not None:
                of_h0 = outer(from_reset, reset_to[0], of_h0, wide)
            dweight_hh = outer(from_h, y[previous], of_h0, wide)  # (12)
        if bias is not None and (needs[5] or needs[6]):
            dbias = dgates.sum(0, dtype=accumulator(x.dtype) if wide else None)  # (13)
        if needs[7] and h is not None:
            h = h.view(-1, h.shape[-1])
            ends = outer(dy.reshape(-1, dy.shape[-1]), h, outer(dhn, h[end], None, wide), wide)
            dweight_hr = outer(from_h @ weight_hh, h[previous], ends, wide)  # (14)
        dh_reset = from_reset @ weight_hh if from_reset is not None and needs[1] else None
    dc_reset = dc_reset if from_reset is not None else None
    return Grads(dx, dh0, dc0, dweight_ih, dweight_hh, dbias, dweight_hr, dh_reset, dc_reset)
