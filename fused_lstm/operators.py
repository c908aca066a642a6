"""The launchers as torch operators, fused_lstm::forward, ::backward, ::dropout and ::one_step: what torch.compile and
torch.func see. The arguments of each are a record, of which its schema is made."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stand_in, vmap
from .kernels.environment import WHY_NO_TRITON
from .kernels.findings import Candidate, Refused, findings_on
from .kernels.layout import Layout, Stack, StepWeights, accumulator
from .kernels.plan import Plan, choose, choose_one_step, hardware_of, kind_of, kind_of_weights, refuse, step_mode
from .kernels.tiles import Problem
from .records import flatten, record, schema, unflatten
from .weights import weights_of, wide_weights, widened

if WHY_NO_TRITON is None:
    from .kernels import backward as backward_kernel
    from .kernels import dropout as dropout_kernel
    from .kernels import forward as forward_kernel
    from .kernels import one_step as one_step_kernel

record(Layout)
record(Stack)

_functorch: Any = torch._C._functorch


class Operator:
    """A torch operator fused_lstm::name, which mutates no argument. It is called with a record of its arguments.

    run: what it does; a result that is None is empty for the dispatcher. fake: the same for tensors without data.
    returns: as a schema has it. directly: keywords of `run` without the dispatcher.
    """

    def __init__(
        self,
        name: str,
        args: Any,
        returns: str,
        run: Callable[..., Any],
        fake: Callable[[Any], Any],
        directly: Mapping[str, Any] = MappingProxyType({}),
    ):
        def flat_run(*flat: Any) -> Any:
            results = self.run(unflatten(args, flat))
            if not isinstance(results, tuple):
                return results
            return tuple(results[0].new_empty(0) if result is None else result for result in results)

        self.args, self.run, self.directly = args, run, directly
        self.custom = torch.library.custom_op(
            f"fused_lstm::{name}", flat_run, mutates_args=(), schema=f"({schema(args)}) -> {returns}"
        )
        self.custom.register_fake(lambda *flat: fake(unflatten(args, flat)))
        self.overload: Any = self.custom._opoverload

    def __call__(self, args: Any, direct: bool = False) -> Any:
        """direct: without torch's dispatcher, which takes the host as long as a launch; if unwatched() says so."""
        return self.run(args, **self.directly) if direct else self.overload(*flatten(args))


def unwatched(values: Iterable[Any]) -> bool:
    """Whether nobody looks at what a call does with these tensors: no compiler, transform, mode or subclass of Tensor,
    so that an operator can be run directly."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if _functorch.peek_interpreter_stack() is not None:
        return False
    for value in values:
        kind = type(value)
        if kind is torch.nn.Parameter:  # which no transform makes
            if value.is_neg():
                return False
        elif kind is Tensor:
            keys = torch._C._dispatch_keys(value)
            plain = _PLAIN.get(keys.raw_repr())
            if not (_is_plain(keys) if plain is None else plain):
                return False
        elif isinstance(value, Tensor):
            return False
    return True


_KEY: Any = torch._C.DispatchKey
_PLAIN: dict[int, bool] = {}  # _is_plain() of the sets of keys that there have been


def _is_plain(keys: Any) -> bool:
    """Whether a tensor with these dispatch keys is its memory and no more."""
    # A transform's tensor says that it is a Tensor, but has no backend; after the transform it has a wrapper, which the
    # dispatcher takes off, as it carries out a minus sign that is only noted.
    noted = (_KEY.FuncTorchGradWrapper, _KEY.Negative, _KEY.Conjugate, _KEY.Functionalize)
    plain = (keys.has(_KEY.CUDA) or keys.has(_KEY.CPU)) and not any(map(keys.has, noted))
    _PLAIN[keys.raw_repr()] = plain
    return plain


@record
class ForwardArgs(NamedTuple):
    """As kernels.forward.forward takes them; a weight_hh of 8 bits, with its scale, if nothing is to be saved."""

    input_gates: Tensor
    weight_hh: Tensor
    h0: Tensor
    c0: Tensor
    c_reset: Tensor | None
    layout: Layout
    weight_hr: Tensor | None
    stack: Stack
    reverse: bool
    save: bool
    ieee: bool
    scale: Tensor | None = None


def run_forward(a: ForwardArgs, launcher: Callable[..., Any], **more: Any) -> Any:
    """launcher: kernels.forward.forward, which takes a plan, or stand_in.forward, which takes no scale."""
    if a.scale is not None:
        more["scale"] = a.scale.contiguous()
    return launcher(
        *(tensor.contiguous() for tensor in (a.input_gates, a.weight_hh, a.h0, a.c0)),
        reverse=a.reverse,
        layout=_contiguous(a.layout),
        c_reset=a.c_reset,
        stack=a.stack,
        weight_hr=a.weight_hr,
        save=a.save,
        **more,
    )


def _forward_fake(a: ForwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    input_gates, h0, c0 = a.input_gates, a.h0, a.c0
    lead = (*(h0.shape[:1] if a.stack.weight_ih is not None else ()), *input_gates.shape[:-1])
    width = input_gates.shape[-1] // 4
    y = input_gates.new_empty((*lead, width // c0.shape[-1] * h0.shape[-1]))
    hn, cn = h0.new_empty(h0.shape), c0.new_empty(c0.shape, dtype=accumulator(c0.dtype))
    if not a.save:
        return y, hn, cn, y.new_empty(0), y.new_empty(0)
    return y, hn, cn, cn.new_empty((*lead, width)), input_gates.new_empty((*lead, input_gates.shape[-1]))


@record
class BackwardArgs(NamedTuple):
    """As kernels.backward.backward takes them."""

    dy: Tensor
    dhn: Tensor
    dcn: Tensor
    weight_hh: Tensor
    c0: Tensor
    c: Tensor
    gates: Tensor
    dc_steps: Tensor | None
    c_reset: Tensor | None
    layout: Layout
    weight_hr: Tensor | None
    stack: Stack
    reverse: bool
    ieee: bool


def run_backward(a: BackwardArgs, launcher: Callable[..., Any], **plan: Plan) -> Any:
    """launcher: kernels.backward.backward, which takes a plan, or stand_in.backward."""
    return launcher(
        *(tensor.contiguous() for tensor in (a.dy, a.dhn, a.dcn, a.weight_hh, a.c0, a.c, a.gates)),
        reverse=a.reverse,
        layout=_contiguous(a.layout),
        c_reset=a.c_reset,
        stack=a.stack,
        weight_hr=a.weight_hr,
        dc_steps=None if a.dc_steps is None else a.dc_steps.contiguous(),
        **plan,
    )


def _backward_fake(a: BackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dc_reset = a.gates.new_empty(0) if a.c_reset is None else a.c0.new_empty(a.c0.shape)
    dh_steps = a.gates.new_empty(0) if a.weight_hr is None else a.dy.new_empty(a.dy.shape)
    return a.gates.new_empty(a.gates.shape), a.c0.new_empty(a.c0.shape), dc_reset, dh_steps


def _contiguous(layout: Layout) -> Layout:
    return layout if layout.starts is None else layout._replace(starts=layout.starts.contiguous())


Launch = ForwardArgs | BackwardArgs


def gates_of(a: Launch) -> Tensor:
    """Of all steps: of their shape and dtype are the plan and the steps."""
    return a.input_gates if isinstance(a, ForwardArgs) else a.gates


def sizes_of(a: Launch) -> tuple[torch.dtype, int, int, torch.device, bool, int, int, int, str]:
    """What choose() takes, of the sizes of a launch. It checks them: the kernels take those of all tensors from c0, and
    would read a weight of another size out of bounds."""
    (R, B, H), weight_hh, gates = a.c0.shape, a.weight_hh, gates_of(a)
    stacked = a.stack.weight_ih is not None
    D, P = 1 if stacked else R, 0 if a.weight_hr is None else a.weight_hr.shape[-2]
    if weight_hh.shape != (R, 4 * H, P or H) or gates.shape[-1] != D * 4 * H:
        raise RuntimeError(
            f"hidden size {H} takes weight_hh of size {(4 * H, P or H)} and {4 * H} gates, "
            f"got {tuple(weight_hh.shape[-2:])} and {gates.shape[-1] // D}"
        )
    fits = a.weight_hr is None or (a.weight_hr.shape == (R, P, H) and P < H and not stacked)
    if not fits or (stacked and a.stack.weight_ih.shape != (R - 1, 4 * H, H)):  # type: ignore[union-attr]
        raise RuntimeError(f"hidden size {H} does not go with the other weights of the launch")
    narrow, scale = kind_of_weights(weight_hh.dtype), a.scale if isinstance(a, ForwardArgs) else None
    more = stacked or P or getattr(a, "save", False)
    if bool(narrow) != (scale is not None) or (scale is not None and (more or scale.shape != (R, 4 * H))):
        raise RuntimeError(f"weight_hh of {weight_hh.dtype} does not go with the scale or the rest of the launch")
    return gates.dtype, B, H, gates.device, a.ieee, D, R if stacked else 1, P, narrow


def problem_of(a: Launch) -> Problem:
    """What a launch multiplies."""
    dtype, _, H, _, ieee, directions, layers, proj, weights = sizes_of(a)
    return Problem(kind_of(dtype, ieee), H, isinstance(a, BackwardArgs), directions, layers, proj, weights)


def pass_of(a: Launch) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """What runs a launch with a launcher, the kernels' launcher, and the one that stands in for it."""
    if isinstance(a, ForwardArgs):
        return run_forward, forward_kernel.forward, stand_in.forward
    return run_backward, backward_kernel.backward, stand_in.backward


def _launched(a: Launch, **more: Any) -> tuple[Tensor | None, ...]:
    """Runs a launch on the best of the kernels that run. more: for these kernels' launcher."""
    run, kernels, instead = pass_of(a)
    while True:
        plan = choose(*sizes_of(a))
        if isinstance(a, ForwardArgs) and a.scale is not None and not plan.weights:
            a = a._replace(weight_hh=widened(a.weight_hh, a.scale), scale=None)
        if plan.mode == "torch":
            return run(a, instead)
        try:
            return run(a, kernels, plan=plan, **more)
        except Refused as refused:
            _refuse(a, plan, refused)


def _refuse(a: Launch, plan: Plan, refused: Refused) -> None:
    """Records it, so that the next plan has another kernel."""
    problem, device = problem_of(a), a.c0.device
    candidate = Candidate.of(problem, plan.mode, plan.tiles(problem.backward))
    if candidate in findings_on(hardware_of(device)).refused:
        raise refused  # the plan has it all the same
    refuse(device, candidate, refused)


def beside(
    name: str, launcher: Callable[..., Tensor], instead: Callable[..., Tensor], *args: Any, **more: Any
) -> Tensor:
    """What the launcher of a kernel beside the recurrence returns; if that does not run on the device of the first
    argument, `instead`, which takes the same."""
    device, candidate = args[0].device, Candidate(Problem(kind_of(args[0].dtype, True), args[0].shape[-1]), name)
    if candidate not in findings_on(hardware_of(device)).refused:
        try:
            return launcher(*args, **more)
        except Refused as refused:
            refuse(device, candidate, refused)
    return instead(*args, **more)


@record
class DropoutArgs(NamedTuple):
    """As kernels.dropout.dropout takes them."""

    y: Tensor
    seed: Tensor
    keep: Tensor
    layout: Layout
    layer: int
    B: int


def _dropout(a: DropoutArgs) -> Tensor:
    args = a.y.contiguous(), a.seed, a.keep, a.layer, a.B, a.layout
    return beside("dropout", dropout_kernel.dropout, stand_in.dropout, *args)


@record
class OneStepArgs(NamedTuple):
    """As kernels.one_step.one_step takes them; weights: of all layers and directions in nn.LSTM's order. scales: of
    weight_ih, then weight_hh of each, if these have 8 bits; otherwise none."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    bias: bool
    directions: int
    ieee: bool


def _one_step(a: OneStepArgs, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, h0, c0, D = a.x, a.h0, a.c0, a.directions
    (R, B, out), H = h0.shape, c0.shape[2]
    weights, features = weights_of(a.weights, a.bias, R), x.shape[1]
    for k, w in enumerate(weights):
        if k == D:
            features = D * out
        wanted = (4 * H, features), (4 * H, out), None if w.weight_hr is None else (out, H)
        found = w.weight_ih.shape, w.weight_hh.shape, None if w.weight_hr is None else w.weight_hr.shape
        if found != wanted:
            raise RuntimeError(f"{features} features and hidden size {H} take weights of sizes {wanted}, got {found}")
    if (w.weight_hr is None) != (out == H) or c0.shape != (R, B, H) or x.shape[0] != B or R % D:
        raise RuntimeError(f"states of {tuple(h0.shape)} and {tuple(c0.shape)} do not go with {B} rows and the weights")
    narrow = kind_of_weights(a.weights[0].dtype)
    if bool(narrow) != bool(a.scales) or (a.scales and [scale.shape for scale in a.scales] != [(4 * H,)] * (2 * R)):
        raise RuntimeError(f"weights of {a.weights[0].dtype} do not go with {len(a.scales)} scales")
    sizes = x.dtype, B, H, x.device, a.ieee, D, R // D, out if out < H else 0, narrow
    while (plan := choose_one_step(*sizes)).mode != "torch":
        try:
            states = x.contiguous(), h0.contiguous(), c0.contiguous()
            return one_step_kernel.one_step(*states, StepWeights.of(weights, a.scales), plan=plan, keep=keep)
        except Refused as refused:
            problem = Problem(kind_of(x.dtype, a.ieee), H, False, D, plan.layers, out if out < H else 0)
            candidate = Candidate.of(problem, step_mode(narrow), plan.tiles(False))
            if candidate in findings_on(hardware_of(x.device)).refused:
                raise  # the plan has it all the same
            refuse(x.device, candidate, refused)
    return stand_in.one_step(x, h0, c0, weights_of(wide_weights(a.weights, a.scales), a.bias, R), D)


def _one_step_fake(a: OneStepArgs) -> tuple[Tensor, Tensor, Tensor]:
    y = a.x.new_empty(a.x.shape[0], a.directions * a.h0.shape[2])
    return y, a.h0.new_empty(a.h0.shape), a.c0.new_empty(a.c0.shape)


_FORWARD = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
# An operator of torch's must not return what it was given.
forward = Operator("forward", ForwardArgs, _FORWARD, _launched, _forward_fake, {"over_input": True})
backward = Operator("backward", BackwardArgs, "(Tensor, Tensor, Tensor, Tensor)", _launched, _backward_fake)
dropout = Operator("dropout", DropoutArgs, "Tensor", _dropout, lambda a: a.y.new_empty(a.y.shape))
one_step = Operator("one_step", OneStepArgs, "(Tensor, Tensor, Tensor)", _one_step, _one_step_fake, {"keep": True})

# y, c and gates, and dgates and dh_steps, have all steps.
forward.custom.register_vmap(vmap.as_more_rows(forward.overload, of_all_steps=(True, False, False, True, True)))
backward.custom.register_vmap(vmap.as_more_rows(backward.overload, of_all_steps=(True, False, False, True)))
one_step.custom.register_vmap(vmap.as_more_rows(one_step.overload, of_all_steps=(False, False, False)))
dropout.custom.register_vmap(vmap.one_by_one(dropout.overload))
