"""Row tiles in turn: which of them a step still has, where their rows lie, and the parts by which their cells go."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import rows_of_program


class Batch(NamedTuple):
    """What the rows of a tile follow from."""

    layout: Any
    sizes: Any
    recurrence: Any
    DIRECTIONS: Any
    REVERSE: Any


@triton.jit
def longest(tile, layout, BLOCK_B: tl.constexpr):
    """The steps of a tile's longest row, which is its first one; before the first tile more than there can be."""
    row = tile * BLOCK_B
    if layout.order is not None:
        row = tl.load(layout.order + row, mask=tile >= 0, other=0)
    return tl.load(layout.lengths + row, mask=tile >= 0, other=1 << 40)


@triton.jit
def still_running(tiles, step, layout, BLOCK_B: tl.constexpr):
    """How many of the first `tiles` row tiles have a step: rows lie by falling length, so the first ones have it."""
    if layout.lengths is not None:
        while longest(tiles - 1, layout, BLOCK_B) <= step:
            tiles -= 1
    return tiles


@triton.jit
def rows_from(first, batch, BLOCK_B: tl.constexpr):
    """The Rows of BLOCK_B batch rows from a first one on, or of numbers that are so many more than 0, 1, ..."""
    begin = first - tl.program_id(1) * BLOCK_B  # to which rows_of_program() adds them again
    return rows_of_program(
        batch.layout, batch.sizes, batch.recurrence, begin, False, batch.DIRECTIONS, batch.REVERSE, BLOCK_B, False
    )


@triton.jit
def row_of(mask, tensor, rows, other, other_rows, H: tl.constexpr):
    """Pointers to rows of a tensor (..., H) where the mask is set, and to those of another elsewhere."""
    # Of a choice between whole pointers Triton 3.9 forgets that they are aligned, and loads element by element.
    return tl.where(mask, tensor, other) + tl.where(mask, rows, other_rows) * H


@triton.jit
def part_of(x, k, PARTS: tl.constexpr):
    """Part k of x (PARTS, n): (n,)."""
    if PARTS == 1:
        return tl.reshape(x, (x.shape[1],))
    else:
        halves = tl.reshape(x, (2, PARTS // 2, x.shape[1]))
        first, second = tl.split(tl.permute(halves, (1, 2, 0)))
        half = second if k >= PARTS // 2 else first
        return part_of(half, k % (PARTS // 2), PARTS // 2)
