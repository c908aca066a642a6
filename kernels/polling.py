"""Rows that other programs write, polled: a program loads them again and again until all of them have come.

The 16 bytes that a thread looks at are the words of its operand of a matrix instruction; they never pass through shared
memory (operands.py).
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .environment import interpreted
from .matmul import operand
from .operands import chunk_of, in_registers, multiply, operand_width
from .sync import record_timeout

INTERPRETED = tl.constexpr(interpreted())


@triton.constexpr_function
def words(how, chunks, bits, pairs, precision, spins):
    """PTX that makes four words of each of `chunks` addresses, an operand() in `precision` of elements of `bits` bits.

    how: "await", the 16 bytes behind an address as soon as none of their elements has all bits one; "load", these bytes
        as they are; "zero", zeros. All loads are on their way together; those that await are relaxed, so that each
        looks into L2.
    pairs: the device compares two elements of 16 bits in one instruction.
    spins: with them the loop ends after so many, or when there is a timeout_info.
    Operands: the words out; the addresses in, with spins also the timeout_info's.
    """
    out = [f"${word}" for word in range(4 * chunks)]
    fours = [", ".join(out[4 * k : 4 * k + 4]) for k in range(chunks)]
    if how == "zero":
        return "\n".join(f"mov.b32 {word}, 0;" for word in out)
    kind = "relaxed.gpu.global" if how == "await" else "global"
    loads = [f"ld.{kind}.v4.b32 {{{four}}}, [${4 * chunks + k}];" for k, four in enumerate(fours)]
    rounding = [f"cvt.rna.tf32.f32 {word}, {word};" for word in out] if precision == "tf32" else []
    if how == "load":
        return "\n".join([*loads, *rounding])
    if bits == 16 and not pairs:
        # Of a half with all bits one, and of no other, 0xfffe less it has the highest bit, as it has itself; what is
        # borrowed comes from a lower half of this kind.
        test = ["mov.b32 largest, 0;"]
        for word in out:
            test += [f"sub.u32 other, 0xfffefffe, {word};", f"and.b32 other, other, {word};"]
            test += ["or.b32 largest, largest, other;"]
        test += ["and.b32 largest, largest, 0x80008000;", "setp.ne.u32 absent, largest, 0;"]
    else:
        most = "max.u16x2" if bits == 16 else "max.u32"
        test = [f"{most} largest, {out[0]}, {out[1]};", *[f"{most} largest, largest, {word};" for word in out[2:]]]
        if bits == 16:
            test += ["shr.u32 other, largest, 16;", "and.b32 largest, largest, 0xffff;"]
            test += ["max.u32 largest, largest, other;"]
        test += [f"setp.eq.u32 absent, largest, {2**bits - 1:#x};"]
    return spin(loads + test, spins, f"${5 * chunks}", [".reg .b32 largest;"], rounding)


@triton.constexpr_function
def spin(turn, spins, timeout_info, registers, end):
    """PTX that repeats the lines of `turn` until they leave `absent` false, with `spins` at most so many times and not
    after a timeout_info; then the lines of `end`."""
    registers = [*registers, ".reg .pred absent, more;", ".reg .b32 other;"]
    repeat = ["@absent bra again;"]
    if spins:
        registers += [".reg .b32 count;", "mov.b32 count, 0;"]
        repeat = [
            "add.u32 count, count, 1;",
            f"setp.lt.and.u32 more, count, {spins}, absent;",
            f"ld.relaxed.gpu.global.b32 other, [{timeout_info}];",
            "setp.eq.and.u32 more, other, 0, more;",
            "@more bra again;",
        ]
    return "\n".join(["{", *registers, '.pragma "nounroll";', "again:", *turn, *repeat, *end, "}"])


@triton.constexpr_function
def word_registers(chunks, spins):
    """The constraints of the operands of words()."""
    # Early clobbers: the loop reads the addresses again after it has written words.
    return ",".join(["=&r"] * (4 * chunks) + ["l"] * (chunks + (spins > 0)))


@triton.jit
def write_zeros(zeros, N: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the N zeros that stand for rows that are not awaited, BLOCK at a time, for this program to read."""
    for k in tl.static_range((N + BLOCK - 1) // BLOCK):
        columns = k * BLOCK + tl.arange(0, BLOCK)
        tl.store(zeros + columns, tl.zeros((BLOCK,), zeros.dtype.element_ty), mask=columns < N)
    tl.debug_barrier()


@triton.jit
def behind_stores(pointer):
    """A pointer behind which no load is made before the stores that stand before this."""
    # This is impure, so it stays behind them, and a spin, which is pure, takes its result: an impure spin Triton 3.6
    # would run twice.
    if INTERPRETED:
        return pointer
    else:
        at = tl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l", [pointer.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )
        return at.to(pointer.dtype)


@dataclass(frozen=True)
class Form:
    """How a kernel lays out its operands and fetches rows."""

    K: int  # columns of a gate
    GATES: int  # of a row, one after another
    SPLIT: int  # parts of a chunk, each of which a warp sums
    K_WIDTH: int  # of in_registers()
    PAIRS: bool  # of words()
    PRECISION: str
    MAX_SPINS: int


@triton.constexpr_function
def form(K, GATES, tiles, bits, pairs, precision, max_spins):
    """A Form, within a kernel."""
    return Form(K, GATES, tiles.split, operand_width(tiles.batch, bits // 8), pairs, precision, max_spins)


@triton.jit
def fetch(rows, awaited, step, sync, FORM: tl.constexpr, HOW: tl.constexpr):
    """Operands of rows, pointers (M,) to whole 16 bytes: for each chunk of each gate (SPLIT, M, a part), in which what
    lies past column K is some of the columns before. Where there are sync.zeros, rows that are not `awaited` are zero.

    HOW: "await" them until other programs have written them, "load" what is there, or "zero" for all.

    What is awaited is its own flag. Before the launch it is filled with the SENTINEL, all bits one: a NaN, but none
    that arithmetic gives (PTX: 0x7fffffff, in 16 bit 0x7fff). An element that is not the SENTINEL has come, so the
    order in which they come does not matter. MAX_SPINS as in sync.wait().
    """
    K: tl.constexpr = FORM.K
    SPLIT: tl.constexpr = FORM.SPLIT
    PRECISION: tl.constexpr = FORM.PRECISION
    M: tl.constexpr = rows.shape[0]
    TYPE: tl.constexpr = rows.dtype.element_ty
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    PART: tl.constexpr = 512 // BITS
    FOUR: tl.constexpr = PART // 4  # columns of 16 bytes
    CHUNKS: tl.constexpr = (K + SPLIT * PART - 1) // (SPLIT * PART)  # of a gate
    LIMIT: tl.constexpr = FORM.MAX_SPINS if HOW == "await" else 0
    if awaited is not None and sync.zeros is not None:
        rows = tl.where(awaited, rows, sync.zeros)
    operands = ()
    if INTERPRETED:  # which has no inline assembly
        WORD: tl.constexpr = tl.int16 if BITS == 16 else tl.int32 if BITS == 32 else tl.int64
        missing, spins = 1, 0
        while missing > 0:
            operands = ()
            missing = 0
            for k in tl.static_range(FORM.GATES * CHUNKS):
                at = rows[None, :, None] + k // CHUNKS * K + tl.minimum(chunk_of(k % CHUNKS, SPLIT, BITS), K - 1)
                if HOW == "zero":
                    x = tl.zeros(at.shape, TYPE)
                else:
                    x = tl.load(at, volatile=HOW == "await")
                if HOW == "await":
                    absent = (x.to(WORD, bitcast=True) == -1).to(tl.int32)
                    missing += tl.max(tl.reshape(absent, (SPLIT * M * PART,)), 0)
                operands = operands + (in_registers(operand(x, PRECISION), SPLIT, M, BITS, FORM.K_WIDTH),)
            if LIMIT > 0:
                spins += 1
                if (spins > LIMIT) | (tl.load(sync.timeout_info, volatile=True) > 0):
                    record_timeout(step, sync.timeout_info)
                    missing = 0
    else:
        PIECES: tl.constexpr = FORM.GATES * CHUNKS
        addresses = ()
        for k in tl.static_range(PIECES):
            parts = (k % CHUNKS * SPLIT + tl.arange(0, SPLIT))[:, None, None] * PART
            columns = parts + tl.arange(0, 4)[None, None, :] * FOUR
            if K % (SPLIT * PART) > 0:
                columns = tl.minimum(columns, K - FOUR)
            addresses = addresses + ((rows[None, :, None] + (k // CHUNKS * K + columns)).to(tl.int64),)
        if LIMIT > 0:
            addresses = addresses + (sync.timeout_info.to(tl.int64),)
        fours = tl.inline_asm_elementwise(
            words(HOW, PIECES, BITS, FORM.PAIRS, PRECISION, LIMIT),
            word_registers(PIECES, LIMIT),
            addresses,
            dtype=(tl.int32,) * (4 * PIECES),
            is_pure=True,
            pack=1,
        )
        for k in tl.static_range(PIECES):
            x = tl.join(tl.join(fours[4 * k], fours[4 * k + 2]), tl.join(fours[4 * k + 1], fours[4 * k + 3]))
            if BITS == 16:
                low = x.to(tl.int16).to(TYPE, bitcast=True)
                x = tl.join(low, (x >> 16).to(tl.int16).to(TYPE, bitcast=True))
            else:
                x = x.to(TYPE, bitcast=True)
            operands = operands + (in_registers(x, SPLIT, M, BITS, FORM.K_WIDTH),)
        if LIMIT > 0:
            absent = fours[0] != fours[0]
            for k in tl.static_range(4 * PIECES):
                if BITS == 16:
                    absent |= ((fours[k] & 0xFFFF) == 0xFFFF) | ((fours[k] >> 16) == -1)
                else:
                    absent |= fours[k] == -1
            if tl.max(tl.reshape(absent.to(tl.int32), (4 * SPLIT * M,)), 0) > 0:
                record_timeout(step, sync.timeout_info)
    return operands


@triton.jit
def multiply_polled(weights, rows, awaited, step, sum, sync, FORM: tl.constexpr, CHAINS: tl.constexpr = 1):
    """sum + weights times rows as soon as other programs have written them; args as fetch() and multiply() take
    them."""
    PRECISION: tl.constexpr = FORM.PRECISION
    return multiply(weights, fetch(rows, awaited, step, sync, FORM, "await"), sum, PRECISION, CHAINS)
