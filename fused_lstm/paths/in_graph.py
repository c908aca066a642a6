"""torch's own LSTM in a graph, as the operators fused_lstm::on_torch and ::on_torch_backward, into which the compiler
does not look.

torch.compile breaks at torch's own LSTM, or takes T for a constant. As an operator it is one node for all T and B. What
it keeps for its backward cannot leave an operator, so that of a graph runs its forward pass again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import composed, vmap
from ..call import Call, Options, Result, States
from ..kernels.layout import Layout
from ..operators import Operator
from ..records import record
from ..recurrence import Inputs, Recurrence
from ..route import Route
from ..segments import Stretches
from ..sequence import Sequence
from ..weights import weights_of
from . import torch_lstm


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py. All layers at once where nothing is wanted between them."""
    options, D = call.options, call.options.directions
    one_by_one = options.use_dropout or options.return_states
    L = 1 if one_by_one else options.num_layers
    per_group = len(call.weights) * L // options.num_layers
    x, of_y, of_c, ends = call.input, [], [], []
    for group in range(options.num_layers // L):
        h0, c0 = call.h0, call.c0
        if options.num_layers > L:
            h0, c0 = (state[group * D : (group + 1) * D] for state in (h0, c0))
        weights = call.weights[group * per_group : (group + 1) * per_group]
        args = Args(
            x,
            h0,
            c0,
            weights,
            call.batch_sizes,
            call.lengths,
            call.starts,
            bool(options.bias),
            L,
            bool(options.bidirectional),
            options.batch_first,
            options.reset_to_hx,
            options.return_states,
        )
        x, hn, cn, cells = forward(args)
        ends.append((hn, cn))
        of_y.append(x)
        of_c.append(cells)
        if options.use_dropout and group < options.num_layers - 1:
            x = torch.dropout(x, options.dropout, True)
    hn, cn = ends[0] if len(ends) == 1 else map(torch.cat, zip(*ends, strict=True))
    return x, hn, cn, States(tuple(of_y), tuple(of_c)) if options.return_states else None


@record
class Args(NamedTuple):
    """What the operators take, named as in Call and Options. With states, of a single layer, they return its cells."""

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
    reset_to_hx: bool
    states: bool

    def of(self, input: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> "Args":
        """With these in the place of Call.tensors()."""
        return self._replace(input=input, h0=h0, c0=c0, weights=list(weights))

    @property
    def call(self) -> Call:
        options = Options(
            self.bias,
            self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            reset_to_hx=self.reset_to_hx,
        )
        tensors = self.input, self.h0, self.c0, self.weights, self.batch_sizes, self.lengths, self.starts
        return Call(*tensors, options)

    def cuts(self) -> Stretches | Sequence | None:
        """Where the steps lie. It reads indices on the host, which no transform may have wrapped."""
        if not self.states:
            return torch_lstm.stretches_of(self.call)
        if self.batch_sizes is not None:
            return Sequence.packed(self.batch_sizes, self.input.device)
        return Sequence.padded(Layout(self.lengths, None, self.starts), self.reset_to_hx, self.call.steps)

    def run(self, cuts: Stretches | Sequence | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, hn, cn and the cells, which are empty without states."""
        if not isinstance(cuts, Sequence):
            y, hn, cn = torch_lstm.whole(self.call, cuts)
            return y, hn, cn, y.new_empty(0)
        x = self.input.transpose(0, 1) if self.batch_first else self.input
        weights = weights_of(self.weights, self.bias, 2 if self.bidirectional else 1)
        y, hn, cn, cells, _ = composed.recurrences(Recurrence(cuts), Inputs(x, self.h0, self.c0, weights))
        return (y.transpose(0, 1), hn, cn, cells.transpose(0, 1)) if self.batch_first else (y, hn, cn, cells)


def _forward(a: Args) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in a.run(a.cuts()))


def _forward_fake(a: Args) -> tuple[Tensor, ...]:
    D, lead = 2 if a.bidirectional else 1, a.input.shape[:-1]
    cells = a.input.new_empty((*lead, D * a.c0.shape[-1]) if a.states else 0)
    ends = a.h0.new_empty(a.h0.shape), a.c0.new_empty(a.c0.shape)
    return a.input.new_empty((*lead, D * a.h0.shape[-1])), *ends, cells


@record
class BackwardArgs(NamedTuple):
    """cotangents: of the first of what forward returns; needs: which of Call.tensors() need a gradient."""

    cotangents: list[Tensor]
    needs: list[bool]
    args: Args


@contextmanager
def recording() -> Iterator[None]:
    """Within it autograd records, also inside of an operator, where it is switched off."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def recomputed(
    run: Callable[..., Iterable[Tensor]], tensors: list[Tensor], needs: list[bool], cotangents: list[Tensor]
) -> list[Tensor]:
    """The gradients of those tensors that need one, within an operator; run: forward, which is run once more."""
    with recording():
        given = [t.detach().requires_grad_() if needed else t for t, needed in zip(tensors, needs, strict=True)]
        pairs = [pair for pair in zip(run(*given), cotangents, strict=True) if pair[0].requires_grad]
        results, by = zip(*pairs, strict=True)
        asked = [tensor for tensor, needed in zip(given, needs, strict=True) if needed]
        grads = torch.autograd.grad(results, asked, by, materialize_grads=True)
    return [grad.clone(memory_format=torch.contiguous_format) for grad in grads]


def recomputed_fake(tensors: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """recomputed() of tensors without data."""
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(tensors, needs, strict=True) if needed]


def _backward(b: BackwardArgs) -> list[Tensor]:
    cotangents, needs, args = b
    cuts = args.cuts()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return args.of(*tensors).run(cuts)[: len(cotangents)]

    return recomputed(run, args.call.tensors(), needs, cotangents)


def _backward_fake(b: BackwardArgs) -> list[Tensor]:
    return recomputed_fake(b.args.call.tensors(), b.needs)


forward = Operator("on_torch", Args, "(Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake)
backward = Operator("on_torch_backward", BackwardArgs, "Tensor[]", _backward, _backward_fake)
for _operator in (forward, backward):
    _operator.custom.register_vmap(vmap.one_by_one(_operator.overload))


TENSORS = "input", "h0", "c0", "batch_sizes", "lengths", "starts"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    args = Args(*inputs)
    of_input, of_h0, of_c0, *rest = ctx.needs_input_grad
    if len(ctx.needs_input_grad) == len(inputs):  # the weights have a list, or, in an exported graph, one for all
        (of_weights, *_), count = rest, len(args.weights)
        of_weights = of_weights if isinstance(of_weights, list | tuple) else [of_weights] * count
    else:  # each has its own
        of_weights = rest[: len(args.weights)]
    ctx.needs = [of_input, of_h0, of_c0, *of_weights]
    ctx.args = args._replace(**dict.fromkeys(TENSORS), weights=[])  # type: ignore[arg-type]
    ctx.save_for_backward(*(getattr(args, name) for name in TENSORS), *args.weights)


def _gradients(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    args = ctx.args._replace(**{name: next(saved) for name in TENSORS}, weights=list(saved))
    used = cotangents if args.states else cotangents[:3]
    grads = iter(backward(BackwardArgs(list(used), ctx.needs, args)))
    of_input, of_h0, of_c0, *of_weights = (next(grads) if needed else None for needed in ctx.needs)
    nothing = Args(*[None] * len(Args._fields))  # type: ignore[arg-type]
    return tuple(nothing._replace(input=of_input, h0=of_h0, c0=of_c0, weights=of_weights))  # type: ignore[arg-type]


forward.custom.register_autograd(_gradients, setup_context=_setup_context)
