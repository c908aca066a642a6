"""A Graph printed as Triton: two device functions, which compute on tiles what the cell computes on one number."""

from collections import Counter
from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

from .graph import Graph, Node, Value, is_bool, is_made, needed

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">"}
INFIX |= {"ge": ">=", "logical_and": "&", "logical_or": "|"}
# Of others: the functions of kernels/elementwise.py and kernels/cell.py go by the operation's own name.
FORMS = {"neg": "-{}", "logical_not": "~{}", "where": "tl.where({}, {}, {})", "to_float": "tl.where({}, 1.0, 0.0)"}
FORMS |= {"abs": "tl.abs({})", "maximum": "maximum({}, {})", "minimum": "minimum({}, {})"}
FORMS |= {name: f"tl.{name}({{}})" for name in ("exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf")}

HEADER = '''"""The cell {name}, printed by fused_lstm. Forward keeps {saved} for backward.

x, r: tuples of tiles, of the input's and of the recurrent part of {gates}.
s, now: {states} before the step, and after it. p: {params}.
d: the gradients of now. Backward returns those of x where they are not those of r ({apart}), of r, of s and of p.
"""

import triton
import triton.language as tl

from fused_lstm.kernels.cell import exp, sigmoid, tanh
from fused_lstm.kernels.elementwise import expm1, log1p, log_sigmoid, maximum, minimum
'''


class Argument(NamedTuple):
    """A number that a function is given: its name in the function, and where among the arguments it is."""

    node: Node
    name: str
    place: str


class Names:
    """The names that nodes have in a function; like: of a tile, whose shape and type numbers take."""

    def __init__(self, known: dict[Node, str], like: str) -> None:
        self.known, self.like, self.counts = dict(known), like, Counter[str]()

    def of(self, value: Value) -> str:
        if not isinstance(value, Node):
            return repr(value) if isfinite(value) else f'float("{value}")'
        if value not in self.known:
            self.counts[value.op] += 1
            self.known[value] = f"{value.op}_{self.counts[value.op]}"
        return self.known[value]

    def line(self, node: Node) -> str:
        """The statement that makes a node."""
        if node.op in INFIX:
            args = [self.of(arg) for arg in node.args]
            return f"{self.of(node)} = {args[0]} {INFIX[node.op]} {args[1]}"
        # A bare number would be float32 among the arguments of a function.
        like = next((self.of(arg) for arg in node.args if isinstance(arg, Node) and not is_bool(arg)), self.like)
        args = [self.of(arg) if isinstance(arg, Node) else filled(like, self.of(arg)) for arg in node.args]
        return f"{self.of(node)} = {FORMS.get(node.op, f'{node.op}({{}})').format(*args)}"


def filled(like: str, number: str) -> str:
    """A tile of one number, of the shape and type of another."""
    return f"tl.full({like}.shape, {number}, {like}.dtype)"


def printed(name: str, graph: Graph) -> str:
    """The text of a module with the functions forward(x, r, s, p), which gives h, the other states and what is kept,
    and backward(saved, s, now, p, d)."""
    states = tuple(graph.outputs)
    values = [*graph.outputs.values(), *graph.gradients()]
    inputs = {node.name: node for node in needed(values) if node.op == "input"}

    def arguments(kind: str, names: Iterable[str], form: str) -> list[Argument]:
        """Those of one kind, as far as they are used; form: of their names."""
        places = ((f"{kind}.{name}", form.format(name), f"{kind}[{k}]") for k, name in enumerate(names))
        return [Argument(inputs[full], name, place) for full, name, place in places if full in inputs]

    before, vectors = arguments("s", states, "s_{}"), arguments("p", graph.dp, "p_{}")
    parts = arguments("x", graph.dx, "x_{}") + arguments("r", graph.dr, "r_{}")
    made: dict[str, Any] = {state: node for state, node in graph.outputs.items() if is_made(node)}
    now = [Argument(node, f"now_{state}", f"now[{states.index(state)}]") for state, node in made.items()]
    saved = [Argument(node, f"kept_{k}", f"saved[{k}]") for k, node in enumerate(graph.saved)]
    after = [graph.outputs["h"], [graph.outputs[state] for state in states[1:]], [*graph.saved]]
    of_x = [graph.dx[gate] for gate in graph.apart]
    of_others = [[*of.values()] for of in (graph.dr, graph.ds, graph.dp)]
    header = HEADER.format(
        name=name,
        saved=f"{len(saved)} values" if saved else "nothing",
        gates=", ".join(graph.dx),
        states=", ".join(states),
        params=", ".join(graph.dp) or "none",
        apart=", ".join(graph.apart) or "nowhere",
    )
    names = {node: f"now_{name}" for name, node in made.items() if node.op != "input"}
    forward = function("forward(x, r, s, p)", [*parts, *before, *vectors], names, after)
    given = [*saved, *before, *now, *vectors, *arguments("d", states, "d_{}")]
    return header + forward + function("backward(saved, s, now, p, d)", given, {}, [of_x, *of_others])


def function(signature: str, arguments: list[Argument], names: dict[Node, str], results: list[Any]) -> str:
    """The text of a device function that makes results, values or lists of them, of its arguments."""
    flat = [value for result in results for value in (result if isinstance(result, list) else [result])]
    at_hand = {argument.node for argument in arguments}
    nodes = list(needed(flat, at_hand))
    # One that is there for each batch row, as the vectors are not.
    like = next(argument for argument in reversed(arguments) if not argument.place.startswith("p["))
    of = Names(names | {argument.node: argument.name for argument in arguments}, like.name)
    made = [of.line(node) for node in nodes if node not in at_hand]

    def shown(value: Value) -> str:
        return of.of(value) if isinstance(value, Node) else filled(like.name, of.of(value))

    def returned(result: Any) -> str:
        if not isinstance(result, list):
            return shown(result)
        return f"({', '.join(map(shown, result))}{',' if len(result) == 1 else ''})"

    made.append(f"return {', '.join(map(returned, results))}")
    used = [a for a in arguments if a.node in nodes or (a is like and any(like.name in line for line in made))]
    body = "\n    ".join([f"{argument.name} = {argument.place}" for argument in used] + made)
    return f"\n\n@triton.jit\ndef {signature}:\n    {body}\n"
