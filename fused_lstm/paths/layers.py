"""Layers one after another, or several in a launch, with dropout between them: for kernels.py and composed.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..call import Call, Result, States
from ..chunks import chunk_for, memory_of
from ..kernels.layout import Layout, accumulator
from ..operators import unwatched
from ..recurrence import Dropout, Inputs, Outputs, Recurrence
from ..route import Route
from ..sequence import Sequence
from ..weights import cat, stack, weights_of


def layer_by_layer(call: Call, route: Route, recurrences: Callable[[Recurrence, Inputs], Outputs]) -> Result:
    """recurrences: runs what is in one launch."""
    options, D = call.options, call.options.directions
    x, how = laid_out(call, in_chunks_where_large(call, route))
    weights = weights_of(call.weights, options.bias, options.num_layers * D)
    hn: list[Tensor] = []
    cn: list[Tensor] = []
    states = States((), ())
    begin = 0
    for layers in route.groups:
        end = begin + layers * D
        of_group, h0, c0 = how, call.h0, call.c0
        if len(route.groups) > 1:
            h0, c0 = h0[begin:end], c0[begin:end]
        if layers > 1:
            dropout = dropout_of(options.dropout, x) if options.use_dropout else Dropout()
            of_group = how._replace(stacked=True, dropout=dropout)
        if call.scales is not None:
            of_group = how._replace(scale=stack(call.scales[begin:end]))
        outputs = recurrences(of_group, Inputs(x, h0, c0, weights[begin:end]))
        x = outputs.y
        hn.append(outputs.hn)
        cn.append(outputs.cn)
        if call.record is not None:
            record(call, how.sequence, outputs)
        if options.return_states:
            states = States((*states.y, x), (*states.c, outputs.last))  # type: ignore[arg-type]
        begin = end
        if options.use_dropout and begin < options.num_layers * D:
            x = torch.dropout(x, options.dropout, True)
    if options.batch_first and not how.sequence.batch_first:
        x, states = x.transpose(0, 1), States(*(tuple(t.transpose(0, 1) for t in tensors) for tensors in states))
    return x, cat(hn, 0), cat(cn, 0), states if options.return_states else None


def in_chunks_where_large(call: Call, route: Route) -> Recurrence:
    """How it runs: without gradients in chunks of steps, as under recompute, where the input's part of a layer's gates
    would take more than a quarter of the device's memory. Not in a graph or a transform, nor layers in one launch."""
    how, x, H = route.how, call.input, call.c0.shape[2]
    if how.save or max(route.groups) > 1 or route.path != "kernels" or torch.compiler.is_compiling():
        return how
    memory = memory_of(x.device)
    gates = 4 * H * call.options.directions * x.dtype.itemsize * x.shape[:-1].numel()
    if memory is None or 4 * gates <= memory or not unwatched(call.tensors()):
        return how
    chunk = chunk_for(x.dtype, call.c0.shape[1], H, memory)
    return how._replace(chunk=chunk, sequence=how.sequence._replace(batch_first=False))


def laid_out(call: Call, how: Recurrence) -> tuple[Tensor, Recurrence]:
    """The input as it runs, and how, with this call's Sequence."""
    x, lengths, starts, batch_first = call.input, call.lengths, call.starts, how.sequence.batch_first
    if call.options.batch_first and not batch_first:
        x = x.transpose(0, 1)
    direct = unwatched([*call.tensors(), lengths, starts])
    if not call.cut:
        return x, how if direct else how._replace(direct=False)
    if call.batch_sizes is not None:
        return x, how._replace(sequence=Sequence.packed(call.batch_sizes, x.device), direct=direct)
    layout = Layout(lengths, None, starts.T.contiguous() if batch_first and starts is not None else starts, batch_first)
    sequence = Sequence.padded(layout, call.options.reset_to_hx, x.shape[1 if batch_first else 0])
    return x, how._replace(sequence=sequence, direct=direct)


def dropout_of(probability: float, x: Tensor) -> Dropout:
    """With a seed from torch's generator."""
    seed = torch.randint(2**62, (1,), device=x.device)
    return Dropout(seed, x.new_full((1,), 1 - probability, dtype=accumulator(x.dtype)))


def record(call: Call, sequence: Sequence, outputs: Outputs) -> None:
    """Hands y, c and gates of each direction to the call's record."""
    assert call.record is not None
    gates = outputs.gates
    if sequence.layout.padded:  # the kernels leave the gates of the padding as the memory was
        gates = gates.masked_fill(sequence.layout.past(gates.shape), 0)
    of_time = [outputs.y, outputs.c, gates]
    if sequence.batch_first:
        of_time = [tensor.transpose(0, 1) for tensor in of_time]
    for of_direction in zip(*(tensor.chunk(call.options.directions, -1) for tensor in of_time), strict=True):
        call.record(*of_direction)
