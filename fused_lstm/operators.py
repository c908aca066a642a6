"""The launchers as torch operators, fused_lstm::forward, ::backward, ::dropout and ::one_step: what torch.compile and
torch.func see."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .kernels.environment import WHY_NO_TRITON
from .kernels.layout import Layout, Stack, accumulator
from .kernels.plan import choose, choose_one_step

if WHY_NO_TRITON is None:
    from .kernels import backward as backward_kernel
    from .kernels import dropout as dropout_kernel
    from .kernels import forward as forward_kernel
    from .kernels import one_step as one_step_kernel

_KEY = torch._C.DispatchKey
_functions: dict[Any, Callable[..., Any]] = {}


def as_operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator fused_lstm::name, which mutates no argument."""

    def define(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(f"fused_lstm::{name}", function, mutates_args=())
        _functions[made] = function
        return made

    return define


def run(operator: Any, *args: Any) -> Any:
    """Runs an operator. Its way through torch's dispatcher takes the host as long as a launch: where nobody looks at it
    there, no compiler, transform, mode or subclass of Tensor, the function itself is called."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if watched or torch._C._functorch.peek_interpreter_stack() is not None or not _are_plain(args):
        return operator(*args)
    return _functions.get(operator, operator)(*args)


def _are_plain(args: Iterable[Any]) -> bool:
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            # A transform's tensor says that it is a Tensor, but has no backend of its own; after the transform it has a
            # wrapper, which the dispatcher takes off.
            keys = torch._C._dispatch_keys(arg)
            if not (keys.has(_KEY.CUDA) or keys.has(_KEY.CPU)) or keys.has(_KEY.FuncTorchGradWrapper):
                return False
        elif not (_are_plain(arg) if kind is list else arg is None or kind is bool or kind is int):
            return False
    return True


@as_operator("forward")
def forward(
    input_gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    c_reset: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    batch_first: bool,
    weight_hr: Tensor | None,
    weight_ih: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    save: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kernels.forward.forward under the plan for its sizes; c and gates are empty without save."""
    members = _check(c0, weight_hh, input_gates, weight_hr, weight_ih)
    B, H = c0.shape[-2:]
    plan = choose(h0.dtype, B, H, h0.device, ieee, **members)
    y, hn, cn, c, gates = forward_kernel.forward(
        input_gates.contiguous(),
        weight_hh.contiguous(),
        h0.contiguous(),
        c0.contiguous(),
        plan=plan,
        reverse=reverse,
        layout=Layout(lengths, offsets, None if starts is None else starts.contiguous(), batch_first),
        c_reset=c_reset,
        stack=Stack(weight_ih, bias, seed, keep),
        weight_hr=weight_hr,
        save=save,
    )
    return y, hn, cn, cn.new_empty(0) if c is None else c, y.new_empty(0) if gates is None else gates


@forward.register_fake
def _(
    input_gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    c_reset: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    batch_first: bool,
    weight_hr: Tensor | None,
    weight_ih: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    save: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead = (*(h0.shape[:1] if weight_ih is not None else ()), *input_gates.shape[:-1])
    width = input_gates.shape[-1] // 4
    y = input_gates.new_empty((*lead, width // c0.shape[-1] * h0.shape[-1]))
    hn, cn = h0.new_empty(h0.shape), c0.new_empty(c0.shape, dtype=accumulator(c0.dtype))
    if not save:
        return y, hn, cn, cn.new_empty(0), y.new_empty(0)
    return y, hn, cn, cn.new_empty((*lead, width)), input_gates.new_empty((*lead, input_gates.shape[-1]))


@as_operator("backward")
def backward(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    c: Tensor,
    gates: Tensor,
    dc_steps: Tensor | None,
    c_reset: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    batch_first: bool,
    weight_hr: Tensor | None,
    weight_ih: Tensor | None,
    seed: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kernels.backward.backward under the plan for its sizes; dc_reset is empty without starts, dh_steps without a
    projection."""
    members = _check(c0, weight_hh, gates, weight_hr, weight_ih)
    B, H = c0.shape[-2:]
    plan = choose(dy.dtype, B, H, dy.device, ieee, **members)
    dgates, dc0, dc_reset, dh_steps = backward_kernel.backward(
        dy.contiguous(),
        dhn.contiguous(),
        dcn.contiguous(),
        weight_hh.contiguous(),
        c0.contiguous(),
        c.contiguous(),
        gates.contiguous(),
        plan=plan,
        reverse=reverse,
        layout=Layout(lengths, offsets, None if starts is None else starts.contiguous(), batch_first),
        c_reset=c_reset,
        stack=Stack(weight_ih, None, seed, keep),
        weight_hr=weight_hr,
        dc_steps=None if dc_steps is None else dc_steps.contiguous(),
    )
    empty = dc0.new_empty(0) if dc_reset is None else dc_reset, dy.new_empty(0) if dh_steps is None else dh_steps
    return dgates, dc0, *empty


@backward.register_fake
def _(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    c: Tensor,
    gates: Tensor,
    dc_steps: Tensor | None,
    c_reset: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    batch_first: bool,
    weight_hr: Tensor | None,
    weight_ih: Tensor | None,
    seed: Tensor | None,
    keep: Tensor | None,
    reverse: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_reset, of_h = (
        c0.new_empty(0 if c_reset is None else c0.shape),
        dy.new_empty(0 if weight_hr is None else dy.shape),
    )
    return gates.new_empty(gates.shape), c0.new_empty(c0.shape), of_reset, of_h


@as_operator("dropout")
def dropout(
    y: Tensor,
    seed: Tensor,
    keep: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    batch_first: bool,
    layer: int,
    B: int,
) -> Tensor:
    """kernels.dropout.dropout."""
    return dropout_kernel.dropout(y.contiguous(), seed, keep, layer, B, Layout(lengths, offsets, starts, batch_first))


@dropout.register_fake
def _(
    y: Tensor,
    seed: Tensor,
    keep: Tensor,
    lengths: Tensor | None,
    offsets: Tensor | None,
    starts: Tensor | None,
    batch_first: bool,
    layer: int,
    B: int,
) -> Tensor:
    return y.new_empty(y.shape)


@as_operator("one_step")
def one_step(x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], bias: bool, ieee: bool) -> tuple[Tensor, Tensor]:
    """kernels.one_step.one_step; weights: those of all layers in nn.LSTM's order."""
    each = 4 if bias else 2
    layers = []
    for layer in range(h0.shape[0]):
        own = weights[each * layer : each * (layer + 1)]
        inputs = x.shape[-1] if layer == 0 else h0.shape[-1]
        _check(c0[:1], own[1][None], own[0].T, None, None)
        if own[0].shape[1] != inputs or c0.shape != h0.shape or x.shape[0] != h0.shape[1]:
            raise RuntimeError(f"{tuple(own[0].shape)} takes {own[0].shape[1]} features, got {inputs}")
        tensors = [weight.contiguous() for weight in own]
        layers.append((*tensors, None, None)[:4])
    plan = choose_one_step(x.dtype, x.device, ieee)
    return one_step_kernel.one_step(x.contiguous(), h0.contiguous(), c0.contiguous(), layers, plan=plan)


@one_step.register_fake
def _(x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], bias: bool, ieee: bool) -> tuple[Tensor, Tensor]:
    return h0.new_empty(h0.shape), c0.new_empty(c0.shape)


def _check(
    c0: Tensor, weight_hh: Tensor, gates: Tensor, weight_hr: Tensor | None, weight_ih: Tensor | None
) -> dict[str, int]:
    """How many directions and layers there are, and how wide the projection is."""
    # The kernels take the sizes of all tensors from c0: a weight of another size would be read out of bounds.
    *members, _, H = c0.shape
    M = members[0] if members else 1
    directions, layers = (M, 1) if weight_ih is None else (1, M)
    upper = [] if weight_ih is None else [tuple(weight_ih.shape) == (M - 1, 4 * H, H)]
    P = 0 if weight_hr is None else weight_hr.shape[-2]
    projects = [] if weight_hr is None else [weight_hr.shape == (*members, P, H), P < H, weight_ih is None]
    if weight_hh.shape != (*members, 4 * H, P or H) or gates.shape[-1] != directions * 4 * H:
        raise RuntimeError(
            f"hidden size {H} takes weight_hh of size {(4 * H, P or H)} and {4 * H} gates, "
            f"got {tuple(weight_hh.shape[-2:])} and {gates.shape[-1] // directions}"
        )
    if not all(upper + projects):
        raise RuntimeError(f"hidden size {H} does not go with the other weights of the launch")
    return {"directions": directions, "layers": layers, "proj": P}


def _vmap(operator: Any, of_time_out: tuple[int, ...] = ()) -> Callable[..., tuple[Any, Any]]:
    """The rule of torch.vmap: what shares its weights runs at once, as more rows; what does not, one by one.
    of_time_out: the places of the results that have all steps."""
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    shared = ("weight_hh", "weight_hr", "weight_ih", "bias", "weights", "offsets", "seed", "keep")

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        V = info.batch_size
        # Where the batch rows are, from the last dimension.
        batch_first = "batch_first" in names and args[names.index("batch_first")]
        of_time = ("input_gates", "dy", "c", "gates", "dc_steps", "starts")
        at: dict[str, int | None] = {"lengths": -1, "starts": -1, **dict.fromkeys(shared)}
        if batch_first:
            at |= {name: -2 if name == "starts" else -3 for name in of_time}
        places = [at.get(name, -2) if isinstance(arg, Tensor) else None for name, arg in zip(names, args, strict=True)]
        # Of dropout each element has the mask that it has alone.
        alone = any(name in ("offsets", "seed") and arg is not None for name, arg in zip(names, args, strict=True))
        if alone or any(at.get(name, 0) is None and _mapped(dim) for name, dim in zip(names, in_dims, strict=True)):
            return one_by_one(operator)(info, in_dims, *args)

        def fold(arg: Any, dim: int | None, rows: int | None) -> Any:
            if rows is None:
                return arg
            each = arg.expand(V, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return each.movedim(0, rows - 1).flatten(rows - 1, rows)

        def unfold(t: Tensor, rows: int) -> Tensor:
            # Contiguous, as an operator of one element gives it.
            return t.unflatten(rows, (V, -1)).movedim(rows - 1, 0).contiguous() if t.dim() > 1 else t.new_empty(V, 0)

        results = operator(*map(fold, args, in_dims, places))
        rows = (-3 if batch_first and place in of_time_out else -2 for place in range(len(results)))
        return tuple(map(unfold, results, rows)), (0,) * len(results)

    return rule


def one_by_one(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """The rule of torch.vmap that runs an operator once for each sample."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        single = ([_select(*pair, k) for pair in zip(args, in_dims, strict=True)] for k in range(info.batch_size))
        results = [operator(*given) for given in single]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        elements = tuple(map(torch.stack, zip(*results, strict=True)))
        return elements, (0,) * len(elements)

    return rule


def _mapped(dim: Any) -> bool:
    return any(d is not None for d in dim) if isinstance(dim, list | tuple) else dim is not None


def _select(arg: Any, dim: Any, k: int) -> Any:
    if isinstance(arg, list):
        return [_select(*both, k) for both in zip(arg, dim or [None] * len(arg), strict=True)]
    return arg if dim is None else arg.select(dim, k)


forward.register_vmap(_vmap(forward, of_time_out=(0, 3, 4)))
backward.register_vmap(_vmap(backward, of_time_out=(0, 3)))
one_step.register_vmap(_vmap(one_step))
dropout.register_vmap(one_by_one(dropout))
