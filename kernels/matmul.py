"""The matrix product of a step: a weight, of which chunks stay on chip, times rows that other programs have written."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .environment import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def operand(x, PRECISION: tl.constexpr, PIPELINED: tl.constexpr = False):
    """x as a product in PRECISION takes it: for "tf32" rounded to the nearest TF32 number, halves away from zero.
    PIPELINED: in a loop whose loads Triton moves ahead of it."""
    # Triton hands the tensor cores all 32 bits, and they cut off the last 13: an error about three times as large as
    # that of rounded operands, which cuBLAS and cuDNN have. Impure, so that Triton leaves it at the load, where each
    # thread has elements of its own: at the product many threads have the same, and each would round them. Where it
    # moves loads ahead it knows no impure operations.
    if PRECISION == "tf32":
        if INTERPRETED:  # which has no inline assembly
            bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        else:
            x = tl.inline_asm_elementwise(
                "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=PIPELINED, pack=1
            )
    return x


@triton.jit
def widened(x):
    """x as tl.dot takes it: the interpreter would multiply the bit patterns of bfloat16, and float32 is exact."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(weight, x, sum, PRECISION: tl.constexpr, PIPELINED: tl.constexpr = False):
    """sum + weight x, in the sum's own type. The weight, which most often stays for all steps, is an operand()
    already."""
    x = operand(x, PRECISION, PIPELINED)
    return tl.dot(widened(weight), widened(x), sum, input_precision=PRECISION, out_dtype=sum.dtype)


@dataclass(frozen=True)
class Shape:
    """The constants of a Weight."""

    K: int  # columns that a product sums over, of each gate if TRANSPOSED
    UNITS: int
    BLOCK_K: int  # columns of a chunk
    TRANSPOSED: bool = False  # a weight (GATES * K, UNITS) instead of (UNITS, K)
    GATES: int = 1  # that it sums over

    @property
    def GATE_CHUNKS(self) -> int:
        return -(-self.K // self.BLOCK_K)

    @property
    def CHUNKS(self) -> int:
        """That it sums over."""
        return self.GATES * self.GATE_CHUNKS


@triton.constexpr_function
def shape(K, UNITS, BLOCK_K, TRANSPOSED=False, GATES=1):
    """A Shape, within a kernel."""
    return Shape(K, UNITS, BLOCK_K, TRANSPOSED, GATES)


class Weight(NamedTuple):
    """A weight, and the part of it that a program multiplies."""

    pointer: Any
    units: Any  # (units,): those that the program multiplies; past the Shape's UNITS they have zeros
    first: Any  # of the chunks of columns


@triton.jit
def columns_of(k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of chunk k among the K of its gate: (BLOCK_K,)."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    return k % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def load_chunk(weight, k, SHAPE: tl.constexpr, PRECISION: tl.constexpr, PIPELINED: tl.constexpr = False):
    """Chunk k of a Weight as an operand(): (units, BLOCK_K)."""
    columns = columns_of(k, SHAPE.K, SHAPE.BLOCK_K)[None, :]
    mask = (weight.units < SHAPE.UNITS)[:, None] & (columns < SHAPE.K)
    if SHAPE.TRANSPOSED:
        at = (k // SHAPE.GATE_CHUNKS * SHAPE.K + columns).to(tl.int64) * SHAPE.UNITS + weight.units[:, None]
    else:
        at = weight.units.to(tl.int64)[:, None] * SHAPE.K + columns
    return operand(tl.load(weight.pointer + at, mask=mask, other=0.0), PRECISION, PIPELINED)


@triton.jit
def load_chunks(weight, COUNT: tl.constexpr, SHAPE: tl.constexpr, PRECISION: tl.constexpr):
    """The first COUNT chunks of a Weight, to stay on chip for all steps."""
    chunks = ()
    for k in tl.static_range(COUNT):
        chunks = chunks + (load_chunk(weight, weight.first + k, SHAPE, PRECISION),)
    return chunks


@triton.jit
def load_columns(rows, mask, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunk k of rows whose pointers are given, of h_{t-1} (K columns) or dgates_{t+1} (K of each gate; a chunk lies in
    one): (BLOCK_K, batch rows)."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    columns = columns_of(k, K, BLOCK_K)[:, None]
    return tl.load(rows + (k // CHUNKS * K + columns), mask=(columns < K) & mask, other=0.0)


@triton.jit
def recurrent_matmul(weight, resident, rows, mask, SHAPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """A Weight times the columns of rows, pointers of which the masked ones count: (units, batch rows) in ACC. Its
    first chunks are `resident`; the others are loaded."""
    RESIDENT: tl.constexpr = len(resident)
    sum = tl.zeros((weight.units.shape[0], mask.shape[0]), ACC)
    for k in tl.static_range(RESIDENT):
        x = load_columns(rows, mask, weight.first + k, SHAPE.K, SHAPE.BLOCK_K)
        sum = dot(resident[k], x, sum, PRECISION)
    if RESIDENT < SHAPE.CHUNKS:
        for k in tl.range(RESIDENT, SHAPE.CHUNKS, num_stages=3):
            chunk = load_chunk(weight, weight.first + k, SHAPE, PRECISION, True)
            x = load_columns(rows, mask, weight.first + k, SHAPE.K, SHAPE.BLOCK_K)
            sum = dot(chunk, x, sum, PRECISION, True)
    return sum
