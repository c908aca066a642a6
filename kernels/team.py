"""Teams: four programs share the products of their units, a gate for each, and sum the parts.

Two ways, as for the step's data: behind a counter, or each part is its own flag.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .environment import interpreted
from .polling import behind_stores, spin
from .sync import publish, record_timeout, wait

INTERPRETED = tl.constexpr(interpreted())


class Team(NamedTuple):
    """A program's place in its team."""

    products: Any  # where the parts go, gate by gate
    stride: Any  # from a gate's to the next
    first: Any  # gate of this recurrence
    gate: Any  # of this program, from the first on
    rows: Any  # of a gate's parts, as offsets
    units: Any  # in a row: the team's
    mask: Any
    own_units: Any  # ... this program's
    own_mask: Any


@triton.jit
def sum_behind_flag(team, part, flag, step, timeout_info, TEAM: tl.constexpr, MAX_SPINS: tl.constexpr):
    """Gives this program's part, of all units of the team, to the team and returns the sum of all parts for its own
    units."""
    # The next step overwrites them: by then the team has counted this one's dgates in, so has read them.
    at = team.products + (team.first + team.gate) * team.stride + team.rows + team.units
    tl.store(at, part, mask=team.mask)
    publish(flag)
    wait(flag, TEAM * (step + 1), step + 1, timeout_info, MAX_SPINS)
    sum = tl.zeros(team.own_mask.shape, part.dtype)
    for gate in tl.static_range(TEAM):
        at = team.products + (team.first + gate) * team.stride
        sum += tl.load(at + team.rows + team.own_units, mask=team.own_mask, other=0.0)
    return sum


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
def sum_polled(team, part, products, step, timeout_info, TEAM: tl.constexpr, MAX_SPINS: tl.constexpr):
    """As sum_behind_flag(), with `products` for this step. A part is a word of 64 bits, which arrives as one: a tag, by
    which it is known to be this step's, and a float32. A program may be a step ahead of its team, not two: two sets of
    products serve the steps by turns."""
    bits = part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tag = tl.full((), 1, tl.int32) + step
    at = products + team.gate * team.stride + (team.rows + team.units)
    tl.store(at, (tag.to(tl.int64) << 32) | bits, mask=team.mask)
    own = team.rows + team.own_units
    if INTERPRETED:
        missing, spins = 1, 0
        while missing > 0:
            missing = 0
            sum = tl.zeros(own.shape, tl.float32)
            for k in tl.static_range(TEAM):
                word = tl.load(products + k * team.stride + own, volatile=True)
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
        stride = team.stride * 8
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
