"""What a cell's function may do: it is tried on tensors without data, and every operation is looked at."""

import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Element-wise, though torch does not tag them so: constants, and what gives the same numbers again.
ALSO = {"detach", "clone", "alias", "lift_fresh", "lift_fresh_copy", "zeros_like", "ones_like", "full_like"}
ALSO |= {"scalar_tensor", "log_sigmoid_forward"}
SHAPE = 2, 3  # of the tensors that a function is tried on

WRITES = "writes into a tensor; give the result a name of its own"
LOOKS = "looks at a tensor's values; torch.where chooses between numbers"
RANDOM = "draws random numbers, and the derivative would draw others"
CASTS = "changes the dtype; the kernels choose that of a cell's numbers"
OTHER = "is not element-wise; a cell computes each unit by itself"
FOREIGN = "takes a tensor from outside; a learnable vector belongs to params, a constant is a number of Python"


class Refused(Exception):
    """An operation that a cell may not have: its name, and why."""


class Checking(TorchDispatchMode):
    """Within it operations that a cell may not have raise Refused. Of tensors without data it gives such ones."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no compiler looks on, and to import one takes a second

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if any(isinstance(arg, Tensor) and not arg.is_meta for arg in tree_leaves((args, kwargs))):
            raise Refused(name, FOREIGN)
        if function._schema.is_mutable:
            raise Refused(name, WRITES)
        if torch.Tag.data_dependent_output in function.tags:
            raise Refused(name, LOOKS)
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise Refused(name, RANDOM)
        if name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device:  # to the host
            raise Refused(name, LOOKS)
        if name == "_to_copy" and (args[0].dtype, kwargs.get("dtype")) != (torch.bool, torch.float32):
            raise Refused(name, CASTS)
        if torch.Tag.pointwise in function.tags or name in ALSO or name == "_to_copy":
            # Not on the tensors without data: torch would import its compiler for them.
            found = function(*tree_map(with_data, args), **tree_map(with_data, kwargs))
            return tree_map(without_data, found)
        if function not in decomposition_table:
            raise Refused(name, OTHER)
        try:
            with self:
                return decomposition_table[function](*args, **kwargs)
        except Refused as error:
            raise Refused(name, error.args[1]) from error


def with_data(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value


def without_data(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def check(function: Callable[..., Any], on_flat: Callable[..., tuple[Tensor, ...]], count: int) -> None:
    """Tries a cell's function.

    Args:
        function: as it was written. on_flat: the same on a flat list of `count` tensors.

    Raises:
        ValueError: it does what a cell may not, with the operation and the line; or what it returns has not the shape
            and dtype of what it takes.
    """
    with torch.device("meta"):
        tensors = [torch.empty(SHAPE, dtype=torch.float32) for _ in range(count)]
        try:
            with Checking():
                found = on_flat(*tensors)
        except (Refused, RuntimeError, TypeError, ValueError) as error:
            looks = any(
                text in str(error) for text in ("meta", "Boolean", "unallocated", "converted")
            )  # .item(), bool() ...
            if not looks and not isinstance(error, Refused):
                raise
            why = f"{LOOKS} ({error})" if looks else " ".join(error.args)
            raise ValueError(f"{place_of(error, function)}: {why}") from error
    for tensor in found:
        if not isinstance(tensor, Tensor) or tensor.shape != SHAPE or tensor.dtype != torch.float32:
            raise ValueError(f"the cell {function.__name__} must return tensors of the shape and dtype that it takes")


def place_of(error: BaseException, function: Any) -> str:
    """The line of a cell's function at which an error came up."""
    place, code, trace = f"the cell {function.__name__}", function.__code__, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            text = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            return f"{place}, {code.co_filename}, line {trace.tb_lineno}: `{text}`"
        trace = trace.tb_next
    return place
