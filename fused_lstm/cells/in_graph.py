"""A layer of a cell in a graph, as the operators fused_lstm::cell and ::cell_backward, into which the compiler does not
look: it would write out all T steps. What they keep cannot leave an operator: backward runs the layer again.
"""

from typing import Any, NamedTuple

from torch import Tensor

from .. import vmap
from ..call import Options
from ..operators import Operator
from ..paths.in_graph import recomputed, recomputed_fake
from ..records import record
from .definition import by_key
from .layers import CellCall, composed_layer


@record
class Args(NamedTuple):
    """What the operators take, named as in CellCall and Options; cell: the Cell's key."""

    input: Tensor
    hx: list[Tensor]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    starts: Tensor | None
    cell: str
    bias: bool
    bidirectional: bool
    reset_to_hx: bool

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """The layer of these input, states and weights: what it gives of all steps, and its last states."""
        n = 1 + len(self.hx)
        options = Options(self.bias, bidirectional=self.bidirectional, reset_to_hx=self.reset_to_hx)
        cuts = self.batch_sizes, self.lengths, self.starts
        of_tensors = tensors[0], tensors[1:n], list(tensors[n:])
        of_steps, ends = composed_layer(CellCall(by_key(self.cell), *of_tensors, *cuts, options))
        return [tensor.to(self.input.dtype) for tensor in (*of_steps, *ends)]

    def tensors(self) -> list[Tensor]:
        """All that a gradient may be wanted of."""
        return [self.input, *self.hx, *self.weights]


@record
class BackwardArgs(NamedTuple):
    """cotangents: of all that forward returns; needs: which of Args.tensors() need a gradient."""

    cotangents: list[Tensor]
    needs: list[bool]
    args: Args


def layer_in_graph(call: CellCall) -> tuple[list[Tensor], list[Tensor]]:
    """A Layer as one operator."""
    options = call.options
    flags = bool(options.bias), bool(options.bidirectional), options.reset_to_hx
    cuts = call.batch_sizes, call.lengths, call.starts
    found = forward(Args(call.input, list(call.hx), call.weights, *cuts, call.cell.key, *flags))
    n = len(call.hx)
    return found[:n], found[n:]


def _forward(a: Args) -> list[Tensor]:
    return [tensor.contiguous() for tensor in a.run(*a.tensors())]


def _forward_fake(a: Args) -> list[Tensor]:
    D, H, lead = 2 if a.bidirectional else 1, a.hx[0].shape[-1], a.input.shape[:-1]
    of_steps = [a.input.new_empty((*lead, D * H)) for _ in a.hx]
    return [*of_steps, *(state.new_empty(state.shape) for state in a.hx)]


def _backward(b: BackwardArgs) -> list[Tensor]:
    return recomputed(b.args.run, b.args.tensors(), b.needs, b.cotangents)


def _backward_fake(b: BackwardArgs) -> list[Tensor]:
    return recomputed_fake(b.args.tensors(), b.needs)


forward = Operator("cell", Args, "Tensor[]", _forward, _forward_fake)
backward = Operator("cell_backward", BackwardArgs, "Tensor[]", _backward, _backward_fake)
for _operator in (forward, backward):
    _operator.custom.register_vmap(vmap.one_by_one(_operator.overload))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    args = Args(*inputs)
    needs = list(ctx.needs_input_grad)
    if len(needs) == len(inputs):  # a list has a list, or, in an exported graph, one for all
        needs = [needs[0], *each(needs[1], args.hx), *each(needs[2], args.weights)]
    ctx.needs = needs[: len(args.tensors())]
    ctx.args = args._replace(input=None, hx=[], weights=[])  # type: ignore[arg-type]
    ctx.count = len(args.hx)
    ctx.save_for_backward(*args.tensors())


def each(needed: Any, of: list[Tensor]) -> list[bool]:
    """Of each tensor of a list whether it needs a gradient."""
    return list(needed) if isinstance(needed, list | tuple) else [needed] * len(of)


def _gradients(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    input, *others = ctx.saved_tensors
    n = ctx.count
    args = ctx.args._replace(input=input, hx=others[:n], weights=others[n:])
    grads = iter(backward(BackwardArgs(list(cotangents), ctx.needs, args)))
    of_input, *of_others = (next(grads) if needed else None for needed in ctx.needs)
    nothing = [None] * (len(Args._fields) - 3)
    return of_input, of_others[:n], of_others[n:], *nothing


forward.custom.register_autograd(_gradients, setup_context=_setup_context)
