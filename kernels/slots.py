"""Several numbers of a unit side by side: gates, states, what is kept. In memory those of all H units follow each other
slot by slot, (rows, slots * H); in a kernel they are a tuple of tiles."""

import triton
import triton.language as tl


@triton.constexpr_function
def padded(slots):
    """The power of two that so many slots take in a tile."""
    return 1 << (slots - 1).bit_length()


@triton.jit
def slot_rows(H: tl.constexpr, BLOCK_H: tl.constexpr, SLOTS: tl.constexpr):
    """The rows of a weight (SLOTS * H, ...) for this program's units, a unit's slots side by side and padded; SLOTS * H
    where there is none: (padded(SLOTS) * BLOCK_H,)."""
    PADDED: tl.constexpr = padded(SLOTS)
    index = tl.arange(0, PADDED * BLOCK_H)
    slots, units = index % PADDED, tl.program_id(0) * BLOCK_H + index // PADDED
    return tl.where((units < H) & (slots < SLOTS), slots * H + units, SLOTS * H)


@triton.jit
def split_slots(x, SLOTS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(padded(SLOTS) * UNITS, ROWS) with the slots of a unit side by side, to so many tiles (UNITS, ROWS)."""
    PADDED: tl.constexpr = padded(SLOTS)
    every = split_last(tl.permute(tl.reshape(x, (UNITS, PADDED, ROWS)), (0, 2, 1)), PADDED)
    slots = ()
    for k in tl.static_range(SLOTS):
        slots = slots + (every[k],)
    return slots


@triton.jit
def split_last(x, COUNT: tl.constexpr):
    """(..., COUNT) to so many tiles, COUNT a power of two."""
    if COUNT == 1:
        return (tl.reshape(x, (x.shape[0], x.shape[1])),)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], COUNT // 2, 2)))
        evens, odds = split_last(even, COUNT // 2), split_last(odd, COUNT // 2)
        every = ()
        for k in tl.static_range(COUNT // 2):
            every = every + (evens[k], odds[k])
        return every


@triton.jit
def load_slots(pointers, mask, H: tl.constexpr, SLOTS: tl.constexpr, TYPE: tl.constexpr):
    """So many tiles, of which the first lies at the pointers."""
    slots = ()
    for k in tl.static_range(SLOTS):
        slots = slots + (tl.load(pointers + k * H, mask=mask, other=0.0).to(TYPE),)
    return slots


@triton.jit
def store_slots(pointers, slots, mask, H: tl.constexpr):
    for k in tl.static_range(len(slots)):
        tl.store(pointers + k * H, slots[k], mask=mask)


@triton.jit
def load_each(tensors, at, mask, COUNT: tl.constexpr, TYPE: tl.constexpr):
    """A tile of each of so many tensors, all at one place; a tensor that is None has zeros."""
    tiles = ()
    for k in tl.static_range(COUNT):
        if tensors[k] is None:
            tiles = tiles + (tl.zeros(at.shape, TYPE),)
        else:
            tiles = tiles + (tl.load(tensors[k] + at, mask=mask, other=0.0).to(TYPE),)
    return tiles


@triton.jit
def store_each(tensors, at, tiles, mask):
    """A tile in each of several tensors."""
    for k in tl.static_range(len(tiles)):
        tl.store(tensors[k] + at, tiles[k].to(tensors[k].dtype.element_ty), mask=mask)


@triton.jit
def select_each(mask, chosen, others):
    """Tile by tile the chosen ones where the mask is set, and the others elsewhere."""
    tiles = ()
    for k in tl.static_range(len(others)):
        tiles = tiles + (tl.where(mask, chosen[k], others[k]),)
    return tiles


@triton.jit
def add_each(a, b):
    tiles = ()
    for k in tl.static_range(len(a)):
        tiles = tiles + (a[k] + b[k],)
    return tiles
