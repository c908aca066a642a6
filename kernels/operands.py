"""Products whose operands never pass through shared memory.

A matrix instruction takes its operands from registers. The weight's stay there for the whole sequence. Those of the
rows that other programs write come from L2 in the loads that look whether they are there: the 16 bytes that a thread
loads of a row are a part of its operand, if the reduction is summed in another order. `in_registers()` gives both
operands this order, once and for all steps for the weight, without an instruction for the rows.

A part is what one warp sums of a chunk: 64 bytes of a row, 32 columns of 16 bits or 16 of 32.
"""

import triton
import triton.language as tl

from .cell import four
from .environment import interpreted
from .matmul import operand
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
def load_operand(
    rows,
    mask,
    column_stride,
    k,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunk k of rows (M,) of pointers, zero where they are masked and past column K, as an operand: (SPLIT, M, a
    part)."""
    M: tl.constexpr = rows.shape[0]
    BITS: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth
    columns = chunk_of(k, SPLIT, BITS)
    at = rows[None, :, None] + columns.to(tl.int64) * column_stride
    x = tl.load(at, mask=mask[None, :, None] & (columns < K), other=0.0)
    return in_registers(operand(x, PRECISION, True), SPLIT, M, BITS, K_WIDTH)


@triton.jit
def multiply(weights, rows, sum, DOT: tl.constexpr, PRECISION: tl.constexpr, CHAINS: tl.constexpr = 1):
    """sum + weights rows, chunk by chunk: (SPLIT, units, batch rows), each part of it in another warp. CHAINS: so many
    sums are made beside each other, because a matrix instruction waits for the one before that adds to the same sum."""
    sums = (sum,)
    for _ in tl.static_range(CHAINS - 1):
        sums = sums + (tl.zeros_like(sum),)
    for k in tl.static_range(len(weights)):
        x = tl.permute(rows[k].to(DOT), (0, 2, 1))
        sum = tl.dot(weights[k].to(DOT), x, sums[0], input_precision=PRECISION, out_dtype=sum.dtype)
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


@triton.jit
def write_zeros(zeros, N: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the N columns of rows that wait for nobody, BLOCK at a time, for this program to read."""
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


@triton.jit
def fetch(
    rows,
    counting,
    zeros,
    step,
    timeout_info,
    HOW: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_SPINS: tl.constexpr,
    GATES: tl.constexpr = 1,
):
    """The chunks of rows, pointers (M,) to whole 16 bytes: operands (SPLIT, M, a part). Of each of GATES gates K
    columns, which are CHUNKS chunks; what a chunk has past them are some of those before. With `zeros`, a pointer to
    all columns of zeros, rows that are not `counting` are zero; without it all count.

    HOW: "await" them until other programs have written them, "load" what is there, or "zero" for all.

    What is awaited is its own flag. Before the launch it is filled with SENTINEL, all bits one: a NaN, but none that
    arithmetic gives (PTX: 0x7fffffff, in 16 bit 0x7fff). An element that is another has come, in whatever order they
    come, so that nothing has to be ordered before or after it. MAX_SPINS as in sync.wait().
    """
    M: tl.constexpr = rows.shape[0]
    TYPE: tl.constexpr = rows.dtype.element_ty
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    PART: tl.constexpr = 512 // BITS
    FOUR: tl.constexpr = PART // 4  # columns of 16 bytes
    if zeros is not None:
        rows = tl.where(counting, rows, zeros)
    operands = ()
    if INTERPRETED:  # which has no inline assembly
        WORD: tl.constexpr = tl.int16 if BITS == 16 else tl.int32 if BITS == 32 else tl.int64
        missing, spins = 1, 0
        while missing > 0:
            operands = ()
            missing = 0
            for k in tl.static_range(GATES * CHUNKS):
                at = rows[None, :, None] + k // CHUNKS * K + tl.minimum(chunk_of(k % CHUNKS, SPLIT, BITS), K - 1)
                if HOW == "zero":
                    x = tl.zeros(at.shape, TYPE)
                else:
                    x = tl.load(at, volatile=HOW == "await")
                if HOW == "await":
                    absent = (x.to(WORD, bitcast=True) == -1).to(tl.int32)
                    missing += tl.max(tl.reshape(absent, (SPLIT * M * PART,)), 0)
                operands = operands + (in_registers(operand(x, PRECISION), SPLIT, M, BITS, K_WIDTH),)
            if HOW == "await" and MAX_SPINS > 0:
                spins += 1
                if (spins > MAX_SPINS) | (tl.load(timeout_info, volatile=True) > 0):
                    record_timeout(step, timeout_info)
                    missing = 0
    else:
        LIMIT: tl.constexpr = MAX_SPINS if HOW == "await" else 0
        addresses = ()
        for k in tl.static_range(GATES * CHUNKS):
            parts = (k % CHUNKS * SPLIT + tl.arange(0, SPLIT))[:, None, None] * PART
            columns = parts + tl.arange(0, 4)[None, None, :] * FOUR
            if K % (SPLIT * PART) > 0:
                columns = tl.minimum(columns, K - FOUR)
            addresses = addresses + ((rows[None, :, None] + (k // CHUNKS * K + columns)).to(tl.int64),)
        if LIMIT > 0:
            addresses = addresses + (timeout_info.to(tl.int64),)
        fours = tl.inline_asm_elementwise(
            words(HOW, GATES * CHUNKS, BITS, PAIRS, PRECISION, LIMIT),
            word_registers(GATES * CHUNKS, LIMIT),
            addresses,
            dtype=(tl.int32,) * (4 * GATES * CHUNKS),
            is_pure=True,
            pack=1,
        )
        for k in tl.static_range(GATES * CHUNKS):
            x = tl.join(tl.join(fours[4 * k], fours[4 * k + 2]), tl.join(fours[4 * k + 1], fours[4 * k + 3]))
            if BITS == 16:
                low = x.to(tl.int16).to(TYPE, bitcast=True)
                x = tl.join(low, (x >> 16).to(tl.int16).to(TYPE, bitcast=True))
            else:
                x = x.to(TYPE, bitcast=True)
            operands = operands + (in_registers(x, SPLIT, M, BITS, K_WIDTH),)
        if LIMIT > 0:
            absent = fours[0] != fours[0]
            for k in tl.static_range(4 * GATES * CHUNKS):
                if BITS == 16:
                    absent |= ((fours[k] & 0xFFFF) == 0xFFFF) | ((fours[k] >> 16) == -1)
                else:
                    absent |= fours[k] == -1
            if tl.max(tl.reshape(absent.to(tl.int32), (4 * SPLIT * M,)), 0) > 0:
                record_timeout(step, timeout_info)
    return operands


@triton.constexpr_function
def spin_for_parts(parts, spins):
    """The loop in PTX that loads 64 bits behind each of `parts` addresses until all have the tag above their float32.

    Operands: the floats out, the addresses and the tag in; with spins, as words(), also whether one is absent out, and
    the address of the timeout_info in."""
    first = parts + (spins > 0)  # of the operands in
    registers = [f".reg .b64 word{k};" for k in range(parts)] + [f".reg .b32 tag{k};" for k in range(parts)]
    turn = [f"ld.relaxed.gpu.global.b64 word{k}, [${first + k}];" for k in range(parts)]
    turn += [f"mov.b64 {{${k}, tag{k}}}, word{k};" for k in range(parts)]
    turn += [f"setp.ne.s32 absent, tag0, ${first + parts};"]
    turn += [f"setp.ne.or.s32 absent, tag{k}, ${first + parts}, absent;" for k in range(1, parts)]
    end = [f"selp.b32 ${parts}, 1, 0, absent;"] if spins else []
    return spin(turn, spins, f"${first + parts + 1}", registers, end)


@triton.constexpr_function
def part_registers(parts, spins):
    """The constraints of spin_for_parts()'s operands."""
    return ",".join(["=&f"] * parts + ["=&r"] * (spins > 0) + ["l"] * parts + ["r"] + ["l"] * (spins > 0))


@triton.jit
def sum_of_team(
    part,  # (batch rows, units of the team) float32: this program's
    products,  # int64: where this step's parts of all gates go
    gate,  # of this program
    gate_stride,  # from a gate to the next
    of_team,  # (batch rows, units of the team): places of a gate's
    mask,
    own,  # (batch rows, units): those of this program
    step,
    timeout_info,
    TEAM: tl.constexpr,
    MAX_SPINS: tl.constexpr,
):
    """Gives this program's part to its team and returns the sum of all its programs' for its own units, (batch rows,
    units). A part is a word of 64 bits, which arrives as one: a tag, by which it is known to be this step's, and a
    float32. A program may be a step ahead of its team, not two: two sets of `products` take spins."""
    bits = part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tag = tl.full((), 1, tl.int32) + step
    tl.store(products + gate * gate_stride + of_team, (tag.to(tl.int64) << 32) | bits, mask=mask)
    if INTERPRETED:
        missing, spins = 1, 0
        while missing > 0:
            missing = 0
            sum = tl.zeros(own.shape, tl.float32)
            for k in tl.static_range(TEAM):
                word = tl.load(products + k * gate_stride + own, volatile=True)
                absent = (word >> 32) != tag
                missing += tl.max(tl.max(absent.to(tl.int32), 1), 0)
                sum += word.to(tl.int32).to(tl.float32, bitcast=True)
            if MAX_SPINS > 0:
                spins += 1
                if (spins > MAX_SPINS) | (tl.load(timeout_info, volatile=True) > 0):
                    record_timeout(step + 1, timeout_info)
                    missing = 0
        return sum
    else:
        tl.static_assert(TEAM == 4)
        begin = behind_stores(products) + own
        stride = gate_stride * 8
        at = begin.to(tl.int64)
        operands = (at, at + stride, at + 2 * stride, at + 3 * stride, tl.full(own.shape, 0, tl.int32) + tag)
        if MAX_SPINS > 0:
            a, b, c, d, absent = tl.inline_asm_elementwise(
                spin_for_parts(TEAM, MAX_SPINS),
                part_registers(TEAM, MAX_SPINS),
                operands + (timeout_info.to(tl.int64),),
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.int32),
                is_pure=True,
                pack=1,
            )
            if tl.max(tl.max(absent, 1), 0) > 0:
                record_timeout(step + 1, timeout_info)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                spin_for_parts(TEAM, MAX_SPINS),
                part_registers(TEAM, MAX_SPINS),
                operands,
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        return (a + b) + (c + d)
