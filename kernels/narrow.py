"""Weights of 8 bits in registers: held as they are, and made operands where they are multiplied.

Chunks and parts are those of operands.py.
"""

import triton
import triton.language as tl

from .environment import interpreted
from .matmul import operand, widened
from .operands import chunk_of, in_registers, multiply

INTERPRETED = tl.constexpr(interpreted())


@triton.constexpr_function
def type_name(type):
    return str(type)


@triton.constexpr_function
def narrow_type(type):
    """The name of a type of 8 bits, "" of others."""
    return str(type) if type.primitive_bitwidth == 8 else ""


@triton.constexpr_function
def add_offset(words):
    """PTX by which each of four integers in a word becomes 128 more, without a sign; and, once more, what it was."""
    return [f"xor.b32 {word}, {word}, 0x80808080;" for word in words]


@triton.constexpr_function
def from_int8(words, to, exponent=""):
    """PTX that makes numbers of the four integers in each of the words `first` and `second`, of float32 in `first`; but
    for bfloat16 these have the add_offset(). exponent: a register with first_exponent(), or none."""
    # A byte is put below the exponent of a number whose last bit is a 1, and what that number is, taken off again.
    exponent = exponent or first_exponent(to)
    lines = [f"mov.b32 minus, {'0xbf80bf80' if to == 'bf16' else '0x64806480'};"]  # -1 twice, or 1024 and 128
    for k, word in enumerate(words):
        if to == "fp32":
            lines += [f"prmt.b32 third, first, {exponent}, 0x765{k};", f"sub.f32 {word}, third, 0f4B000080;"]
            continue
        lines += [f"prmt.b32 third, {('first', 'second')[k // 2]}, {exponent}, {('0x4140', '0x4342')[k % 2]};"]
        if to == "bf16":  # whose 8 bits have no room for the sign: 128 or 256 is taken off
            lines += [f"and.b32 {word}, third, 0xff7fff7f;", "and.b32 third, third, 0xff80ff80;"]
            lines += [f"fma.rn.bf16x2 {word}, third, minus, {word};"]
        else:
            lines += [f"sub.f16x2 {word}, third, minus;"]
    return lines


@triton.constexpr_function
def first_exponent(to):
    """The bits above a byte that make a number of it whose last bit is a 1."""
    return {"bf16": "0x43", "fp16": "0x64", "fp32": "0x4b000000"}[to]


@triton.constexpr_function
def from_fp8(words, to):
    """The same of numbers of 8 bits with four of the exponent."""
    lines = []
    for k, word in enumerate(words[:2] if to == "fp32" else words):
        lines += [f"mov.b32 {{low, high}}, {'first' if k < 2 else 'second'};"]
        lines += [f"cvt.rn.f16x2.e4m3x2 third, {('low', 'high')[k % 2]};"]
        if to == "fp16":
            lines += [f"mov.b32 {word}, third;"]
            continue
        pair = (word, "third") if to == "bf16" else (words[2 * k], words[2 * k + 1])
        lines += ["mov.b32 {low, high}, third;", f"cvt.f32.f16 {pair[0]}, low;", f"cvt.f32.f16 {pair[1]}, high;"]
        if to == "bf16":
            lines += [f"cvt.rn.bf16x2.f32 {word}, third, {word};"]
    return lines


@triton.constexpr_function
def widening(kind, to):
    """PTX that makes four words of numbers of `to` of the numbers of `kind` in words of hold_words().

    Operands: the words out; those in, and an integer that is zero."""
    # With what changes from step to step, as far as a compiler knows: it would make the numbers once, ahead of the
    # loop, and has no registers for them.
    held = ("first", "second")[: 1 if to == "fp32" else 2]
    zero = f"${4 + len(held)}"
    lines = ["{", f".reg .b32 {', '.join(held)}, third, minus, exponent;", ".reg .b16 low, high;"]
    lines += [f"mov.b32 {name}, ${4 + k};" for k, name in enumerate(held)]
    words = [f"${k}" for k in range(4)]
    if kind == "fp8e4nv":
        lines += [f"xor.b32 {name}, {name}, {zero};" for name in held]
        lines += from_fp8(words, to)
    else:
        lines += add_offset(held) if to == "bf16" else []
        lines += [f"or.b32 exponent, {zero}, {first_exponent(to)};", *from_int8(words, to, "exponent")]
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def load_words(count, kind):
    """PTX that loads so many words of numbers of `kind` from an address, or makes those of zeros; of integers they have
    the add_offset().

    Operands: the words out; the address, and an integer that is not 0 where there are numbers, in."""
    words = [f"${k}" for k in range(count)]
    of_vector = f".v{count}.b32 {{{', '.join(words)}}}" if count > 1 else f".b32 {words[0]}"
    lines = ["{", ".reg .pred there;", f"setp.ne.u32 there, ${count + 1}, 0;"]
    lines += [*(f"mov.b32 {word}, 0;" for word in words), f"@there ld.global{of_vector}, [${count}];"]
    if kind == "int8":
        lines += add_offset(words)
    return "\n".join([*lines, "}"])


@triton.jit
def hold_words(rows, mask, k, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Chunk k of rows (M,) of pointers to numbers of 8 bits, as they are, zero where they are masked and past column K:
    of each thread the numbers that it will have of an operand of TYPE."""
    SPLIT: tl.constexpr = FORM.SPLIT
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    PART: tl.constexpr = 512 // BITS
    COUNT: tl.constexpr = 32 // BITS  # words of a thread
    if INTERPRETED:
        columns = chunk_of(k, SPLIT, BITS)
        x = tl.load(rows[None, :, None] + columns, mask=mask[None, :, None] & (columns < FORM.K), other=0.0)
        return (in_registers(x, SPLIT, rows.shape[0], BITS, FORM.K_WIDTH),)
    else:
        parts = (k * SPLIT + tl.arange(0, SPLIT))[:, None, None] * PART
        columns = parts + tl.arange(0, 4)[None, None, :] * (PART // 4)
        at = (rows[None, :, None] + columns).to(tl.int64)
        there = (mask[None, :, None] & (columns < FORM.K)).to(tl.int32)
        # Not as tl.load(), which has a layout of its own, and would leave it to shared memory to make another of it.
        return tl.inline_asm_elementwise(
            load_words(COUNT, narrow_type(rows.dtype.element_ty)),
            "=&r," * COUNT + "l,r",
            (at, there),
            dtype=(tl.int32,) * COUNT,
            is_pure=True,
            pack=1,
        )


@triton.jit
def operand_of(words, FORM: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The operand() in PRECISION whose four words each thread has."""
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    SPLIT: tl.constexpr = FORM.SPLIT
    x = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    if BITS == 16:
        low = x.to(tl.int16).to(TYPE, bitcast=True)
        x = tl.join(low, (x >> 16).to(tl.int16).to(TYPE, bitcast=True))
    else:
        x = x.to(TYPE, bitcast=True)
    return in_registers(operand(x, PRECISION, True), SPLIT, words[0].shape[1], BITS, FORM.K_WIDTH)


@triton.jit
def widen(words, zero, KIND: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """The operand of TYPE that a chunk of hold_words() becomes. zero: 0, of which the compiler knows nothing."""
    if INTERPRETED:
        return words[0].to(tl.float32).to(TYPE)
    else:
        wide = tl.inline_asm_elementwise(
            widening(KIND, type_name(TYPE)),
            "=&r,=&r,=&r,=&r" + ",r" * (len(words) + 1),
            words + (zero,),
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
        return operand_of(wide, FORM, TYPE, "ieee")  # TF32 has all of 8 bits


@triton.jit
def to_half(x):
    """Numbers of bfloat16 that are no larger than 1 as those of float16: 2**-25 off at most."""
    if INTERPRETED:
        return x.to(tl.float32).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            shl.b32 low, $1, 16;
            and.b32 high, $1, 0xffff0000;
            cvt.rn.f16x2.f32 $0, high, low;
            }""",
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def multiply_held(weights, rows, sum, step, KIND: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """sum + weights rows, as operands.multiply(). With a KIND, the narrow_type() of the weight, its chunks are of
    hold_words(), and the product is of TYPE; step: of which it is."""
    PRECISION: tl.constexpr = FORM.PRECISION
    if KIND == "":
        sum = multiply(weights, rows, sum, PRECISION)
    else:
        for k in tl.static_range(len(weights)):
            weight, x = widened(widen(weights[k], step >> 31, KIND, FORM, TYPE)), rows[k]
            if x.dtype != TYPE:
                x = to_half(x)
            x = tl.permute(widened(x), (0, 2, 1))
            if PRECISION == "tf32x3":
                # TF32 has all of 8 bits: two products are as exact as three. Of an infinite x the rest would be NaN.
                high = operand(x, "tf32", True)
                low = tl.where(tl.abs(high) < float("inf"), x - high, 0.0)
                sum = tl.dot(weight, low, sum, input_precision="tf32", out_dtype=sum.dtype)
                sum = tl.dot(weight, high, sum, input_precision="tf32", out_dtype=sum.dtype)
            else:
                sum = tl.dot(weight, x, sum, input_precision=PRECISION, out_dtype=sum.dtype)
    return sum
