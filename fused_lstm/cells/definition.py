"""A cell: what one unit computes at one step, written as a function of element-wise torch operations."""

import functools
from collections import namedtuple
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import count
from typing import Any

from torch import Tensor

from . import elementwise
from .graph import Graph
from .printing import printed
from .tracing import traced

Names = str | Sequence[str]
_BY_KEY: dict[str, "Cell"] = {}
# What a layer's other parameters are called.
TAKEN = {"weight_ih", "weight_hh", "weight_fh", "bias_ih", "bias_hh"}


class Cell:
    """The equations of one unit and one step, as `fused_lstm.cell` makes it of a function.

    It can be called as that function. Attributes:

    gates: names of the G gates, in the order of their rows in weight_ih and weight_hh.
    states: names of the states beside h, in the order in which the function returns them.
    params: names of the learnable vectors of one number a unit.
    feedback: names of the states that are multiplied by a recurrent matrix as h is, for the gates of the same names.
    """

    __name__: str
    __qualname__: str

    def __init__(
        self,
        function: Callable[..., Any],
        gates: tuple[str, ...],
        states: tuple[str, ...],
        params: tuple[str, ...],
        feedback: tuple[str, ...],
    ) -> None:
        self.function, self.gates, self.states, self.params, self.feedback = function, gates, states, params, feedback
        # What the function takes: an argument's numbers by name.
        self.X, self.R, self.S, self.P = (
            record(kind, names) for kind, names in (("x", gates), ("r", gates), ("s", ("h", *states)), ("p", params))
        )
        functools.update_wrapper(self, function)
        elementwise.check(self.function, self.on_flat, len(self.arguments))
        # By it an operator knows the cell, also in an exported program; of several of one name the first has the name.
        name = f"{self.__module__}.{self.__qualname__}"
        self.key = next(key for n in count() if (key := f"{name}#{n}" if n else name) not in _BY_KEY)
        _BY_KEY[self.key] = self

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of on_flat()'s arguments."""
        x, r = ([f"{part}.{gate}" for gate in self.gates] for part in "xr")
        return (*x, *r, *(f"s.{state}" for state in self.S._fields), *(f"p.{name}" for name in self.params))

    def on_flat(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """The function of tensors in the order of `arguments`. Returns h and the states."""
        G, n = len(self.gates), len(self.S._fields)
        x, r, s, p = flat[:G], flat[G : 2 * G], flat[2 * G : 2 * G + n], flat[2 * G + n :]
        found = self.function(self.X(*x), self.R(*r), self.S(*s), self.P(*p))
        found = found if isinstance(found, tuple | list) else (found,)
        if len(found) != n or not all(isinstance(each, Tensor) for each in found):
            kinds = ", ".join(type(each).__name__ for each in found)
            raise ValueError(f"the cell {self.__name__} must return {', '.join(self.S._fields)}, tensors: got {kinds}")
        return tuple(found)

    def __call__(self, x: Any, r: Any, s: Any, p: Any = ()) -> Any:
        return self.function(x, r, s, p)

    def __repr__(self) -> str:
        of = {"gates": self.gates, "state": self.states, "params": self.params, "feedback": self.feedback}
        named = (f"{kind}={' '.join(names)!r}" for kind, names in of.items() if names)
        return f"<cell {self.__name__}({', '.join(named)})>"

    def __deepcopy__(self, memo: Any) -> "Cell":
        return self

    def __reduce__(self) -> str:
        return self.__qualname__  # found again by name, as a function is

    @cached_property
    def graph(self) -> Graph:
        """The function and its derivative, which is torch's own, as graphs of element-wise operations.

        Raises:
            ValueError: an operation that has no form in Triton here, named.
        """
        # In a thread of its own: no autocast, hook, transform or mode of this one has a part in it.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(traced, self.on_flat, self.arguments, self.S._fields).result()

    @property
    def source(self) -> str:
        """The function and its derivative as device functions of Triton. To be read: print(cell.source)."""
        return printed(self.__name__, self.graph)


def record(kind: str, names: tuple[str, ...]) -> Any:
    """A class of tuples with these names."""
    return namedtuple(kind, names)  # type: ignore[misc]


def by_key(key: str) -> Cell:
    """The Cell of a key.

    Raises:
        KeyError: nobody has made it in this process.
    """
    if key not in _BY_KEY:
        raise KeyError(f"the cell {key} is not known here: import the module that has it before the program runs")
    return _BY_KEY[key]


def names_of(kind: str, names: Names) -> tuple[str, ...]:
    """The names of a cell's gates, states or vectors: a sequence of them, or a string with spaces between.

    Raises:
        ValueError: one that is no name, or there twice.
    """
    found = tuple(names.split() if isinstance(names, str) else names)
    for name in found:
        if not (isinstance(name, str) and name.isidentifier()) or name.startswith("_") or found.count(name) > 1:
            raise ValueError(f"{kind} must be different names, got {name!r} in {' '.join(map(str, found))!r}")
    return found


def cell(
    gates: Names, state: Names = "", params: Names = "", *, feedback: Names = ""
) -> Callable[[Callable[..., Any]], Cell]:
    """Makes a Cell of a function of one unit and one step, for Recurrent.

    The function takes x, r, s and p and returns h, or h and the other states in their order. It is made of element-wise
    torch operations on tensors of one shape, and of Python's numbers:

        @fused_lstm.cell(gates="ifgo", state="c")
        def lstm(x, r, s, p):
            i, f, g, o = sigmoid(x.i + r.i), sigmoid(x.f + r.f), tanh(x.g + r.g), sigmoid(x.o + r.o)
            c = f * s.c + i * g
            return o * tanh(c), c

    x.i is the input's part of gate i, x W_ih^T + b_ih; r.i the recurrent part, h W_hh^T + b_hh of the step before; s.c
    and s.h are the states before the step; p.w a vector, the same for all batch rows.

    Args:
        gates: a name for each of the G gates, in the order of their rows in weight_ih (G·H, I) and weight_hh (G·H, H);
            with spaces between, or a string of letters, one for each: "ifgo".
        state: the states beside h, which the recurrence always has.
        params: learnable vectors of one number a unit, such as peepholes.
        feedback: states that reach the gates of the same names through a recurrent matrix of their own,
            weight_fh (F·H, F·H), beside h; or letters, as gates.

    Raises:
        ValueError: names that are none, or the function does what is not element-wise, writes into a tensor, or looks
            at its values: it says what, and in which line.
    """

    def letters(names: Names) -> Names:
        return list(names) if isinstance(names, str) and " " not in names else names

    of_gates, of_feedback = names_of("gates", letters(gates)), names_of("feedback", letters(feedback))
    of_states, of_params = names_of("state", state), names_of("params", params)
    if not of_gates:
        raise ValueError("a cell has at least one gate")
    if "h" in of_states:
        raise ValueError("every cell has the state h: name the others alone")
    if TAKEN & set(of_params):
        raise ValueError(f"params cannot be called {' '.join(sorted(TAKEN & set(of_params)))}: a layer has that")
    if missing := set(of_feedback) - set(of_states) | set(of_feedback) - set(of_gates):
        raise ValueError(f"feedback must name states and gates of the same names, got {' '.join(sorted(missing))}")

    def decorate(function: Callable[..., Any]) -> Cell:
        return Cell(function, of_gates, of_states, of_params, of_feedback)

    return decorate
