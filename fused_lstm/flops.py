"""What torch.utils.flop_counter.FlopCounterMode counts of the operators: the products within them, two for each
multiplication with its addition, as torch counts its own beside them. Pointwise work counts nothing.

Steps past a row's end count: a tile computes them. torch's own LSTM is not counted, as torch does not count it.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import chunks, operators
from .cells import operators as of_cells

Shapes = dict[str, Any]  # of an operator's arguments, by name; None for what is not there


def _elements(*shapes: Any) -> int:
    return sum(prod(shape) for shape in shapes if shape is not None)


def _rows(shape: Any) -> int:
    return prod(shape[:-1])


def _forward(of: Shapes) -> int:
    return 2 * _rows(of["input_gates"]) * _elements(of["weight_hh"], of["weight_hr"], of["weight_ih"])


def _backward(of: Shapes) -> int:
    # The gradient of h0 is a product of its own, after the operator.
    rows, B = _rows(of["dy"]), of["c0"][-2]
    return 2 * ((rows - B) * _elements(of["weight_hh"]) + rows * _elements(of["weight_hr"], of["weight_ih"]))


def _one_step(of: Shapes) -> int:
    return 2 * of["x"][0] * _elements(*(shape for shape in of["weights"] if len(shape) == 2))


def _forward_in_chunks(of: Shapes) -> int:
    return 2 * _rows(of["x"]) * _elements(of["weight_ih"], of["weight_hh"], of["weight_hr"])


def _backward_in_chunks(of: Shapes) -> int:
    """The gates once more, the gradients of h, and those of x and of the weights, as far as they are needed. Folding a
    projection into W_hh, once a chunk, is not counted."""
    input, recurrent, projection = (_elements(of[name]) for name in ("weight_ih", "weight_hh", "weight_hr"))
    wanted = (of["dx"] + of["dweight_ih"]) * input + of["dweight_hh"] * recurrent + of["dweight_hr"] * projection
    return 2 * _rows(of["x"]) * (input + recurrent + recurrent + projection + wanted)


def _cell_forward(of: Shapes) -> int:
    return 2 * _rows(of["x"]) * _elements(of["weight_hh"])


def _cell_backward(of: Shapes) -> int:
    rows, B = _rows(of["steps"][0]), of["initial"][0][-2]
    return 2 * (rows - B) * _elements(of["weight_hh"])


FORMULAS: list[tuple[Any, Callable[[Shapes], int]]] = [
    (operators.forward, _forward),
    (operators.backward, _backward),
    (operators.one_step, _one_step),
    (chunks.forward_in_chunks, _forward_in_chunks),
    (chunks.backward_in_chunks, _backward_in_chunks),
    (of_cells.forward, _cell_forward),
    (of_cells.backward, _cell_backward),
]


def register() -> None:
    """Makes the formulas known to torch."""
    for operator, count in FORMULAS:
        target = operator.overload
        names = [argument.name for argument in target._schema.arguments]
        if target.overloadpacket not in flop_registry:  # or the package is imported anew
            register_flop_formula(target.overloadpacket)(partial(_counted, count, names))


def _counted(count: Callable[[Shapes], int], names: list[str], *shapes: Any, out_shape: Any, **keywords: Any) -> int:
    return count(dict(zip(names, shapes, strict=False)) | keywords)
