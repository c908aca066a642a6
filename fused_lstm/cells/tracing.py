"""A cell's Graph, from torch's own graph of its function and derivative: torch.func.vjp, recorded once by make_fx.

Operations only get other names here, those that printing.py knows; some are made of several, and equal ones once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .elementwise import SHAPE
from .graph import COSTS, Builder, Graph, Node, Value, is_bool, least_saved

# By an operation of torch how it is made of those in COSTS: of a Builder and its arguments.
Rule = Callable[..., Value]
RULES: dict[str, Rule] = {op: lambda b, *args, op=op: b.make(op, *args) for op in COSTS if op != "to_float"}
SAME = "detach", "detach_copy", "clone", "alias", "alias_copy", "lift_fresh", "lift_fresh_copy"
RULES |= dict.fromkeys(SAME, lambda b, x, memory_format=None: x)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule("add")
def _add(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    return b.make("add", x, b.make("mul", y, alpha))


@rule("sub")
def _sub(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    return b.make("sub", x, b.make("mul", y, alpha))


@rule("rsub")
def _rsub(b: Builder, x: Value, y: Value, alpha: float = 1) -> Value:
    return b.make("sub", y, b.make("mul", x, alpha))


@rule("reciprocal")
def _reciprocal(b: Builder, x: Value) -> Value:
    return b.make("div", 1.0, x)


@rule("square")
def _square(b: Builder, x: Value) -> Value:
    return b.make("mul", x, x)


@rule("relu")
def _relu(b: Builder, x: Value) -> Value:
    return b.make("maximum", x, 0.0)


@rule("threshold_backward")
def _threshold_backward(b: Builder, dy: Value, x: Value, threshold: float) -> Value:
    return b.make("where", b.make("le", x, threshold), 0.0, dy)


@rule("clamp")
def _clamp(b: Builder, x: Value, min: float | None = None, max: float | None = None) -> Value:
    x = x if min is None else b.make("maximum", x, min)
    return x if max is None else b.make("minimum", x, max)


@rule("sign", "sgn")
def _sign(b: Builder, x: Value) -> Value:
    return b.make("sub", *(b.make("to_float", b.make(op, x, 0.0)) for op in ("gt", "lt")))


@rule("pow")
def _pow(b: Builder, x: Value, exponent: Value) -> Value:
    if isinstance(exponent, Node) or isinstance(x, float):
        raise NotImplementedError("pow of two tensors")
    if exponent == 0.5:
        return b.make("sqrt", x)
    if exponent != int(exponent):
        return b.make("exp2", b.make("mul", b.make("log2", x), exponent))
    power: Value = 1.0
    for _ in range(abs(int(exponent))):
        power = b.make("mul", power, x)
    return power if exponent >= 0 else b.make("div", 1.0, power)


@rule("addcmul")
def _addcmul(b: Builder, x: Value, y: Value, z: Value, value: float = 1) -> Value:
    return b.make("add", x, b.make("mul", b.make("mul", y, z), value))


@rule("addcdiv")
def _addcdiv(b: Builder, x: Value, y: Value, z: Value, value: float = 1) -> Value:
    return b.make("add", x, b.make("mul", b.make("div", y, z), value))


@rule("lerp")
def _lerp(b: Builder, x: Value, y: Value, weight: Value) -> Value:
    return b.make("add", x, b.make("mul", weight, b.make("sub", y, x)))


@rule("silu")
def _silu(b: Builder, x: Value) -> Value:
    return b.make("mul", x, b.make("sigmoid", x))


@rule("silu_backward")
def _silu_backward(b: Builder, dy: Value, x: Value) -> Value:
    y = b.make("sigmoid", x)
    slope = b.make("add", 1.0, b.make("mul", x, b.make("sub", 1.0, y)))
    return b.make("mul", dy, b.make("mul", y, slope))


def _logical(b: Builder, *args: Value, op: str) -> Value:
    return b.make(op, *(arg if is_bool(arg) else b.make("ne", arg, 0.0) for arg in args))


for _op in ("logical_and", "logical_or", "logical_not"):
    RULES[_op] = partial(_logical, op=_op)
RULES["logical_xor"] = partial(_logical, op="ne")


@rule("sigmoid_backward")
def _sigmoid_backward(b: Builder, dy: Value, y: Value) -> Value:
    return b.make("mul", b.make("mul", dy, y), b.make("sub", 1.0, y))


@rule("tanh_backward")
def _tanh_backward(b: Builder, dy: Value, y: Value) -> Value:
    return b.make("mul", dy, b.make("sub", 1.0, b.make("mul", y, y)))


@rule("log_sigmoid_forward")
def _log_sigmoid(b: Builder, x: Value) -> Any:
    return b.make("log_sigmoid", x), None  # the second is a buffer of torch's


@rule("log_sigmoid_backward")
def _log_sigmoid_backward(b: Builder, dy: Value, x: Value, buffer: Any) -> Value:
    return b.make("mul", dy, b.make("sigmoid", b.make("neg", x)))


@rule("masked_fill")
def _masked_fill(b: Builder, x: Value, mask: Value, value: Value) -> Value:
    return b.make("where", mask, value, x)


@rule("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not")
def _bitwise(b: Builder, *args: Value) -> Value:
    raise NotImplementedError("bits of numbers")


@rule("_to_copy")
def _to_copy(b: Builder, x: Value, dtype: Any = None, **_: Any) -> Value:
    return b.make("to_float", x) if is_bool(x) and dtype.is_floating_point else x


@rule("zeros_like", "empty_like", "empty_permuted")
def _zeros_like(b: Builder, *args: Any, **_: Any) -> Value:
    return 0.0


@rule("ones_like")
def _ones_like(b: Builder, x: Value, **_: Any) -> Value:
    return 1.0


@rule("full_like")
def _full_like(b: Builder, x: Value, value: float, **_: Any) -> Value:
    return float(value)


@rule("scalar_tensor")
def _scalar_tensor(b: Builder, value: float, **_: Any) -> Value:
    return float(value)


def recorded(on_flat: Callable[..., tuple[Tensor, ...]], arguments: int, outputs: int) -> torch.fx.GraphModule:
    """torch's graph of a cell's function and its derivative: of its arguments and the gradients of what it returns."""
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def joint(*flat: Tensor) -> Any:
        found, vjp = torch.func.vjp(on_flat, *flat[:arguments])  # type: ignore[misc]
        return found, vjp(flat[arguments:])

    named = {op: op.name().split("::")[-1].partition(".")[0] for op in decomposition_table}
    table: Any = {op: made for op, made in decomposition_table.items() if named[op] not in RULES}
    tensors = [torch.empty(SHAPE, device="cpu", dtype=torch.float32) for _ in range(arguments + outputs)]
    with torch.inference_mode(False), torch.enable_grad():
        functional = torch.func.functionalize(joint, remove="mutations_and_views")
        return make_fx(functional, decomposition_table=table, tracing_mode="fake")(*tensors)


def traced(on_flat: Callable[..., tuple[Tensor, ...]], arguments: tuple[str, ...], states: tuple[str, ...]) -> Graph:
    """The Graph of a cell's function.

    Args:
        on_flat: of tensors named by `arguments`, "x.i" and so on, it returns the states.

    Raises:
        ValueError: an operation that has no rule, named.
    """
    names, b = [*arguments, *(f"d.{state}" for state in states)], Builder()
    of: dict[torch.fx.Node, Any] = {}
    inputs = iter(names)
    module = recorded(on_flat, len(arguments), len(states))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = next(inputs)
            of[node] = b.input(name, name.startswith("d."))
        elif node.op == "get_attr":  # a tensor that the function makes of a number
            of[node] = float(getattr(module, node.target))
        elif node.op == "call_function" and node.target.__name__ == "getitem":
            of[node] = of[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            of[node] = translated(b, node, of)
        elif node.op == "output":
            outputs, gradients = torch.fx.map_arg(node.args[0], of.__getitem__)
    by_name = {name: valued(gradient) for name, gradient in zip(arguments, gradients, strict=True)}

    def of_kind(kind: str) -> dict[str, Value]:
        return {name[2:]: value for name, value in by_name.items() if name.startswith(kind)}

    after = dict(zip(states, map(valued, outputs), strict=True))
    return Graph(after, least_saved(after.values(), by_name.values()), *map(of_kind, ("x.", "r.", "s.", "p.")))


def valued(value: Any) -> Value:
    return value if isinstance(value, Node) else float(value)


def translated(b: Builder, node: torch.fx.Node, of: dict[torch.fx.Node, Any]) -> Any:
    """One operation of torch's graph."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    args: Any = torch.fx.map_arg(node.args, of.__getitem__)
    kwargs: Any = torch.fx.map_arg(node.kwargs, of.__getitem__)
    if name.startswith("bitwise_") and is_bool(args[0]):  # what &, | and ^ are of bools
        name = name.replace("bitwise", "logical")
    try:
        return RULES[name](b, *args, **kwargs)
    except (KeyError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{name} has no form in Triton here: {node.format_node()}") from error
