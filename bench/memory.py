"""Counts of memory: the peak of a call, and what its forward pass keeps for backward. In bytes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_counts: list[list[Tensor]] = []  # what the counts under way have seen


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """What a call takes beyond what was allocated before it; None on a device that does not count."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def kept(call: Callable[[], Any]) -> tuple[dict[int, int], Any]:
    """The storages that a call saves for backward or holds(), by their addresses, and what the call returns."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    _counts.append(seen)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call()
    finally:
        _counts.pop()
    return storages(seen), result


def holds(*tensors: Tensor) -> None:
    """Tells a count under way of tensors that stay until backward where no hook sees them."""
    for seen in _counts:
        seen += tensors


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The storages of tensors, each once, by their addresses."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def beside(found: dict[int, int], known: Iterable[Tensor]) -> int:
    """The bytes of the storages that are not those of known tensors."""
    own = found.keys() - storages(known).keys()
    return sum(found[at] for at in own)
