"""Layers one after another, or several in a launch, with dropout between them: for kernels.py and composed.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..call import Call, Result, States
from ..kernels.layout import Layout, accumulator
from ..operators import unwatched
from ..recurrence import Dropout, Inputs, Outputs, Recurrence
from ..route import Route
from ..sequence import Sequence
from ..weights import cat, weights_of


def layer_by_layer(call: Call, route: Route, recurrences: Callable[[Recurrence, Inputs], Outputs]) -> Result:
    """recurrences: runs what is in one launch."""
    options, D = call.options, call.options.directions
    x, sequence = laid_out(call, route)
    weights = weights_of(call.weights, options.bias, options.num_layers * D)
    how = Recurrence(
        sequence,
        project_in_kernel=route.project_in_kernel,
        save=route.save,
        states=options.return_states,
        ieee=route.ieee,
        chunk=route.chunk,
        direct=unwatched([*call.tensors(), sequence.lengths, sequence.starts]),
    )
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
        outputs = recurrences(of_group, Inputs(x, h0, c0, weights[begin:end]))
        x = outputs.y
        hn.append(outputs.hn)
        cn.append(outputs.cn)
        if call.record is not None:
            record(call, sequence, outputs)
        if options.return_states:
            states = States((*states.y, x), (*states.c, outputs.last))  # type: ignore[arg-type]
        begin = end
        if options.use_dropout and begin < options.num_layers * D:
            x = torch.dropout(x, options.dropout, True)
    if options.batch_first and not route.batch_first:
        x, states = x.transpose(0, 1), States(*(tuple(t.transpose(0, 1) for t in tensors) for tensors in states))
    return x, cat(hn, 0), cat(cn, 0), states if options.return_states else None


def laid_out(call: Call, route: Route) -> tuple[Tensor, Sequence]:
    """The input as it runs, with its Sequence: time first, unless the route leaves it batch first."""
    input, lengths, starts, options = call.input, call.lengths, call.starts, call.options
    if call.batch_sizes is not None:
        return input, Sequence.packed(call.batch_sizes, input.device)
    if not route.batch_first:
        x = input.transpose(0, 1) if options.batch_first else input
        return x, Sequence.padded(Layout(lengths, None, starts), options.reset_to_hx, x.shape[0])
    layout = Layout(lengths, None, None if starts is None else starts.T.contiguous(), True)
    return input, Sequence.padded(layout, options.reset_to_hx, input.shape[1])


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
