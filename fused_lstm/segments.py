"""Lengths and resets for torch's own LSTM: rows are packed, with every stretch between two cuts as a row of its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .sequence import Sequence

Packed = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]]


def run(
    lstm: Packed, x: Tensor, hx: tuple[Tensor, Tensor], sequence: Sequence, directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a whole stack of layers at once, since a cut goes through all of them.

    Args:
        lstm: torch's own over a packed sequence: data, batch_sizes and hx to y, hn and cn.
        x: (T, B, I).
        hx: (h0, c0) of shapes (L*D, B, Hout) and (L*D, B, H).
        sequence: the forward direction's, with lengths or starts.
        directions: D.

    Returns:
        y: (T, B, D*Hout), zero past a row's length; hn, cn: as hx.
    """
    lengths, starts = sequence.lengths, sequence.starts
    T, B, _ = x.shape
    if lengths is None:
        lengths = torch.full((B,), T, device=x.device)
    if not lengths.any():
        return x.new_zeros(T, B, directions * hx[0].shape[-1]), hx[0].clone(), hx[1].clone()
    if starts is None:
        return run_lengths(lstm, x, hx, lengths)
    time = torch.arange(T, device=x.device)
    cuts = starts.clone()
    cuts[0] = True
    cuts &= time[:, None] < lengths
    row, begin = cuts.T.nonzero(as_tuple=True)  # the stretches, those of one batch row in a sequence
    first = torch.diff(row, prepend=row.new_full((1,), -1)) != 0
    last = torch.cat([first[1:], first.new_ones(1)])
    end = torch.where(last, lengths[row], torch.cat([begin[1:], begin.new_zeros(1)]))
    stretch = end - begin

    # hx goes in where a row begins in the direction, unless a reset there says otherwise.
    reset_first = first.new_zeros(1) if sequence.reset_to_hx else starts[0, row]
    entered = [first & ~reset_first, last][:directions] * (hx[0].shape[0] // directions)
    states = []
    for state in hx:
        whole = state[:, row]
        if not sequence.reset_to_hx:
            whole = torch.where(torch.stack(entered)[..., None], whole, 0)
        states.append(whole)

    steps = begin + time[: int(stretch.max()), None]
    inside = steps < end
    # Steps outside repeat some other: they are not read.
    packed = pack_padded_sequence(x[steps.clamp(max=T - 1), row], stretch.cpu(), enforce_sorted=False)
    data, batch_sizes, order, back = packed
    y, hn, cn = lstm(data, batch_sizes, (states[0][:, order], states[1][:, order]))
    padded, _ = pad_packed_sequence(packed._replace(data=y))
    rows = (steps * B + row)[inside]
    y = x.new_zeros(T * B, y.shape[-1], dtype=y.dtype).index_copy(0, rows, padded[inside]).view(T, B, -1)

    # A direction leaves a row where its last stretch ends.
    left = [last.nonzero()[:, 0], first.nonzero()[:, 0]][:directions]
    present = row[left[0]]
    ends = []
    for state, out in zip(hx, (hn[:, back], cn[:, back]), strict=True):
        final = [out[k][left[k % directions]] for k in range(len(out))]
        ends.append(state.to(out.dtype).index_copy(1, present, torch.stack(final)))
    return y, ends[0], ends[1]


def run_lengths(lstm: Packed, x: Tensor, hx: tuple[Tensor, Tensor], lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As run() without resets: a row is one stretch, and one without steps keeps its state."""
    T, B, _ = x.shape
    rows = lengths.nonzero()[:, 0]
    if len(rows) == B:
        data, batch_sizes, order, back = packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        y, hn, cn = lstm(data, batch_sizes, (hx[0][:, order], hx[1][:, order]))
        return pad_packed_sequence(packed._replace(data=y), total_length=T)[0], hn[:, back], cn[:, back]
    y, hn, cn = run_lengths(lstm, x[:, rows], (hx[0][:, rows], hx[1][:, rows]), lengths[rows])
    y = y.new_zeros(T, B, y.shape[-1]).index_copy(1, rows, y)
    hn, cn = (state.to(new.dtype).index_copy(1, rows, new) for state, new in zip(hx, (hn, cn), strict=True))
    return y, hn, cn
