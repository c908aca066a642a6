"""trace(): what goes on inside a layer over a sequence, as the layer itself computes it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kernels.layout import accumulator
from .lstm import LSTM
from .recurrent import Recurrent


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


class CellTrace(NamedTuple):
    """What goes in and out of a cell of one's own at every step, in the forms of Trace.

    x, r: both parts of each gate, by its name: x.f, r.f. s: h and the states after the step, by name: s.h, s.c. With a
    cell's vectors they are all that its function is given: so any value within the cell can be made of them.
    """

    x: Any
    r: Any
    s: Any


@torch.no_grad()
def trace(
    lstm: LSTM | Recurrent,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    reset_to: str = "zero",
    mask: Tensor | None = None,
    mask_to: str = "zero",
) -> Trace | CellTrace:
    """Runs the sequence as lstm(input, hx) does and returns the Trace of it, without gradients.

    The module stays in its mode: in training, dropout draws a mask as any call does, and the layers above see it; call
    lstm.eval() first for a trace without. On the kernels' path these are the numbers that the forward kernel saves for
    the backward one. torch's own LSTM gives no gates: on its path the layers are composed of torch operations, and
    differ from a call by rounding. So does, on the kernels' path, a call of one step, which has a kernel of its own.
    Hooks of the module do not run.

    A Recurrent, whose kernels keep no gates, is composed of torch operations, and gives a CellTrace.

    Args:
        lstm: a fused_lstm.LSTM, or a Recurrent.
        input, hx, lengths, reset, reset_to, mask, mask_to: as its forward takes them.

    Returns:
        The Trace. For the forget gates of row b in the first layer: trace(lstm, x).f[:, b, 0, 0], (T, H).

    Raises:
        TypeError: lstm is neither.
        ValueError, RuntimeError, IndexError: as its forward.
    """
    options = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "mask": mask, "mask_to": mask_to}
    if isinstance(lstm, Recurrent):
        return trace_of_cell(lstm, input, hx, options | {"return_states": False})
    if not isinstance(lstm, LSTM):
        name = type(lstm).__name__
        raise TypeError(
            f"trace takes a fused_lstm.Recurrent or fused_lstm.LSTM, got {name}; fused_lstm.swap() makes one"
        )
    y: list[Tensor] = []
    cells: list[Tensor] = []
    gates: list[Tensor] = []

    def record(*of_one: Tensor) -> None:
        for tensors, tensor in zip((y, cells, gates), of_one, strict=True):
            tensors.append(tensor)

    lstm._forward(input, hx, options | {"record": record})
    c = [cell.to(accumulator(cell.dtype)) for cell in cells]
    i, f, g, o = zip(*(tensor.chunk(4, dim=-1) for tensor in gates), strict=True)
    return Trace(*(formed(lstm, input, tensors) for tensors in (i, f, g, o, c, y)))


def trace_of_cell(layer: Recurrent, input: Tensor | PackedSequence, hx: Any, options: dict[str, Any]) -> CellTrace:
    """trace() of a Recurrent."""
    cell, recorded = layer.cell, []
    layer._forward(input, hx, options, lambda *of_one: recorded.append(of_one))
    *states, x, r = zip(*recorded, strict=True)

    def by_gate(of: Any, parts: Sequence[Tensor]) -> Any:
        each = zip(*(tensor.chunk(len(cell.gates), dim=-1) for tensor in parts), strict=True)
        return of(*(formed(layer, input, tensors) for tensors in each))

    return CellTrace(by_gate(cell.X, x), by_gate(cell.R, r), cell.S(*(formed(layer, input, s) for s in states)))


def formed(layer: LSTM | Recurrent, input: Tensor | PackedSequence, tensors: Sequence[Tensor]) -> Any:
    """Of each layer and direction a tensor (T, B, H), or (rows, H), as one in the form of the input."""
    directions = 2 if layer.bidirectional else 1
    stacked = torch.stack(tuple(tensors), dim=-2).unflatten(-2, (layer.num_layers, directions))
    if isinstance(input, PackedSequence):
        return input._replace(data=stacked)
    if input.dim() == 2:
        return stacked.squeeze(1)
    return stacked.transpose(0, 1) if layer.batch_first else stacked
