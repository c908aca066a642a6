"""Lengths and resets for torch's own LSTM: every stretch between two cuts becomes a row of one packed sequence."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .autograd import Sequence

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
    T, B, _ = x.shape
    lengths, _, starts = sequence.layout
    if lengths is None:
        lengths = torch.full((B,), T, device=x.device)
    time = torch.arange(T, device=x.device)
    cuts = torch.zeros(T, B, dtype=torch.bool, device=x.device) if starts is None else starts.clone()
    cuts[0] = True
    cuts &= time[:, None] < lengths
    row, begin = cuts.T.nonzero(as_tuple=True)  # the stretches, those of one batch row in a sequence
    if not len(row):
        return x.new_zeros(T, B, directions * hx[0].shape[-1]), hx[0].clone(), hx[1].clone()
    first = torch.diff(row, prepend=row.new_full((1,), -1)) != 0
    last = torch.cat([first[1:], first.new_ones(1)])
    end = torch.where(last, lengths[row], torch.cat([begin[1:], begin.new_zeros(1)]))
    stretch = end - begin

    # hx goes in where a row begins in the direction, unless a reset there says otherwise.
    reset_first = first.new_zeros(1) if starts is None or sequence.reset_to_hx else starts[0, row]
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
