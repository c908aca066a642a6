"""The memory by which the programs of one step hand their results on: kept from launch to launch, and never cleared by
a launch of its own.

A launch leaves its results in one half, and fills the other half, for the launch after it, with the SENTINEL, which
polling.py waits to see replaced. So launches that follow one another take the halves by turns. Which launches do is
known of those of one thread on one stream: each has memory of its own. A CUDA graph has its own, too, which it fills
at every replay, unless its owner sees to it that replays take turns, as a Session does.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import words


class Exchange(NamedTuple):
    """Both (slots, rows, width), width a whole number of chunks; what lies past a slot's own columns, or past the batch
    rows, is zero."""

    own: Tensor | None  # of this launch: SENTINEL until it is written
    next: Tensor | None  # integers of the same size, of the launch after: SENTINEL is written


NO_EXCHANGE = Exchange(None, None)


def filled(like: Tensor, shape: tuple[int, int, int], columns: list[int], B: int) -> Tensor:
    """What a launch waits to see replaced. columns: of each slot, how many are handed on."""
    half = like.new_zeros(shape)
    if len(set(columns)) == 1:
        words(half[:, :B, : columns[0]]).fill_(-1)
    else:
        for slot, count in enumerate(columns):
            words(half[slot, :B, :count]).fill_(-1)
    return half


class Halves:
    """Two halves, of which each launch takes the one that the launch before has filled."""

    def __init__(self, first: Tensor) -> None:
        self.halves, self.turn = [first, torch.zeros_like(first)], 0

    def take(self) -> Exchange:
        """Of the next launch, which has to be made at once."""
        own, following = self.halves[self.turn], self.halves[1 - self.turn]
        self.turn = 1 - self.turn
        return Exchange(own, words(following))


Kept = dict[Any, Halves]
_here = threading.local()


@contextmanager
def owned(kept: Kept) -> Iterator[None]:
    """Within it the launches of this thread take their memory from `kept`, also those that a CUDA graph captures: its
    replays have to take turns as the launches did."""
    before = getattr(_here, "owned", None)
    _here.owned = kept
    try:
        yield
    finally:
        _here.owned = before


def exchange_for(key: Any, like: Tensor, shape: tuple[int, int, int], columns: list[int], B: int) -> Exchange:
    """The Exchange of a launch that is made at once, on the current stream of the device of `like`. key: by which the
    launches of one form are known; None: it is alone, and leaves no memory behind."""
    kept: Kept | None = getattr(_here, "owned", None)
    if key is None or (kept is None and like.is_cuda and torch.cuda.is_current_stream_capturing()):
        half = filled(like, shape, columns, B)
        return Exchange(half, words(torch.empty_like(half)))
    if kept is None:
        stream = torch._C._cuda_getCurrentRawStream(like.device.index) if like.is_cuda else 0
        key, kept = (key, stream), _kept_here()
    halves = kept.get(key)
    if halves is None:
        halves = kept[key] = Halves(filled(like, shape, columns, B))
    return halves.take()


def _kept_here() -> Kept:
    """Of this thread."""
    try:
        return _here.kept
    except AttributeError:
        _here.kept = {}
        return _here.kept


def forget() -> None:
    """Once a launch has failed nobody knows what it has written: this thread's next ones begin anew."""
    for kept in (getattr(_here, "owned", None), getattr(_here, "kept", None)):
        if kept:
            kept.clear()
