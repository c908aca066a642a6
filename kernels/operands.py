"""Products whose operands never pass through shared memory.

A matrix instruction takes its operands from registers. The weight's stay there for the whole sequence. Those of the
rows that other programs write come from L2 in the loads that look whether they are there (polling.py): the 16 bytes
that a thread loads of a row are a part of its operand, if the reduction is summed in another order. `in_registers()`
gives both operands this order, once and for all steps for the weight, without an instruction for the rows.

A part is what one warp sums of a chunk: 64 bytes of a row, 32 columns of 16 bits or 16 of 32.
"""

import triton
import triton.language as tl

from .environment import VERSION
from .gates import four
from .matmul import operand, widened


@triton.constexpr_function
def operand_width(rows, size):
    """Elements of the reduction that Triton lays side by side in a register operand of so many rows and bytes an
    element; in another order the kernels move it through shared memory, right but slow."""
    wide = VERSION < (3, 8) or (size == 2 and rows == 8)
    return (8 if wide else 4) // size


@triton.jit
def in_registers(x, SPLIT: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, K_WIDTH: tl.constexpr):
    """A chunk as it lies in memory, (SPLIT, M, a part), in the order in which a thread's 16 bytes are its operand's
    registers, of which K_WIDTH elements lie side by side."""
    # A thread has four words of a part, the first of four threads the first four, and so on. A matrix instruction takes
    # two of them, or two halves, next to each other, of each of the four threads.
    if BITS == 16:
        x = tl.reshape(x, (SPLIT, M, 4, 2, 2, 2))  # thread, pair of words, word, half
        if K_WIDTH == 4:
            x = tl.permute(x, (0, 1, 3, 2, 4, 5))
        else:
            x = tl.permute(x, (0, 1, 3, 4, 2, 5))
    elif BITS == 32:
        x = tl.reshape(x, (SPLIT, M, 4, 2, 2))  # thread, pair of words, word
        if K_WIDTH == 2:
            x = tl.permute(x, (0, 1, 3, 2, 4))
        else:
            x = tl.permute(x, (0, 1, 3, 4, 2))
    return tl.reshape(x, (SPLIT, M, 512 // BITS))


@triton.jit
def chunk_of(k, SPLIT: tl.constexpr, BITS: tl.constexpr):
    """The columns of chunk k: (SPLIT, 1, a part)."""
    PART: tl.constexpr = 512 // BITS
    parts = k * SPLIT + tl.arange(0, SPLIT)
    return parts[:, None, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def load_operand(rows, mask, column_stride, k, FORM: tl.constexpr):
    """Chunk k of rows (M,) of pointers, zero where they are masked and past column K, as an operand: (SPLIT, M, a
    part). FORM: as fetch() takes it."""
    SPLIT: tl.constexpr = FORM.SPLIT
    PRECISION: tl.constexpr = FORM.PRECISION
    M: tl.constexpr = rows.shape[0]
    BITS: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth
    columns = chunk_of(k, SPLIT, BITS)
    at = rows[None, :, None] + columns.to(tl.int64) * column_stride
    x = tl.load(at, mask=mask[None, :, None] & (columns < FORM.K), other=0.0)
    return in_registers(operand(x, PRECISION, True), SPLIT, M, BITS, FORM.K_WIDTH)


@triton.jit
def multiply(weights, rows, sum, PRECISION: tl.constexpr, CHAINS: tl.constexpr = 1):
    """sum + weights rows, chunk by chunk: (SPLIT, units, batch rows), each part of it in another warp. CHAINS: so many
    sums are made in parallel, because a matrix instruction waits for the one before that adds to the same sum."""
    sums = (sum,)
    for _ in tl.static_range(CHAINS - 1):
        sums = sums + (tl.zeros_like(sum),)
    for k in tl.static_range(len(weights)):
        x = tl.permute(widened(rows[k]), (0, 2, 1))
        sum = tl.dot(widened(weights[k]), x, sums[0], input_precision=PRECISION, out_dtype=sum.dtype)
        sums = sums[1:] + (sum,)
    sum = sums[0]
    for k in tl.static_range(1, CHAINS):
        sum += sums[k]
    return sum


@triton.jit
def sum_last(x, LEAD: tl.constexpr, PARTS: tl.constexpr):
    """The sum of x, (*LEAD, PARTS), over its last dimension: LEAD; PARTS is a power of two."""
    # Each thread takes all parts of its own elements, once: tl.sum would leave another layout than that of the other
    # operands of a cell, to which each of them would then be brought.
    for halving in tl.static_range(PARTS.bit_length() - 1):
        a, b = tl.split(tl.reshape(x, LEAD + (PARTS >> (halving + 1), 2)))
        x = a + b
    return tl.reshape(x, LEAD)


@triton.jit
def sum_parts(x, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(SPLIT, UNITS, ROWS), each part in another warp, to their sum (ROWS, UNITS)."""
    return sum_last(tl.permute(x, (2, 1, 0)), (ROWS, UNITS), SPLIT)


@triton.jit
def sum_gates(x, SPLIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """(SPLIT, 4 * UNITS, ROWS), gate by gate, each part in another warp, to the four gates of their sum: (ROWS, UNITS),
    i, f, g, o."""
    x = tl.permute(tl.reshape(x, (SPLIT, 4, UNITS, ROWS)), (3, 2, 1, 0))
    return four(tl.reshape(sum_last(x, (ROWS, UNITS, 4), SPLIT), (ROWS, UNITS, 2, 2)))
