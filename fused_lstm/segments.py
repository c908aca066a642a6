"""Lengths and resets for torch's own LSTM: rows are packed, with every stretch between two cuts as a row of its own."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sequence import Sequence

Packed = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]


class Stretches(NamedTuple):
    """The stretches of all rows, the longest first, as torch packs rows.

    row: (N,), the batch row that each is of.
    first, last: (N,) bool, whether it is the first of its row, and the last.
    enters: (N,) bool, whether the forward direction enters the row there with hx.
    indices: where each packed row lies among the T * B rows of (T, B, I).
    batch_sizes: (longest,) int64 on the CPU, as in a PackedSequence.
    """

    row: Tensor
    first: Tensor
    last: Tensor
    enters: Tensor
    indices: Tensor
    batch_sizes: Tensor

    @staticmethod
    def of(sequence: Sequence, T: int, B: int, device: torch.device) -> "Stretches":
        """sequence: the forward direction's, with lengths or starts."""
        lengths, starts = sequence.lengths, sequence.starts
        time = torch.arange(T, device=device)
        if lengths is None:
            lengths = torch.full((B,), T, device=device)
        if starts is None:
            row = lengths.nonzero()[:, 0]
            begin, length, first = torch.zeros_like(row), lengths[row], torch.ones_like(row, dtype=torch.bool)
            last = enters = first
        else:
            cuts = starts.clone()
            cuts[:1] = True
            cuts &= time[:, None] < lengths
            row, begin = cuts.T.nonzero(as_tuple=True)  # those of one batch row in a sequence
            first = torch.diff(row, prepend=row.new_full((1,), -1)) != 0
            last = torch.cat([first[1:], first.new_ones(1)])[: len(row)]
            end = torch.where(last, lengths[row], torch.cat([begin[1:], begin.new_zeros(1)])[: len(row)])
            length, enters = end - begin, first & ~starts[0, row]
        order = length.argsort(descending=True, stable=True)
        row, begin, length, first, last, enters = (t[order] for t in (row, begin, length, first, last, enters))
        inside = time[: int(length[0]) if len(length) else 0, None] < length
        indices = ((begin + time[: len(inside), None]) * B + row)[inside]
        return Stretches(row, first, last, enters, indices, inside.sum(1).cpu())


def run(
    lstm: Packed, x: Tensor, hx: tuple[Tensor, Tensor], stretches: Stretches, directions: int, to_hx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a whole stack of layers at once, since a cut goes through all of them.

    Args:
        lstm: torch's own over a packed sequence: data, batch_sizes and hx to y, hn and cn.
        x: (T, B, I).
        hx: (h0, c0) of shapes (L*D, B, Hout) and (L*D, B, H).
        stretches: of x. directions: D. to_hx: at resets the state becomes hx; otherwise zero.

    Returns:
        y: (T, B, D*Hout), zero past a row's length; hn, cn: as hx.
    """
    T, B, _ = x.shape
    row, first, last, enters, indices, batch_sizes = stretches
    if B == 0:
        return x.new_zeros(T, B, directions * hx[0].shape[-1]), hx[0].clone(), hx[1].clone()
    if len(row) == 0:
        # Some step all the same, of which nothing is kept: results then have its dtype and gradients.
        y, hn, cn = lstm(x[0, :1], batch_sizes.new_ones(1), (hx[0][:, :1], hx[1][:, :1]))
        y = y.new_zeros(T * B, y.shape[-1]).index_copy(0, indices, y[:0]).view(T, B, -1)
        return y, hx[0].to(hn.dtype, copy=True), hx[1].to(cn.dtype, copy=True)
    count = len(hx[0])
    states = [state[:, row] for state in hx]
    if not to_hx:
        entered = torch.stack([enters, last][:directions] * (count // directions))[..., None]
        states = [torch.where(entered, state, 0) for state in states]
    y, hn, cn = lstm(x.reshape(T * B, -1)[indices], batch_sizes, (states[0], states[1]))
    y = y.new_zeros(T * B, y.shape[-1]).index_copy(0, indices, y).view(T, B, -1)

    # A direction leaves a row where its last stretch ends.
    left = [last.nonzero()[:, 0], first.nonzero()[:, 0]][:directions] * (count // directions)
    ends = [
        torch.stack([hx_k.to(out.dtype).index_copy(0, row[at], out[at]) for hx_k, out, at in zip(*each, strict=True)])
        for each in ((hx[0], hn, left), (hx[1], cn, left))
    ]
    return y, ends[0], ends[1]
