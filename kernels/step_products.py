"""The products of one step: of weights that are all on their way at once, with rows that are there or are awaited.

Chunks and parts are those of operands.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .environment import interpreted
from .matmul import operand
from .narrow import add_offset, from_fp8, from_int8, operand_of, type_name
from .operands import chunk_of, in_registers, multiply
from .polling import Form, fetch

INTERPRETED = tl.constexpr(interpreted())


class Rows(NamedTuple):
    """Rows of a weight, of x or of h0."""

    at: Any  # (M,) pointers, also those of rows that do not count to some that are there
    count: Any  # (M,): whether a row counts


@triton.constexpr_function
def chunks_of(form, bits):
    """How many chunks the columns of a Form are."""
    return -(-form.K // (form.SPLIT * 512 // bits))


@triton.constexpr_function
def loads(chunks, stride, masked, source, to):
    """PTX that makes four words of numbers of a thread of each of so many chunks, `stride` bytes from one to the next.

    source, to: the types of the numbers in memory and in the words, by Triton's names; four words are 16 bytes of
        numbers of `to`, in memory half of it, or a quarter, of 8-bit ones. The integers that 8 bits hold, and numbers
        of "fp8e4nv", are exact in all of `to`.
    masked: the last chunk is loaded only if an integer is not 0, and zeros otherwise.
    Operands: the words out; the address of the first chunk and the integer in.
    """
    bits = 32 if to == "fp32" else 16
    narrow = source in ("int8", "fp8e4nv")
    lines = ["{", ".reg .pred there;", f"setp.ne.u32 there, ${4 * chunks + 1}, 0;"]
    lines += [".reg .b32 first, second, third, minus;", ".reg .b16 low, high;"] if narrow else []
    for k in range(chunks):
        words = [f"${4 * k + word}" for word in range(4)]
        into = words if not narrow else ["first", "second"] if bits == 16 else ["first"]
        target = f"{{{', '.join(into)}}}" if len(into) > 1 else into[0]
        vector = f".v{len(into)}" if len(into) > 1 else ""
        load = f"ld.global{vector}.b32 {target}, [${4 * chunks} + {k * stride}];"
        if masked and k == chunks - 1:
            lines += [*(f"mov.b32 {word}, 0;" for word in into), f"@there {load}"]
        else:
            lines.append(load)
        if source == "int8":
            lines += [] if to == "bf16" else add_offset(into)
            lines += from_int8(words, to)
        elif narrow:
            lines += from_fp8(words, to)
    return "\n".join([*lines, "}"])


@triton.constexpr_function
def load_registers(chunks):
    """The constraints of the operands of loads()."""
    return ",".join(["=&r"] * (4 * chunks) + ["l", "r"])


@triton.jit
def load_chunks(rows, first, COUNT: tl.constexpr, FORM: tl.constexpr, NET: tl.constexpr, TYPE: tl.constexpr):
    """COUNT chunks of Rows from the first one on, as operands of TYPE, past column K zeros. With NET.wide each thread
    loads the numbers that it multiplies, 16 bytes of TYPE."""
    SPLIT: tl.constexpr = FORM.SPLIT
    PRECISION: tl.constexpr = FORM.PRECISION
    M: tl.constexpr = rows.at.shape[0]
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    PART: tl.constexpr = 512 // BITS
    chunks = ()
    if NET.wide and not INTERPRETED:
        TAIL: tl.constexpr = FORM.K % (SPLIT * PART) > 0  # the last chunk is not whole
        STRIDE: tl.constexpr = SPLIT * PART * rows.at.dtype.element_ty.primitive_bitwidth // 8
        columns = tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, 4)[None, None, :] * (PART // 4)
        at = (rows.at + first * (SPLIT * PART))[None, :, None] + columns
        whole = (first + COUNT - 1) * (SPLIT * PART) + columns < FORM.K
        words = tl.inline_asm_elementwise(
            loads(COUNT, STRIDE, TAIL, type_name(rows.at.dtype.element_ty), type_name(TYPE)),
            load_registers(COUNT),
            (at.to(tl.int64), tl.broadcast_to(whole.to(tl.int32), at.shape)),
            dtype=(tl.int32,) * (4 * COUNT),
            is_pure=True,
            pack=1,
        )
        for k in tl.static_range(COUNT):
            fours = words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]
            chunks = chunks + (operand_of(fours, FORM, TYPE, PRECISION),)
    else:
        for k in tl.static_range(COUNT):
            columns = chunk_of(first + k, SPLIT, BITS)
            there = rows.count[None, :, None] & (columns < FORM.K)
            x = tl.load(rows.at[None, :, None] + columns, mask=there, other=0.0)
            if x.dtype != TYPE:  # the interpreter makes no bfloat16 of an integer
                x = x.to(tl.float32).to(TYPE)
            chunks = chunks + (in_registers(operand(x, PRECISION, True), SPLIT, M, BITS, FORM.K_WIDTH),)
    return chunks


@triton.constexpr_function
def with_columns(form, chunks, bits):
    """The Form of rows of so many whole chunks."""
    columns = chunks * form.SPLIT * 512 // bits
    return Form(columns, 1, form.SPLIT, form.K_WIDTH, form.PAIRS, form.PRECISION, form.MAX_SPINS)


@triton.constexpr_function
def looped(form, bits, at_once):
    """How many of the chunks come in a loop, so many at a time, before the others."""
    return (chunks_of(form, bits) - 1) // at_once * at_once


@triton.jit
def last_chunks(rows, FORM: tl.constexpr, NET: tl.constexpr, TYPE: tl.constexpr):
    """The chunks of Rows that do not come in a loop."""
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    FIRST: tl.constexpr = looped(FORM, BITS, NET.at_once)
    return load_chunks(rows, FIRST, chunks_of(FORM, BITS) - FIRST, FORM, NET, TYPE)


@triton.jit
def add_looped(sum, weight, x, FORM: tl.constexpr, NET: tl.constexpr):
    """sum + weight x, of the chunks that come in a loop; both are Rows."""
    TYPE: tl.constexpr = x.at.dtype.element_ty
    PRECISION: tl.constexpr = FORM.PRECISION
    COUNT: tl.constexpr = looped(FORM, TYPE.primitive_bitwidth, NET.at_once)
    if COUNT > 0:
        WHOLE: tl.constexpr = with_columns(FORM, COUNT, TYPE.primitive_bitwidth)
        N: tl.constexpr = NET.at_once
        for k in tl.range(0, COUNT, N):
            chunks = load_chunks(weight, k, N, WHOLE, NET, TYPE)
            sum = multiply(chunks, load_chunks(x, k, N, WHOLE, NET, TYPE), sum, PRECISION)
    return sum


@triton.jit
def scaled(sum, scale):
    """The sums (SPLIT, rows of a weight, batch rows) by what a 1 in each row of the weight stands for."""
    return sum * scale[None, :, None].to(sum.dtype)


@triton.jit
def both_products(zero, weight_hh, h, weight_ih, x, scales, OF_H: tl.constexpr, OF_X: tl.constexpr, NET: tl.constexpr):
    """weight_hh h + weight_ih x, all Rows: (1). zero: of the sum's shape and type; scales: pointers to those of both
    weights, or None."""
    TYPE: tl.constexpr = x.at.dtype.element_ty
    PRECISION: tl.constexpr = OF_X.PRECISION
    of_h, of_x = last_chunks(weight_hh, OF_H, NET, TYPE), last_chunks(weight_ih, OF_X, NET, TYPE)
    h_last, x_last = last_chunks(h, OF_H, NET, TYPE), last_chunks(x, OF_X, NET, TYPE)
    of_hh, of_ih = scales
    sum = multiply(of_h, h_last, add_looped(zero, weight_hh, h, OF_H, NET), PRECISION)
    if of_hh is None:
        sum = multiply(of_x, x_last, add_looped(sum, weight_ih, x, OF_X, NET), PRECISION)
    else:
        other = multiply(of_x, x_last, add_looped(zero, weight_ih, x, OF_X, NET), PRECISION)
        sum = scaled(sum, tl.load(of_hh)) + scaled(other, tl.load(of_ih))
    return sum


@triton.jit
def awaited_product(sum, weight, exchange, slot, at, sync, FORM: tl.constexpr, NET: tl.constexpr):
    """sum + weight times the rows of a slot as soon as they have come; weight: its chunks, and Rows of it."""
    TYPE: tl.constexpr = exchange.own.dtype.element_ty
    PRECISION: tl.constexpr = FORM.PRECISION
    CHUNKS: tl.constexpr = chunks_of(FORM, TYPE.primitive_bitwidth)
    # The last columns of a last chunk are zeros that nobody writes.
    WHOLE: tl.constexpr = with_columns(FORM, CHUNKS, TYPE.primitive_bitwidth)
    held, rows = weight
    HELD: tl.constexpr = len(held)
    x = fetch(exchange.own + (slot * at.rows + at.batch) * NET.width, None, slot, sync, WHOLE, "await")
    for k in tl.static_range(CHUNKS):
        if k < HELD:
            sum = multiply((held[k],), (x[k],), sum, PRECISION)
        else:
            sum = multiply(load_chunks(rows, k, 1, FORM, NET, TYPE), (x[k],), sum, PRECISION)
    return sum


@triton.jit
def hold(rows, FORM: tl.constexpr, NET: tl.constexpr, TYPE: tl.constexpr):
    """The first chunks of a weight, to be there before what they are multiplied with, and Rows of all."""
    COUNT: tl.constexpr = min(chunks_of(FORM, TYPE.primitive_bitwidth), NET.at_once)
    return load_chunks(rows, 0, COUNT, FORM, NET, TYPE), rows
