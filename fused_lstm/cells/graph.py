"""A cell's function and its derivative as one graph of element-wise operations, and what forward keeps for backward.

The derivative is torch's own, recorded by tracing.py.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Node:
    """A number of the cell.

    op: how it is made, a name of COSTS; "input" of what the function is given. args: of what: nodes and constants.
    name: of an input. later: it depends on the gradients, which are there in backward alone.
    """

    op: str
    args: tuple["Node | float", ...]
    name: str = ""
    later: bool = False


Value = Node | float

# What an operation costs, where a value that forward keeps costs SAVED: one store and one load.
SAVED, HARD, EASY = 100, 40, 5
COSTS = dict.fromkeys(("add", "sub", "mul", "neg", "abs", "maximum", "minimum", "where", "logical_not"), EASY)
COSTS |= dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "to_float"), EASY)
COSTS |= dict.fromkeys(("div", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt"), HARD)
COSTS |= dict.fromkeys(("sigmoid", "tanh", "log_sigmoid", "sin", "cos", "erf"), HARD)
OF_BOOL = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"}


@dataclass(frozen=True)
class Graph:
    """A cell's equations and their derivative. Each is a Node, or a constant.

    outputs: h and the states after the step, in the cell's order.
    saved: what forward keeps beside them: the least by COSTS, where h and the states are kept in any case.
    dx, dr: gradients of the gates' two parts, ds: of h and the states before the step, dp: of the vectors.
    """

    outputs: dict[str, Value]
    saved: tuple[Node, ...]
    dx: dict[str, Value]
    dr: dict[str, Value]
    ds: dict[str, Value]
    dp: dict[str, Value]

    def gradients(self) -> list[Value]:
        """All that backward makes."""
        return [value for of in (self.dx, self.dr, self.ds, self.dp) for value in of.values()]

    @property
    def taken(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which of h and the states backward takes as they were before the step, and as they are after it."""
        after = [value for value in self.outputs.values() if is_made(value)]
        leaves = set(needed(self.gradients(), [*self.saved, *after]))
        names = {node.name for node in leaves if node.op == "input"}
        before = tuple(k for k, state in enumerate(self.outputs) if f"s.{state}" in names)
        return before, tuple(k for k, value in enumerate(self.outputs.values()) if value in leaves and is_made(value))

    @property
    def apart(self) -> tuple[str, ...]:
        """The gates whose two parts have gradients of their own; of the others x and r come in as their sum alone."""
        return tuple(gate for gate, dx in self.dx.items() if dx is not self.dr[gate])


NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}


class Builder:
    """Makes nodes, equal ones once."""

    def __init__(self) -> None:
        self.known: dict[Any, Node] = {}

    def input(self, name: str, later: bool) -> Node:
        return self.known.setdefault(name, Node("input", (), name, later))

    def make(self, op: str, *args: Value) -> Value:
        args = tuple(arg if isinstance(arg, Node) else float(arg) for arg in args)
        neutral = NEUTRAL.get(op)
        if neutral is not None and args[1] == neutral:
            return args[0]
        if op in ("add", "mul") and args[0] == neutral:
            return args[1]
        later = any(isinstance(arg, Node) and arg.later for arg in args)
        key = op, *(id(arg) if isinstance(arg, Node) else (arg,) for arg in args)
        return self.known.setdefault(key, Node(op, args, later=later))


def is_made(value: Value) -> bool:
    """Whether it is neither a constant nor what is there before the step."""
    return isinstance(value, Node) and not is_before(value)


def is_before(node: Node) -> bool:
    """Whether it is a state before the step, a vector or a gradient."""
    return node.op == "input" and node.name[0] in "spd"


def is_bool(value: Value) -> bool:
    return isinstance(value, Node) and value.op in OF_BOOL


def needed(values: Iterable[Value], at_hand: Iterable[Value] = ()) -> Iterator[Node]:
    """The nodes that values are made of, each after those that it is made of; of what is at hand that alone."""
    done, leaves = set(), {value for value in at_hand if isinstance(value, Node)}
    stack = [(value, False) for value in reversed(list(values)) if isinstance(value, Node)]
    while stack:
        node, seen = stack.pop()
        if node in done:
            continue
        if seen or node in leaves:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack += [(arg, False) for arg in reversed(node.args) if isinstance(arg, Node)]


def least_saved(outputs: Iterable[Value], gradients: Collection[Value]) -> tuple[Node, ...]:
    """What forward has to keep so that backward can make the gradients, at the least cost: a minimum cut of the graph.

    On one side of it is what forward has, on the other what backward makes anew. A node there costs what its operation
    does, and a node on forward's side that backward takes SAVED. The states before and after the step and the vectors
    are there in any case; the gates' two parts are forward's.
    """
    import networkx  # which torch requires, too

    kept = [output for output in outputs if isinstance(output, Node)]
    graph = networkx.DiGraph()
    graph.add_nodes_from(("forward", "backward"))
    of_backward = list(needed(gradients, kept))
    for node in of_backward:
        if node in kept or is_before(node):
            continue
        if not node.later:
            if node.op == "input":
                graph.add_edge("forward", node)
            else:
                graph.add_edge("forward", node, capacity=COSTS[node.op])
            saving = {} if is_bool(node) else {"capacity": SAVED}
            graph.add_edge(node, ("used", node), **saving)
        for arg in node.args:
            if isinstance(arg, Node) and not arg.later and ("used", arg) in graph:
                graph.add_edge(("used", arg), "backward" if node.later else node)
    for value in gradients:
        if isinstance(value, Node) and ("used", value) in graph:
            graph.add_edge(("used", value), "backward")
    _, (of_forward, _) = networkx.minimum_cut(graph, "forward", "backward")
    return tuple(node for node in of_backward if node in of_forward and ("used", node) not in of_forward)
