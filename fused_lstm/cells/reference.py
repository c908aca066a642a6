"""The kernels of any cell in torch operations, forward and backward, with the cell's graph evaluated node by node: the
specification that they are held to, and what the operators run where a device takes none of them.

The functions take and return what recurrent_forward() and recurrent_backward() of the kernels do.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..kernels.layout import DENSE, Layout, accumulator
from ..reference import steps as steps_of
from .definition import Cell
from .graph import Graph, Node, Value, needed

# Operations that torch has under another name.
TORCH: dict[str, Any] = {"log_sigmoid": logsigmoid, "to_float": lambda x: torch.where(x, 1.0, 0.0)}
SCALARS = {"maximum", "minimum"}  # which take no numbers of Python


def evaluated(results: Iterable[Value], at_hand: dict[Node, Tensor]) -> list[Tensor]:
    """The values of nodes, made of those that are given."""
    results, known = list(results), dict(at_hand)
    like = next(iter(known.values()))

    def of(value: Value, scalars: bool) -> Any:
        if isinstance(value, Node):
            return known[value]
        return torch.full_like(like, value) if scalars else value

    for node in needed(results, at_hand):
        if node not in known:
            args = (of(arg, node.op in SCALARS) for arg in node.args)
            known[node] = (TORCH.get(node.op) or getattr(torch, node.op))(*args)
    return [of(value, True) for value in results]


def inputs_of(graph: Graph, kind: str, names: Iterable[str], tensors: Iterable[Tensor]) -> dict[Node, Tensor]:
    """Of the inputs of a kind those that the graph has, with their tensors."""
    values = [*graph.outputs.values(), *graph.gradients()]
    nodes = {node.name: node for node in needed(values) if node.op == "input"}
    named = {f"{kind}.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}
    return {nodes[name]: tensor for name, tensor in named.items() if name in nodes}


def forward(
    cell: Cell,
    x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    vectors: list[Tensor],
    initial: list[Tensor],
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    resets: list[Tensor] | None = None,
    save: bool = True,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    graph, dtype, acc = cell.graph, x.dtype, accumulator(x.dtype)
    D, B, H = initial[0].shape
    several, every_end = [], []
    for d in range(D):
        of_x = x.chunk(D, -1)[d].reshape(-1, len(cell.gates) * H)
        states = [state[d].to(acc, copy=True) for state in initial]
        flat = [x.new_zeros(len(of_x), H, dtype=acc if k else dtype) for k in range(len(states))]
        kept = x.new_zeros(len(of_x), len(graph.saved) * H)
        p = inputs_of(graph, "p", cell.params, (vector[d].to(acc) for vector in vectors))
        for rows, active in steps_of(x, B, reverse or d == 1, layout.of_direction(d)):
            s = [state[active] for state in states]
            if layout.starts is not None and resets is not None:
                start = layout.of_direction(d).starts.reshape(-1)[rows, None]  # type: ignore[union-attr]
                s = [
                    torch.where(start, reset[d][active].to(acc), state) for reset, state in zip(resets, s, strict=True)
                ]
            r = s[0] @ weight_hh[d].to(acc).T + (0 if bias_hh is None else bias_hh[d].to(acc))
            parts = (part.to(acc).chunk(len(cell.gates), 1) for part in (of_x[rows], r))
            given = p | inputs_of(graph, "s", graph.outputs, s)
            for kind, part in zip("xr", parts, strict=True):
                given |= inputs_of(graph, kind, cell.gates, part)
            found = evaluated([*graph.outputs.values(), *graph.saved], given)
            after, values = found[: len(states)], found[len(states) :]
            after[0] = after[0].to(dtype).to(acc)
            for state, of_steps, new in zip(states, flat, after, strict=True):
                state[active], of_steps[rows] = new, new.to(of_steps.dtype)
            kept[rows] = torch.cat(values, 1).to(dtype) if values else kept[rows]
        several.append([*flat, kept])
        every_end.append([state.to(acc if k else dtype) for k, state in enumerate(states)])
    lead = x.shape[:-1]
    joined = [torch.cat(each, 1).view(*lead, D * each[0].shape[1]) for each in zip(*several, strict=True)]
    every_step, every_kept = joined[:-1], joined[-1]
    ends = [torch.stack(tensors) for tensors in zip(*every_end, strict=True)]
    return (every_step if save else every_step[:1]), ends, every_kept if save and graph.saved else None


def backward(
    cell: Cell,
    dsteps: list[Tensor | None],
    dends: list[Tensor],
    weight_hh: Tensor,
    vectors: list[Tensor],
    initial: list[Tensor],
    steps: list[Tensor],
    kept: Tensor | None,
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    resets: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor] | None, list[Tensor]]:
    graph, dtype, acc = cell.graph, steps[0].dtype, accumulator(steps[0].dtype)
    D, B, H = initial[0].shape
    n, G = len(initial), len(cell.gates)
    of_all: list[list[Any]] = []
    for d in range(D):
        rows_of = [None if t is None else t.chunk(D, -1)[d].reshape(-1, H).to(acc) for t in (*dsteps, *steps)]
        dy, after_steps = rows_of[:n], rows_of[n:]
        count = len(after_steps[0])  # type: ignore[arg-type]
        of_kept = None if kept is None else kept.chunk(D, -1)[d].reshape(count, -1).to(acc)
        dr, dx = (steps[0].new_zeros(count, slots * H) for slots in (G, len(graph.apart)))
        ds = [torch.zeros_like(dends[0][d], dtype=acc), *(end[d].to(acc, copy=True) for end in dends[1:])]
        dh = dends[0][d].to(acc, copy=True)
        dresets = [torch.zeros_like(state) for state in ds]
        dp = [torch.zeros_like(ds[0]) for _ in vectors]
        p = inputs_of(graph, "p", cell.params, (vector[d].to(acc) for vector in vectors))
        order = list(steps_of(steps[0], B, reverse or d == 1, layout.of_direction(d)))
        for k in reversed(range(len(order))):
            rows, active = order[k]
            before = [state[d].to(acc, copy=True) for state in initial]
            if k > 0:
                rows_before, active_before = order[k - 1]
                for state, of_steps in zip(before, after_steps, strict=True):
                    state[active_before] = of_steps[rows_before]  # type: ignore[index]
            s, start = (
                [state[active] for state in before],
                torch.zeros(len(rows), 1, dtype=torch.bool, device=dh.device),
            )
            if layout.starts is not None and resets is not None:
                start = layout.of_direction(d).starts.reshape(-1)[rows, None]  # type: ignore[union-attr]
                s = [
                    torch.where(start, reset[d][active].to(acc), state) for reset, state in zip(resets, s, strict=True)
                ]
            now = [of_steps[rows] for of_steps in after_steps]  # type: ignore[index]
            of_step = [state[active] for state in ds]
            of_step[0] = of_step[0] + dh[active]
            of_step = [a if b is None else a + b[rows] for a, b in zip(of_step, dy, strict=True)]
            given = p | inputs_of(graph, "s", graph.outputs, s) | inputs_of(graph, "d", graph.outputs, of_step)
            given |= {node: t for node, t in zip(graph.outputs.values(), now, strict=True) if isinstance(node, Node)}
            if of_kept is not None:
                given |= dict(zip(graph.saved, of_kept[rows].chunk(len(graph.saved), 1), strict=True))
            apart = [graph.dx[gate] for gate in graph.apart]
            found = evaluated([*apart, *graph.dr.values(), *graph.ds.values(), *graph.dp.values()], given)
            of_x, of_r = found[: len(apart)], found[len(apart) : len(apart) + G]
            of_s, of_p = found[len(apart) + G : len(apart) + G + n], found[len(apart) + G + n :]
            dr[rows] = torch.cat(of_r, 1).to(dtype)
            dx[rows] = torch.cat(of_x, 1).to(dtype) if of_x else dx[rows]
            for state, dreset, new in zip(ds, dresets, of_s, strict=True):
                dreset[active] += new.masked_fill(~start, 0)
                state[active] = new.masked_fill(start, 0)
            dh[active] = (dr[rows].to(acc) @ weight_hh[d].to(acc)).masked_fill(start, 0)
            for vector, new in zip(dp, of_p, strict=True):
                vector[active] += new
        of_all.append([dr, dx, *ds, *dresets, *dp])
    shape = steps[0].shape[:-1]
    every = list(zip(*of_all, strict=True))
    dr, dx = (torch.cat(tensors, 1).view(*shape, sum(t.shape[1] for t in tensors)) for tensors in every[:2])
    of_states = [torch.stack(tensors) for tensors in every[2:]]
    dinitial, dresets, dp = of_states[:n], of_states[n : 2 * n], of_states[2 * n :]
    return dr, dx if graph.apart else None, dinitial, None if resets is None else dresets, dp
