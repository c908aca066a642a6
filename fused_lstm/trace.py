"""trace(): what goes on inside an LSTM over a sequence, as the layer itself computes it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.layout import accumulator
from .lstm import LSTM


class Trace(NamedTuple):
    """The gates and states of every step, layer and direction; numbers (1)-(4) of kernels/README.md.

    Each is in the form of the input, with (L, D, H) in the place of its I features: (T, B, L, D, H), (B, T, L, D, H)
    with batch_first, (T, L, D, H) unbatched, or a PackedSequence with data (rows, L, D, H). L layers, bottom first; of
    the D directions the forward one is 0. A step stands where its input stands, also in the other direction, which
    comes to it from the following one. Past the end of a row, with lengths, everything is zero. At a step that a mask
    skips the gates are zero, and c and h as mask_to says.

    i, f, o: the input, forget and output gate, from 0 to 1; g: the cell's input, from -1 to 1. Activated.
    c: the cell after the step, in float32 for 16-bit types.
    h: what the step hands on, before dropout, (..., Hout); under a projection the projected one, otherwise o tanh(c).
    """

    i: Any
    f: Any
    g: Any
    o: Any
    c: Any
    h: Any


@torch.no_grad()
def trace(
    lstm: LSTM,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor | None, Tensor | None] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    reset_to: str = "zero",
    mask: Tensor | None = None,
    mask_to: str = "zero",
) -> Trace:
    """Runs the sequence as lstm(input, hx) does and returns the Trace of it, without gradients.

    The module stays in its mode: in training, dropout draws a mask as any call does, and the layers above see it; call
    lstm.eval() first for a trace without. On the kernels' path these are the numbers that the forward kernel saves for
    the backward one. torch's own LSTM gives no gates: on its path the layers are composed of torch operations, and
    differ from a call by rounding. So does, on the kernels' path, a call of one step, which has a kernel of its own.
    Hooks of the module do not run.

    Args:
        lstm: a fused_lstm.LSTM.
        input, hx, lengths, reset, reset_to, mask, mask_to: as its forward takes them.

    Returns:
        The Trace. For the forget gates of row b in the first layer: trace(lstm, x).f[:, b, 0, 0], (T, H).

    Raises:
        TypeError: lstm is no fused_lstm.LSTM.
        ValueError, RuntimeError, IndexError: as its forward.
    """
    if not isinstance(lstm, LSTM):
        raise TypeError(f"trace takes a fused_lstm.LSTM, got {type(lstm).__name__}; fused_lstm.swap() makes one")
    y: list[Tensor] = []
    cells: list[Tensor] = []
    gates: list[Tensor] = []

    def record(*of_one: Tensor) -> None:
        for tensors, tensor in zip((y, cells, gates), of_one, strict=True):
            tensors.append(tensor)

    options = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "mask": mask, "mask_to": mask_to}
    lstm._forward(input, hx, options | {"record": record})
    D = 2 if lstm.bidirectional else 1

    def formed(tensors: Sequence[Tensor]) -> Tensor | PackedSequence:
        stacked = torch.stack(tuple(tensors), dim=-2).unflatten(-2, (lstm.num_layers, D))
        if isinstance(input, PackedSequence):
            return input._replace(data=stacked)
        if input.dim() == 2:
            return stacked.squeeze(1)
        return stacked.transpose(0, 1) if lstm.batch_first else stacked

    c = [cell.to(accumulator(cell.dtype)) for cell in cells]
    i, f, g, o = (formed(each) for each in zip(*(tensor.chunk(4, dim=-1) for tensor in gates), strict=True))
    return Trace(i, f, g, o, formed(c), formed(y))
