"""The product of a step behind a flag: its weight, of which chunks stay on chip, and the rows from other programs."""

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
def dot(weight, x, sum, DOT: tl.constexpr, PRECISION: tl.constexpr, PIPELINED: tl.constexpr = False):
    """sum + weight x, with the operands in DOT and the sum in its own type. The weight, which most often stays for all
    steps, is an operand() already."""
    x = operand(x, PRECISION, PIPELINED)
    return tl.dot(weight.to(DOT), x.to(DOT), sum, input_precision=PRECISION, out_dtype=sum.dtype)


@triton.jit
def columns_of(k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of chunk k among the K of its gate: (BLOCK_K,)."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    return k % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def load_weight(
    weight,
    units,
    k,
    K: tl.constexpr,
    UNITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PIPELINED: tl.constexpr = False,
):
    """Chunk k of a weight (UNITS, K), or TRANSPOSED of one (K of each gate, UNITS), for the units given, of which those
    past the last have zeros, as an operand(): (units, BLOCK_K)."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    columns = columns_of(k, K, BLOCK_K)[None, :]
    mask = (units < UNITS)[:, None] & (columns < K)
    if TRANSPOSED:
        at = (k // CHUNKS * K + columns).to(tl.int64) * UNITS + units[:, None]
    else:
        at = units.to(tl.int64)[:, None] * K + columns
    return operand(tl.load(weight + at, mask=mask, other=0.0), PRECISION, PIPELINED)


@triton.jit
def load_columns(rows, active_rows, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunk k of rows whose pointers are given, of h_{t-1} (K columns) or dgates_{t+1} (K of each gate; a chunk lies in
    one): (BLOCK_K, batch rows)."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    columns = columns_of(k, K, BLOCK_K)[:, None]
    mask = (columns < K) & active_rows
    return tl.load(rows + (k // CHUNKS * K + columns), mask=mask, other=0.0)


@triton.jit
def recurrent_matmul(
    resident,  # the chunks of the weight that stay on chip
    weight,
    units,
    rows,
    active_rows,
    first,  # of the chunks that are summed over
    K: tl.constexpr,
    UNITS: tl.constexpr,  # of the weight, as load_weight() takes them
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    CHUNKS: tl.constexpr,  # that are summed over
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weight's part of this program times the rows' columns: (units, batch rows)."""
    RESIDENT: tl.constexpr = len(resident)
    sum = tl.zeros((units.shape[0], active_rows.shape[0]), ACC)
    for k in tl.static_range(RESIDENT):
        tile = load_columns(rows, active_rows, first + k, K, BLOCK_K)
        sum = dot(resident[k], tile, sum, DOT, PRECISION)
    if RESIDENT < CHUNKS:
        for k in tl.range(RESIDENT, CHUNKS, num_stages=3):
            chunk = load_weight(weight, units, first + k, K, UNITS, TRANSPOSED, BLOCK_K, PRECISION, True)
            tile = load_columns(rows, active_rows, first + k, K, BLOCK_K)
            sum = dot(chunk, tile, sum, DOT, PRECISION, True)
    return sum
