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
    return first_of(split_last(tl.permute(tl.reshape(x, (UNITS, PADDED, ROWS)), (0, 2, 1)), PADDED), SLOTS)


@triton.jit
def first_of(tiles, COUNT: tl.constexpr):
    first = ()
    for k in tl.static_range(COUNT):
        first = first + (tiles[k],)
    return first


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
def join_last(tiles, COUNT: tl.constexpr):
    """So many tiles, COUNT a power of two, side by side in a last dimension: what split_last() takes apart."""
    if COUNT == 1:
        return tl.reshape(tiles[0], (tiles[0].shape[0], tiles[0].shape[1], 1))
    else:
        evens, odds = (), ()
        for k in tl.static_range(COUNT // 2):
            evens = evens + (tiles[2 * k],)
            odds = odds + (tiles[2 * k + 1],)
        x = tl.join(join_last(evens, COUNT // 2), join_last(odds, COUNT // 2))
        return tl.reshape(x, (x.shape[0], x.shape[1], COUNT))


@triton.jit
def as_type(x, TYPE: tl.constexpr):
    return x if TYPE is None else x.to(TYPE)


@triton.jit
def load_slots(pointers, mask, H: tl.constexpr, SLOTS: tl.constexpr, TYPE: tl.constexpr):
    """So many tiles, of which the first lies at the pointers. TYPE: theirs, or None: as they lie there, so that nothing
    waits for them yet."""
    slots = ()
    for k in tl.static_range(SLOTS):
        slots = slots + (as_type(tl.load(pointers + k * H, mask=mask, other=0.0), TYPE),)
    return slots


@triton.jit
def store_slots(pointers, slots, mask, H: tl.constexpr):
    for k in tl.static_range(len(slots)):
        tl.store(pointers + k * H, slots[k], mask=mask)


@triton.jit
def load_each(tensors, at, mask, COUNT: tl.constexpr, TYPE: tl.constexpr):
    """A tile of each of so many tensors, all at one place; a tensor that is None has zeros. TYPE: as load_slots()."""
    tiles = ()
    for k in tl.static_range(COUNT):
        if tensors[k] is None:
            tiles = tiles + (tl.zeros(at.shape, tl.float32 if TYPE is None else TYPE),)
        else:
            tiles = tiles + (as_type(tl.load(tensors[k] + at, mask=mask, other=0.0), TYPE),)
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


@triton.jit
def cast_each(tiles, TYPE: tl.constexpr):
    cast = ()
    for k in tl.static_range(len(tiles)):
        cast = cast + (tiles[k].to(TYPE),)
    return cast


@triton.jit
def zeros_like_each(tiles):
    zeros = ()
    for k in tl.static_range(len(tiles)):
        zeros = zeros + (tl.zeros_like(tiles[k]),)
    return zeros


@triton.jit
def without_sentinel(x):
    """x to be polled: a NaN that has all bits one, which says that nothing has come (polling.py), becomes another. A
    cell may choose between numbers without the arithmetic that gives none such."""
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True)
        bits = tl.where(bits == -1, tl.full((), 0x7FFF, tl.int16), bits)
    elif x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(bits == -1, tl.full((), 0x7FFFFFFF, tl.int32), bits)
    else:
        bits = x.to(tl.int64, bitcast=True)
        bits = tl.where(bits == -1, tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64), bits)
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def without_sentinel_each(tiles):
    each = ()
    for k in tl.static_range(len(tiles)):
        each = each + (without_sentinel(tiles[k]),)
    return each
