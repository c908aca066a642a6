"""torch's own LSTM, where the plan's mode is "torch": called as it is, and for a graph as the operators
fused_lstm::on_torch and ::on_torch_backward, into which the compiler does not look.

torch.compile breaks at torch's own LSTM, or takes T for a constant. As an operator it is one node for all T and B. What
it keeps for its backward cannot leave an operator, so that of a graph runs its forward pass again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor

from . import composed, segments
from .kernels.layout import Layout
from .layer import Members, named
from .operators import one_by_one
from .segments import Stretches
from .sequence import Sequence

Hidden = tuple[Tensor, Tensor]


class Layers(NamedTuple):
    """Layers as torch's own LSTM takes them: all arguments of torch.nn.LSTM that it needs beside tensors."""

    bias: bool
    num_layers: int
    bidirectional: bool
    dropout: float = 0.0
    training: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def dense_or_packed(
    input: Tensor, batch_sizes: Tensor | None, hx: Hidden, weights: list[Tensor], stack: Layers, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own operator."""
    bias, num_layers, bidirectional, dropout, training = stack
    if input.is_cuda and not training and torch.is_grad_enabled():
        # cuDNN differentiates in training mode only; without dropout that mode computes the same.
        training, dropout = True, 0.0
    options = bias, num_layers, dropout, training, bool(bidirectional)  # nn.LSTM's constructor takes 1, this does not
    if batch_sizes is None:
        return _VF.lstm(input, hx, weights, *options, batch_first)
    return _VF.lstm(input, batch_sizes, hx, weights, *options)


def run(
    input: Tensor,
    batch_sizes: Tensor | None,
    stretches: Stretches | None,
    hx: Hidden,
    weights: list[Tensor],
    stack: Layers,
    batch_first: bool,
    to_hx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack of layers. Args: as lstm() takes them; stretches: between the lengths and resets of (T, B, I)."""
    if stretches is None:
        return dense_or_packed(input, batch_sizes, hx, weights, stack, batch_first)
    x = input.transpose(0, 1) if batch_first else input

    def packed(data: Tensor, sizes: Tensor, hx: Hidden) -> tuple[Tensor, Tensor, Tensor]:
        return dense_or_packed(data, sizes, hx, weights, stack, False)

    y, hn, cn = segments.run(packed, x, hx, stretches, stack.directions, to_hx)
    return y.transpose(0, 1) if batch_first else y, hn, cn


def stretches_of(input: Tensor, batch_first: bool, lengths: Tensor | None, starts: Tensor | None) -> Stretches | None:
    """What lengths (B,) and starts (T, B) make of the input; None without them."""
    if lengths is None and starts is None:
        return None
    T, B = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    return Stretches.of(Sequence.padded(Layout(lengths, None, starts), False, T), T, B, input.device)


def in_graph(
    input: Tensor,
    batch_sizes: Tensor | None,
    layout: Layout,
    hx: Hidden,
    weights: list[Tensor],
    stack: Layers,
    batch_first: bool,
    to_hx: bool,
    states: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As run(), and with `states` every layer's y and cells: in operators, all layers at once where nothing is wanted
    between them."""
    drops, D = stack.training and stack.dropout > 0, stack.directions
    L = 1 if drops or states else stack.num_layers
    each = len(weights) * L // stack.num_layers
    groups = [weights[k : k + each] for k in range(0, len(weights), each)]
    x, of_y, of_c, ends = input, [], [], []
    for k, own in enumerate(groups):
        h0, c0 = hx if len(groups) == 1 else (state[k * D : (k + 1) * D] for state in hx)
        options = stack.bias, L, bool(stack.bidirectional), batch_first, to_hx, states
        x, hn, cn, cells = forward(x, h0, c0, own, batch_sizes, layout.lengths, layout.starts, *options)
        ends.append((hn, cn))
        of_y.append(x)
        of_c.append(cells)
        if drops and k < len(groups) - 1:
            x = torch.dropout(x, stack.dropout, True)
    hn, cn = ends[0] if len(ends) == 1 else map(torch.cat, zip(*ends, strict=True))
    return x, hn, cn, tuple(of_y), tuple(of_c)


class Call(NamedTuple):
    """What the operators take; the names are lstm()'s. With states, of a single layer, they return its cells too."""

    input: Tensor
    h0: Tensor
    c0: Tensor
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    starts: Tensor | None
    bias: bool
    num_layers: int
    bidirectional: bool
    batch_first: bool
    to_hx: bool
    states: bool

    @property
    def tensors(self) -> list[Tensor]:
        """All that has a gradient."""
        return [self.input, self.h0, self.c0, *self.weights]

    def of(self, input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> "Call":
        """The call with these in the place of its tensors."""
        return self._replace(input=input, h0=h0, c0=c0, weights=list(weights))

    def places(self) -> Stretches | Sequence | None:
        """Where the steps lie. It reads indices on the host, which no transform may have wrapped."""
        if not self.states:
            return stretches_of(self.input, self.batch_first, self.lengths, self.starts)
        if self.batch_sizes is not None:
            return Sequence.packed(self.batch_sizes, self.input.device)
        T = self.input.shape[1 if self.batch_first else 0]
        return Sequence.padded(Layout(self.lengths, None, self.starts), self.to_hx, T)

    def run(self, places: Stretches | Sequence | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, hn, cn and the cells, which are empty without states."""
        if not isinstance(places, Sequence):
            stack = Layers(self.bias, self.num_layers, self.bidirectional)
            hx, rest = (self.h0, self.c0), (self.weights, stack, self.batch_first, self.to_hx)
            y, hn, cn = run(self.input, self.batch_sizes, places, hx, *rest)
            return y, hn, cn, y.new_empty(0)
        x = self.input.transpose(0, 1) if self.batch_first else self.input
        weights = named(self.weights, self.bias, 2 if self.bidirectional else 1)
        y, hn, cn, cells, _ = composed.members(x, self.h0, self.c0, weights, places, Members())
        return (y.transpose(0, 1), hn, cn, cells.transpose(0, 1)) if self.batch_first else (y, hn, cn, cells)


_TAKES = (
    "Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? starts, "
    "bool bias, int num_layers, bool bidirectional, bool batch_first, bool to_hx, bool states"
)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args)
    return tuple(tensor.contiguous() for tensor in call.run(call.places()))


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args)
    input, D, lead = call.input, 2 if call.bidirectional else 1, call.input.shape[:-1]
    cells = input.new_empty((*lead, D * call.c0.shape[-1]) if call.states else 0)
    ends = call.h0.new_empty(call.h0.shape), call.c0.new_empty(call.c0.shape)
    return input.new_empty((*lead, D * call.h0.shape[-1])), *ends, cells


@contextmanager
def recording() -> Iterator[None]:
    """Within it autograd records, also inside of an operator, where it is switched off."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _backward(cotangents: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
    """cotangents: of the first of what forward() returns; needs: which of the tensors need a gradient."""
    call = Call(*args)
    places, tensors = call.places(), call.tensors
    asked = [k for k, needed in enumerate(needs) if needed]

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        every = dict(enumerate(tensors)) | dict(zip(asked, given, strict=True))
        return call.of(*every.values()).run(places)[: len(cotangents)]

    with recording():
        given = [tensors[k].detach().requires_grad_() for k in asked]
        pairs = [pair for pair in zip(outputs(*given), cotangents, strict=True) if pair[0].requires_grad]
        results, by = zip(*pairs, strict=True)
        grads = torch.autograd.grad(results, given, by, materialize_grads=True)
    return [grad.clone(memory_format=torch.contiguous_format) for grad in grads]


def _backward_fake(cotangents: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
    pairs = zip(Call(*args).tensors, needs, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, needed in pairs if needed]


forward = torch.library.custom_op(
    "fused_lstm::on_torch", _forward, mutates_args=(), schema=f"({_TAKES}) -> (Tensor, Tensor, Tensor, Tensor)"
)
backward = torch.library.custom_op(
    "fused_lstm::on_torch_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor[] cotangents, bool[] needs, {_TAKES}) -> Tensor[]",
)
forward.register_fake(_forward_fake)
backward.register_fake(_backward_fake)
forward.register_vmap(one_by_one(forward))
backward.register_vmap(one_by_one(backward))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call = Call(*inputs)
    ctx.options = call[7:]
    of_weights = ctx.needs_input_grad[3]  # in an exported graph one for all
    of_weights = of_weights if isinstance(of_weights, list | tuple) else [of_weights] * len(call.weights)
    ctx.needs = [*ctx.needs_input_grad[:3], *of_weights]
    ctx.save_for_backward(*call.tensors, *call[4:7])


def _gradients(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    *tensors, batch_sizes, lengths, starts = ctx.saved_tensors
    input, h0, c0, *weights = tensors
    call = Call(input, h0, c0, weights, batch_sizes, lengths, starts, *ctx.options)
    grads = iter(backward(list(cotangents if call.states else cotangents[:3]), ctx.needs, *call))
    of_input, of_h0, of_c0, *of_weights = (next(grads) if needed else None for needed in ctx.needs)
    return of_input, of_h0, of_c0, of_weights, *[None] * len(call[4:])


forward.register_autograd(_gradients, setup_context=_setup_context)
