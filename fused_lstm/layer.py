"""What runs in one launch, around the kernels: a layer's directions, or a stack of layers; and the products that are
parallel over time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .kernels.layout import Layout, accumulator
from .sequence import Sequence

# weight_ih (4H, I), weight_hh (4H, Hout), bias_ih and bias_hh (4H) or None, weight_hr (P, H) or None.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def named(weights: list[Tensor], bias: bool, members: int) -> list[Weights]:
    """The Weights of each of so many members, which nn.LSTM has in a row without the absent ones."""
    each, found = len(weights) // members, []
    for k in range(0, len(weights), each):
        weight_ih, weight_hh, *rest = weights[k : k + each]
        bias_ih, bias_hh = rest[:2] if bias else (None, None)
        found.append((weight_ih, weight_hh, bias_ih, bias_hh, rest[-1] if len(rest) % 2 else None))
    return found


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


class Members(NamedTuple):
    """What the members of a launch are to each other.

    layers: layers, each of which takes what the one below gives; otherwise the directions of one layer.
    projects: the projection, if there is one, is in the kernel, and not folded into W_hh.
    seed, keep: of the dropout between layers, as the kernels take them; None without.
    """

    layers: bool = False
    projects: bool = False
    seed: Tensor | None = None
    keep: Tensor | None = None

    def weight_ih(self, weights: list[Weights]) -> Tensor | None:
        """(L - 1, 4H, H), of the layers above the first; None without a stack."""
        return torch.stack([w[0] for w in weights[1:]]) if self.layers else None

    def bias(self, weights: list[Weights]) -> Tensor | None:
        """(L - 1, 4H), of the same."""
        upper = weights[1:]
        return torch.stack(biases_of(upper) or [w[0].new_zeros(len(w[0])) for w in upper]) if self.layers else None

    def directions(self, M: int) -> int:
        """D of M members."""
        return 1 if self.layers else M

    def each(self, tensor: Tensor, M: int) -> list[Tensor]:
        """The (rows, features) of each member in a tensor of all M, as the kernels lay them out."""
        if self.layers:
            return list(tensor.reshape(M, -1, tensor.shape[-1]).unbind())
        flat = tensor.reshape(-1, tensor.shape[-1])
        return [flat] if M == 1 else list(flat.chunk(M, -1))

    def drop(self, y: Tensor, layer: int, B: int, sequence: Sequence) -> Tensor:
        """What the layer above takes of a layer's y, flat as y is."""
        if self.seed is None or self.keep is None:
            return y
        sizes = (B, -1) if sequence.batch_first else (-1, B)
        given = y if sequence.offsets is not None else y.view(*sizes, y.shape[-1])
        tensors = given, self.seed, self.keep, *sequence.layout
        return operators.run(operators.dropout, *tensors, layer, B).view(y.shape)


def starts_of(sequences: list[Sequence]) -> Tensor:
    """The starts of all directions; torch.vmap must see where the steps and rows of each are."""
    starts = [sequence.starts for sequence in sequences if sequence.starts is not None]
    return starts[0] if len(starts) == 1 else torch.stack(starts)


def biases_of(weights: list[Weights]) -> list[Tensor]:
    """(4H) of each member; none without."""
    return [b_ih + b_hh for _, _, b_ih, b_hh, _ in weights if b_ih is not None and b_hh is not None]


def together(tensors: list[Tensor], dim: int = -1) -> Tensor:
    """torch.cat, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def stacked(tensors: list[Tensor]) -> Tensor:
    """torch.stack, without a copy of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def projected(each: list[Tensor], by: list[Tensor]) -> Tensor:
    """The (rows, features) of all directions, each multiplied by its own matrix."""
    return together([rows @ matrix for rows, matrix in zip(each, by, strict=True)])


def recurrent(weights: list[Weights], folds: bool) -> Tensor:
    """(M, 4H, H), the product that a step of each member takes, or (M, 4H, P) of those that do not fold their
    projections; see forward()."""
    return stacked([w_hh @ w_hr if folds and w_hr is not None else w_hh for _, w_hh, _, _, w_hr in weights])


def projections(weights: list[Weights]) -> list[Tensor]:
    """W_hr (P, H) of each member; none without."""
    return [w_hr for _, _, _, _, w_hr in weights if w_hr is not None]


def gates_of(
    x: Tensor,
    h0: Tensor | None,
    weights: list[Weights],
    sequences: list[Sequence],
    h_reset: Tensor,
) -> Tensor:
    """x W_ih^T + b, (rows, D*4H), with W_hh h of the states that each direction is set to: h0 (D, B, Hout) in the first
    step, if it is not the kernels' to add, and h_reset (D, B, Hout) at resets to hx."""
    biases = biases_of(weights)
    weight_ih, bias = together([w[0] for w in weights], 0), together(biases, 0) if biases else None
    of_all = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight_ih, bias)
    for d, (sequence, w) in enumerate(zip(sequences, weights, strict=True)):
        gates = of_all if len(weights) == 1 else of_all.chunk(len(weights), -1)[d]
        starts = None if sequence.starts is None else sequence.starts.reshape(-1, 1)
        if h0 is not None:
            begin, _, _, _ = sequence.places(h0.shape[1], gates.shape[0])
            gates_of_h0 = h0[d] @ w[1].T
            gates[begin] += gates_of_h0 if starts is None else gates_of_h0 * ~starts[begin]
        if starts is not None and sequence.reset_to_hx:
            of_reset = (h_reset[d] @ w[1].T).unsqueeze(1 if sequence.batch_first else 0)
            every_step = of_reset.expand(*x.shape[:-1], -1).reshape(gates.shape)
            gates.addcmul_(starts.to(x.dtype), every_step)
    return of_all


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Weights],
    sequence: Sequence,
    members: Members,
    reset_to: tuple[Tensor, Tensor],
    save: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the directions of a layer, or a stack of layers.

    A projection W_hr can be folded: with y_t = W_hr h_t, the recurrent term W_hh y_{t-1} equals (W_hh W_hr) h_{t-1}.
    Then the kernels run on h with the product of both weights, only the first step takes W_hh h0, and projecting h is
    one product parallel over time. Where P is far below H that product is much more than both weights, and the kernels
    project (Members.projects). A reset takes the way of h0 when folded: the kernels go on from h = 0, and where the
    state becomes hx, W_hh h0 is in input_gates.

    Args:
        x: (T, B, I), (B, T, I) if the sequence is so, or (rows, I) packed. h0: (M, B, Hout). c0: (M, B, H), in its
            dtype or the accumulator's.
        weights: of each member; those of a stack neither project nor reset to hx.
        sequence: the first direction's.
        reset_to: the state at resets to hx, of the shapes of h0 and c0.
        save: keep c and gates. ieee: float32 products in full precision.

    Returns:
        y: like x with D*Hout features, of a stack the same of each layer, (L, ...); hn: (M, B, Hout); cn: (M, B, H) in
        the accumulator's dtype; c and gates, as the kernel saves them, empty without save.
    """
    by, M, lead = projections(weights), len(weights), x.shape[:-1]
    folds = len(by) > 0 and not members.projects
    sequences = sequence.each(members.directions(M))
    layout, c_reset = sequence.layout, None
    with matmul_precision(x, ieee):
        input_gates = gates_of(x, h0 if folds else None, weights[: len(sequences)], sequences, reset_to[0])
        if layout.starts is not None:
            layout = layout._replace(starts=starts_of(sequences))
            c_reset = reset_to[1] if sequence.reset_to_hx else torch.zeros_like(c0)
            c_reset = c_reset.to(accumulator(c0.dtype)).contiguous()
        y, hn, cn, c, gates = operators.run(
            operators.forward,
            input_gates.view(*lead, input_gates.shape[-1]),
            recurrent(weights, folds),
            torch.zeros_like(c0, dtype=x.dtype) if folds else h0,
            c0,
            c_reset,
            *layout,
            stacked(by) if members.projects else None,
            members.weight_ih(weights),
            members.bias(weights),
            members.seed,
            members.keep,
            sequence.reverse,
            save,
            ieee,
        )
        if folds:
            y = projected(members.each(y, M), [w_hr.T for w_hr in by])
            lasts = (own.places(h0.shape[1], y.shape[0])[1] for own in sequences)
            # Shares no memory with y.
            hn = torch.stack([of_d[last] for of_d, last in zip(members.each(y, M), lasts, strict=True)])
            if (without_steps := sequence.without_steps()) is not None:
                hn = torch.where(without_steps, h0, hn)
            y = y.view(*lead, y.shape[-1])
    return y, hn, cn, c, gates


def h_of(c: Tensor, gates: Tensor, layout: Layout) -> Tensor:
    """h of every step by (4); zero past a row's length, where c and gates are as the memory was."""
    h = c.tanh().mul_(gates[..., -c.shape[-1] :]).to(gates.dtype)
    return h.masked_fill(layout.past(h.shape), 0) if layout.padded else h


class Grads(NamedTuple):
    """The gradients of what forward() takes, and of the states that its resets go to; None where none is needed.

    weights: of each member those of weight_ih, weight_hh, either bias, and weight_hr.
    """

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor
    weights: list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]
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
    weights: list[Weights],
    sequence: Sequence,
    members: Members,
    reset_to: tuple[Tensor, Tensor],
    y: Tensor,
    c: Tensor,
    gates: Tensor,
    needs: list[bool],
    ieee: bool,
    wide: bool = False,
) -> Grads:
    """The gradients of forward().

    Args:
        dy: as y, of a stack that of its last layer; dhn, dcn: as hn and cn; dcells: as c, None if the cells of all
            steps have none, as those of a stack.
        x to reset_to: as given to forward(). y, c, gates: as it returned them.
        needs: whether x, h0, c0 and the five weights of each member need one. ieee: as given to forward().
        wide: those of the weights in the accumulator's dtype.

    Returns:
        The Grads, that of c0 and c_reset in the accumulator's dtype.
    """
    by, M, B = projections(weights), len(weights), h0.shape[1]
    folds = len(by) > 0 and not members.projects
    sequences = sequence.each(members.directions(M))
    layout, c_first, c_reset = sequence.layout, c0.to(c.dtype).contiguous(), None
    with matmul_precision(x, ieee):
        dh, dh_end = dy, dhn
        if folds:
            dh = projected(members.each(dy, M), by)
            dh = dh.view(*dy.shape[:-1], dh.shape[-1])
            dh_end = dhn @ torch.stack(by)
        if layout.starts is not None:
            layout = layout._replace(starts=starts_of(sequences))
            c_reset = reset_to[1].to(c.dtype).contiguous() if sequence.reset_to_hx else torch.zeros_like(c_first)
        of_all, dc0, dc_reset, dh_steps = operators.run(
            operators.backward,
            dh,
            dh_end,
            dcn,
            recurrent(weights, folds),
            c_first,
            c,
            gates,
            dcells,
            c_reset,
            *layout,
            stacked(by) if members.projects else None,
            members.weight_ih(weights),
            members.seed,
            members.keep,
            sequence.reverse,
            ieee,
        )

        # From here on everything is parallel over time; the numbers are those of kernels/README.md.
        dx, of_weights = None, []
        of_h0: list[Tensor] = []
        of_resets: list[Tensor] = []
        if needs[0]:
            weight_ih = together([w[0] for w in weights[: len(sequences)]], 0)
            lowest = of_all[0] if members.layers else of_all
            dx = (lowest.reshape(-1, weight_ih.shape[0]) @ weight_ih).view(x.shape)  # (9)
        all_dgates, all_y = members.each(of_all, M), members.each(y, M)
        for m in range(M):
            own, needed = sequences[0 if members.layers else m], needs[3 + 5 * m : 8 + 5 * m]
            _, weight_hh, bias, _, _ = weights[m]
            dgates = all_dgates[m]
            start, end, current, previous = own.places(B, dgates.shape[0])
            dweight_ih = dweight_hh = dbias = dweight_hr = None
            if needed[0]:
                below = x.reshape(-1, x.shape[-1])
                if members.layers and m > 0:
                    below = members.drop(all_y[m - 1], m - 1, B, sequence)
                dweight_ih = outer(dgates, below, None, wide)  # (11)
            if bias is not None and (needed[2] or needed[3]):
                dbias = dgates.sum(0, dtype=accumulator(x.dtype) if wide else None)  # (13)

            # What went into the gates at resets to hx, and from h0, both (B, 4H); and from the step before, which is
            # what is left of dgates, in their own memory.
            from_reset = None
            if own.starts is not None:
                starts = own.starts.reshape(-1, 1)
                if own.reset_to_hx:
                    sizes = (B, -1) if own.batch_first else (-1, B)
                    each_step = (dgates * starts).view(*sizes, dgates.shape[-1])
                    from_reset = each_step.sum(1 if own.batch_first else 0)
                dgates.masked_fill_(starts, 0)
            from_h0 = dgates[start]
            if own.batch_first:
                from_h0 = from_h0.clone()
                dgates[start] = 0
            from_h = dgates[current]
            if needs[1]:
                dh0 = from_h0 @ weight_hh  # (10)
                if (without_steps := own.without_steps()) is not None:
                    dh0 = torch.where(without_steps, dhn[m], dh0)
                of_h0.append(dh0)
                if from_reset is not None:
                    of_resets.append(from_reset @ weight_hh)
            if needed[1]:
                by_h0 = outer(from_h0, h0[m], None, wide)
                if from_reset is not None:
                    by_h0 = outer(from_reset, reset_to[0][m], by_h0, wide)
                dweight_hh = outer(from_h, all_y[m][previous], by_h0, wide)  # (12)
            if needed[4] and by:
                h = h_of(c.chunk(M, -1)[m], gates.chunk(M, -1)[m], layout).view(-1, c.shape[-1] // M)
                if folds:
                    ends = outer(members.each(dy, M)[m], h, outer(dhn[m], h[end], None, wide), wide)
                    dweight_hr = outer(from_h @ weight_hh, h[previous], ends, wide)  # (14)
                else:
                    dweight_hr = outer(members.each(dh_steps, M)[m], h, None, wide)
            of_weights.append((dweight_ih, dweight_hh, dbias, dweight_hr))
    to_hx = layout.starts is not None and sequence.reset_to_hx
    return Grads(
        dx,
        stacked(of_h0) if of_h0 else None,
        dc0,
        of_weights,
        stacked(of_resets) if of_resets else None,
        dc_reset if to_hx else None,
    )
