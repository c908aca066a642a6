"""The launchers of any cell as torch operations, fused_lstm::recurrent_forward and ::recurrent_backward."""

from typing import Any, NamedTuple

from torch import Tensor

from .. import vmap
from ..kernels.environment import WHY_NO_TRITON
from ..kernels.findings import Refused
from ..kernels.layout import Layout, accumulator
from ..operators import Operator
from ..records import record
from . import reference
from .definition import Cell, by_key

if WHY_NO_TRITON is None:
    from ..kernels import plan_of_cell
    from ..kernels.plan import kind_of
    from ..kernels.recurrent_backward import recurrent_backward
    from ..kernels.recurrent_forward import recurrent_forward
    from ..kernels.tiles import Problem
    from .compiled import compiled


@record
class ForwardArgs(NamedTuple):
    """As the launcher takes them; cell: a Cell's key. resets: none without layout.starts."""

    x: Tensor
    weight_hh: Tensor
    bias_hh: Tensor | None
    vectors: list[Tensor]
    initial: list[Tensor]
    resets: list[Tensor]
    layout: Layout
    cell: str
    reverse: bool
    save: bool
    ieee: bool


@record
class BackwardArgs(NamedTuple):
    """As the launcher takes them."""

    dsteps: list[Tensor | None]
    dends: list[Tensor]
    weight_hh: Tensor
    vectors: list[Tensor]
    initial: list[Tensor]
    resets: list[Tensor]
    steps: list[Tensor]
    kept: Tensor
    layout: Layout
    cell: str
    reverse: bool
    ieee: bool


def launched(a: Any, like: Tensor, backward: bool, launcher: Any, instead: Any) -> Any:
    """Runs a launch of `like`'s dtype on the best of the kernels that run; instead: where none does."""
    cell = by_key(a.cell)
    while WHY_NO_TRITON is None:
        (D, B, H), equations = a.initial[0].shape, compiled(cell)
        plan = plan_of_cell.choose_for(equations, like.dtype, B, H, like.device, a.ieee, D)
        if plan.mode == "composed":
            break
        try:
            return launcher(equations, plan)
        except Refused as refused:
            problem = Problem(kind_of(like.dtype, a.ieee), H, backward)
            use = plan_of_cell.Use.of(equations, problem, plan.mode, plan.tiles(backward))
            plan_of_cell.refuse(like.device, use, refused)
    return instead(cell)


def _contiguous(layout: Layout) -> Layout:
    return layout if layout.starts is None else layout._replace(starts=layout.starts.contiguous())


def _forward(a: ForwardArgs) -> list[Tensor]:
    x, initial, weight_hh = a.x.contiguous(), [s.contiguous() for s in a.initial], a.weight_hh.contiguous()
    resets = [s.contiguous() for s in a.resets] or None
    options: dict[str, Any] = {"reverse": a.reverse, "layout": _contiguous(a.layout), "save": a.save}

    def by_kernel(equations: Any, plan: Any) -> Any:
        of_resets = resets and tuple(resets)
        args = equations, x, weight_hh, a.bias_hh, tuple(a.vectors), tuple(initial)
        return recurrent_forward(*args, plan=plan, resets=of_resets, **options)

    def instead(cell: Cell) -> Any:
        return reference.forward(cell, x, weight_hh, a.bias_hh, a.vectors, initial, resets=resets, **options)  # type: ignore[arg-type]

    steps, ends, kept = launched(a, x, False, by_kernel, instead)
    return [*steps, *ends, *([x.new_empty(0) if kept is None else kept] if a.save else [])]


def _forward_fake(a: ForwardArgs) -> list[Tensor]:
    cell, acc = by_key(a.cell), accumulator(a.x.dtype)
    lead, width = a.x.shape[:-1], a.x.shape[-1] // len(cell.gates)
    n, count = len(a.initial), len(cell.graph.saved)
    steps = [a.x.new_empty((*lead, width), dtype=acc if k else None) for k in range(n if a.save else 1)]
    ends = [state.new_empty(state.shape, dtype=acc if k else None) for k, state in enumerate(a.initial)]
    return [*steps, *ends, *([a.x.new_empty((*lead, count * width) if count else 0)] if a.save else [])]


def _backward(a: BackwardArgs) -> list[Tensor]:
    def contiguous(tensors: Any) -> Any:
        return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]

    dsteps, dends, initial, steps = map(contiguous, (a.dsteps, a.dends, a.initial, a.steps))
    resets, weight_hh = contiguous(a.resets) or None, a.weight_hh.contiguous()
    kept = a.kept.contiguous() if a.kept.numel() else None
    options: dict[str, Any] = {"reverse": a.reverse, "layout": _contiguous(a.layout)}

    def by_kernel(equations: Any, plan: Any) -> Any:
        of_steps = tuple(dsteps), tuple(dends), weight_hh, tuple(a.vectors), tuple(initial), tuple(steps), kept
        return recurrent_backward(equations, *of_steps, plan=plan, resets=resets and tuple(resets), **options)

    def instead(cell: Cell) -> Any:
        args = dsteps, dends, weight_hh, a.vectors, initial, steps, kept
        return reference.backward(cell, *args, resets=resets, **options)

    dr, dx, dinitial, dresets, dvectors = launched(a, steps[0], True, by_kernel, instead)
    return [dr, dr.new_empty(0) if dx is None else dx, *dinitial, *(dresets or ()), *dvectors]


def _backward_fake(a: BackwardArgs) -> list[Tensor]:
    cell, y = by_key(a.cell), a.steps[0]
    (*lead, width), acc, A = y.shape, accumulator(y.dtype), len(cell.graph.apart)
    dr = y.new_empty((*lead, len(cell.gates) * width))
    dx = y.new_empty((*lead, A * width) if A else 0)
    states = [state.new_empty(state.shape, dtype=acc) for state in (*a.initial, *a.resets)]
    return [dr, dx, *states, *(a.initial[0].new_empty(a.initial[0].shape, dtype=acc) for _ in a.vectors)]


forward = Operator("recurrent_forward", ForwardArgs, "Tensor[]", _forward, _forward_fake)
backward = Operator("recurrent_backward", BackwardArgs, "Tensor[]", _backward, _backward_fake)
for _operator in (forward, backward):
    _operator.custom.register_vmap(vmap.one_by_one(_operator.overload))
