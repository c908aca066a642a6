"""The rules of torch.vmap for the operators: samples that share their weights run at once, as more batch rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]

# Without batch rows: samples that do not share these run one by one.
SHARED = ("weight_hh", "weight_hr", "weight_ih", "bias", "weights", "scales", "scale", "offsets", "seed", "keep")
# With a dimension of time, which stands behind the batch rows if the call is batch_first.
OF_ALL_STEPS = ("input_gates", "dy", "c", "gates", "dc_steps", "starts")


def as_more_rows(operator: Any, of_all_steps: tuple[bool, ...]) -> Rule:
    """of_all_steps: of each result, whether it has a dimension of time."""
    names = [argument.name for argument in operator._schema.arguments]

    def rows_dim(name: str, batch_first: bool) -> int:
        """Which dimension has the batch rows, from the last."""
        if name == "lengths":
            return -1
        features = 0 if name == "starts" else 1
        return -1 - features - (batch_first and name in OF_ALL_STEPS)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        samples = info.batch_size
        by_name = dict(zip(names, args, strict=True))
        batch_first = by_name.get("batch_first", False)
        # In dropout each sample has the mask that it has by itself; packed rows lie in an order of their own.
        one_each = by_name.get("seed") is not None or by_name.get("offsets") is not None
        if one_each or any(name in SHARED and _mapped(dim) for name, dim in zip(names, in_dims, strict=True)):
            return one_by_one(operator)(info, in_dims, *args)

        def fold(name: str, arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor) or name in SHARED:
                return arg
            rows = rows_dim(name, batch_first)
            of_samples = arg.expand(samples, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return of_samples.movedim(0, rows - 1).flatten(rows - 1, rows)

        def unfold(result: Tensor, has_time: bool) -> Tensor:
            if result.dim() == 1:  # empty, because it was not asked for
                return result.new_empty(samples, 0)
            rows = -3 if batch_first and has_time else -2
            # Contiguous, as an operator of one sample gives it.
            return result.unflatten(rows, (samples, -1)).movedim(rows - 1, 0).contiguous()

        results = operator(*map(fold, names, args, in_dims))
        return tuple(map(unfold, results, of_all_steps)), (0,) * len(results)

    return rule


def one_by_one(operator: Any) -> Rule:
    """Runs the operator once for each sample."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        of_samples = ([_select(*pair, k) for pair in zip(args, in_dims, strict=True)] for k in range(info.batch_size))
        results = [operator(*sample) for sample in of_samples]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)

    return rule


def _mapped(dim: Any) -> bool:
    return any(d is not None for d in dim) if isinstance(dim, list | tuple) else dim is not None


def _select(arg: Any, dim: Any, sample: int) -> Any:
    if isinstance(arg, list):
        return [_select(*pair, sample) for pair in zip(arg, dim or [None] * len(arg), strict=True)]
    return arg if dim is None else arg.select(dim, sample)
