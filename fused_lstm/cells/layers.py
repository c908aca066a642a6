"""A call of Recurrent: its tensors and options, and how it runs, layer by layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ..call import Options
from ..composed import Step, unrolled
from ..kernels.layout import Layout, accumulator
from ..sequence import Sequence
from ..tensors import check_same, in_autocast
from .definition import Cell
from .weights import Weights


class CellCall(NamedTuple):
    """The arguments of a call, checked.

    hx: h and the cell's states, each (L*D, B, H). weights: per layer, then direction, as the layer lists them.
    batch_sizes, lengths, starts, options: as in Call. record: called for each layer, then direction, with h and the
    states of every step, and both parts of the gates, x and r: each (T, B, features), or (rows, features) packed.
    sequence: of a chunk of steps of one direction, where these lie, in the place of batch_sizes, lengths and starts.
    """

    cell: Cell
    input: Tensor
    hx: tuple[Tensor, ...]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    starts: Tensor | None
    options: Options
    record: Any = None
    sequence: Sequence | None = None

    def with_hx(self, *hx: Tensor) -> "CellCall":
        return self._replace(hx=hx)

    @property
    def H(self) -> int:
        return self.hx[0].shape[2]


# Of one layer, whose input, states and weights are those of a call: h and the states of all steps, (T, B, D*H) or
# (rows, D*H), and those after each row's last step, (D, B, H). In 16 bit the states beside h are float32.
Layer = Callable[[CellCall], tuple[list[Tensor], list[Tensor]]]


def prepared(call: CellCall) -> CellCall:
    """The call with everything in autocast's dtype, and checked."""
    if torch._C._is_any_autocast_enabled():
        tensors, n = in_autocast([call.input, *call.hx, *call.weights]), 1 + len(call.hx)
        call = call._replace(input=tensors[0], hx=tuple(tensors[1:n]), weights=tensors[n:])
    time_first = call.batch_sizes is not None or not call.options.batch_first
    check_same(call.input, call.input.shape[0 if time_first else 1], call.hx, call.weights)
    return call


def layer_by_layer(call: CellCall, layer: Layer) -> tuple[Any, ...]:
    """y, hn, the other states after each row's last step, and the states of every layer, None if not asked for."""
    options, D, n = call.options, call.options.directions, len(call.hx)
    x = call.input.transpose(0, 1) if options.batch_first else call.input
    per_layer = len(call.weights) // options.num_layers
    ends, of_layers = [], []
    for k in range(options.num_layers):
        hx = tuple(state[k * D : (k + 1) * D] for state in call.hx)
        weights = call.weights[k * per_layer : (k + 1) * per_layer]
        found = layer(call._replace(input=x, hx=hx, weights=weights))
        of_steps, of_end = ([tensor.to(x.dtype) for tensor in tensors] for tensors in found)
        x = of_steps[0]
        ends.append(of_end)
        of_layers.append(of_steps)
        if options.use_dropout and k < options.num_layers - 1:
            x = torch.dropout(x, options.dropout, True)
    states = None
    if options.return_states:
        each = ([s.transpose(0, 1) if options.batch_first else s for s in of_layer] for of_layer in of_layers)
        states = call.cell.S(*zip(*each, strict=True))
    y = x.transpose(0, 1) if options.batch_first else x
    return y, *(torch.cat([end[k] for end in ends]) for k in range(n)), states


def sequence_of(call: CellCall) -> Sequence:
    """Where the steps of the first direction lie, time first."""
    if call.sequence is not None:
        return call.sequence
    if call.batch_sizes is not None:
        return Sequence.packed(call.batch_sizes, call.input.device)
    return Sequence.padded(Layout(call.lengths, None, call.starts), call.options.reset_to_hx, call.input.shape[0])


def composed_layer(call: CellCall) -> tuple[list[Tensor], list[Tensor]]:
    """A Layer composed of torch operations."""
    sequences = sequence_of(call).per_direction(call.options.directions)
    inputs = call.input, list(call.hx), call.weights
    return directions(call.cell, *inputs, call.options.bias, sequences, call.record)


def in_chunks(call: CellCall, layer: Layer, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """A Layer that keeps for backward its input and output and the states between chunks of so many steps alone: each
    chunk runs under torch.utils.checkpoint, a direction by itself."""
    D, n, x, B = call.options.directions, len(call.hx), call.input, call.hx[0].shape[1]
    per_direction, count = len(call.weights) // D, n if call.options.return_states else 1
    several, ends = [], []
    for d, sequence in enumerate(sequence_of(call).per_direction(D)):
        weights = call.weights[d * per_direction : (d + 1) * per_direction]
        states, pieces = [state[d : d + 1] for state in call.hx], {}
        T = x.shape[0] if sequence.offsets is None else len(sequence.offsets)
        for part, span, rows in sequence.chunks(T, B, x.shape[0], length):
            of_chunk = call._replace(sequence=part, options=call.options._replace(bidirectional=False))

            def run(x: Tensor, *tensors: Tensor, of_chunk: CellCall = of_chunk) -> tuple[Tensor, ...]:
                inputs = {"input": x, "hx": tensors[:n], "weights": list(tensors[n:])}
                of_steps, of_end = layer(of_chunk._replace(**inputs))  # type: ignore[arg-type]
                return *of_steps[:count], *of_end

            inputs = x[span], *(state[:, :rows] for state in states), *weights
            found = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
            pieces[span.start] = found[:count]
            states = [torch.cat([end, old[:, rows:]], 1) for end, old in zip(found[count:], states, strict=True)]
        several.append([torch.cat(of_chunks) for of_chunks in zip(*(pieces[k] for k in sorted(pieces)), strict=True)])
        ends.append(states)
    of_steps = [torch.cat(tensors, -1) for tensors in zip(*several, strict=True)]
    return of_steps, [torch.cat(tensors) for tensors in zip(*ends, strict=True)]


def directions(
    cell: Cell,
    x: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    bias: bool,
    sequences: list[Sequence],
    record: Any = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """composed_layer() of these inputs and Sequences, one for each direction."""
    several, ends, n = [], [], len(hx)
    for d, (sequence, w) in enumerate(zip(sequences, Weights.of(cell, weights, bias), strict=True)):
        wide = (state[d].to(accumulator(state.dtype)) for state in hx[1:])
        pre = linear(x, w.weight_ih, w.bias_ih)
        of_steps, end = unrolled(pre, (hx[0][d], *wide), step_of(cell, w, record is not None), sequence)
        if record is not None:
            record(*of_steps)
        several.append(of_steps[:n])
        ends.append(end)
    of_layer = [torch.cat(tensors, -1) for tensors in zip(*several, strict=True)]
    return of_layer, [torch.stack(tensors) for tensors in zip(*ends, strict=True)]


def step_of(cell: Cell, weights: Weights, record: bool) -> Step:
    """A step of a cell, for composed.unrolled(). record: it gives both parts of the gates, too."""
    G, vectors = len(cell.gates), weights.vectors
    fed = [cell.S._fields.index(name) for name in cell.feedback]
    places = [cell.gates.index(name) for name in cell.feedback]

    def step(pre: Tensor, states: tuple[Tensor, ...]) -> tuple[Any, Any]:
        dtype = accumulator(pre.dtype)
        recurrent = linear(states[0], weights.weight_hh, weights.bias_hh)
        r = list(recurrent.to(dtype).chunk(G, -1))
        if weights.weight_fh is not None:
            back = torch.cat([states[k].to(pre.dtype) for k in fed], -1)
            for place, part in zip(places, linear(back, weights.weight_fh).chunk(len(fed), -1), strict=True):
                r[place] = r[place] + part.to(dtype)
        x = pre.to(dtype).chunk(G, -1)
        h_prev, *others = states
        p = (vector.to(dtype).expand_as(h_prev) for vector in vectors)
        h, *after = cell.on_flat(*x, *r, h_prev.to(dtype), *others, *p)
        return (h.to(pre.dtype), *after), (pre, torch.cat(r, -1)) if record else ()

    return step
