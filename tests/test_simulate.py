"""The simulation of machine code: what is known of single instructions, and of kernels that are little else.

The kernels of known.py are compiled in a process of their own: in this one they may be interpreted.
"""

import json
import operator
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench import emulate, sass
from bench.emulate import Emulator
from bench.simulate import Clocks, NotSimulated, simulate_code

ROOT = Path(__file__).parents[1]
CLOCKS = Clocks()
Y = 7 << emulate.REGION_BITS  # where a pointer points to


def code(text, **controls):
    """Machine code: a label or an instruction a line, and behind a bar its control code, such as "stall=2 sets=0"."""
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, control = line.partition("|")
        if line.endswith(":"):
            lines.append(line)
            continue
        given = {"stall": 1, "yields": 0, "sets": 7, "frees": 7, "waits": 0}
        given |= {name: int(value) for name, value in (part.split("=") for part in control.split())}
        bits = given["stall"] | (1 - given["yields"]) << 4 | given["sets"] << 5 | given["frees"] << 8
        second = (bits | given["waits"] << 11) << 41
        lines += [f"/*0000*/ {instruction.strip()} ; /* {0:#018x} */", f"/* {second:#018x} */"]
    return sass.parse("\n".join(lines))


def turn(text, warp=0, constants=None):
    """What a warp runs in a turn of a loop, by opcode, with its accesses."""
    program = code(text)
    emulator = Emulator(program, constants or {})
    rows = emulator.turns(sass.time_loop(program), warp, (0, 0, 0), (1, 1, 1), 1)[0]
    assert not emulator.unknown
    return [(program[place].opcode, access) for place, access in rows]


def simulated(text, warps=1, exchange=True, clocks=CLOCKS):
    constants = {"c[0x0][0x210]": Y & emulate.WORD, "c[0x0][0x214]": Y >> 32}
    handed, handover = {Y >> emulate.REGION_BITS}, operator.attrgetter("region")
    of_launch = warps, (1, 1, 1), (0, 0, 0)
    return simulate_code(code(text), constants, *of_launch, 6, exchange, handed, handover, clocks)


def test_control_codes_are_read():
    text = """
    .L_x_2:
        /*3c90*/ @P0 STG.E.U16 [R6.64+0x400], R11 ; /* 0x0004000b06000986 */
                                                    /* 0x0003e2000c101508 */
        /*3ca0*/ ISETP.NE.U32.AND.EX P2, PT, R4.reuse, UR6, PT, P2 ; /* 0x0000000604007c0c */
                                                    /* 0x000fda000bf45120 */
        /*3cb0*/ @!P2 CALL.REL.NOINC `(.L_x_0) ;    /* 0x000000100000a944 */
                                                    /* 0x002fe20003c00000 */
        /*3cc0*/ BRA `(.L_x_2) ;                    /* 0xffffe94000007947 */
                                                    /* 0x000fea000383ffff */
    .L_x_0:
        /*3cd0*/ EXIT ;                             /* 0x000000000000794d */
                                                    /* 0x000fea0003800000 */
    """
    store, comparison, call, jump, _ = sass.parse(text)
    assert (store.predicate, store.opcode, store.operands) == ("P0", "STG.E.U16", ("[R6.64+0x400]", "R11"))
    assert (store.stall, store.yields, store.sets, store.frees, store.waits) == (1, False, None, 1, 0)
    assert comparison.operands == ("P2", "PT", "R4", "UR6", "PT", "P2")
    assert (comparison.stall, comparison.yields, comparison.frees) == (13, True, None)
    assert (call.predicate, call.waits, call.target) == ("!P2", 2, 4)
    assert (jump.base, jump.target, jump.always_leaves) == ("BRA", 0, True)


@pytest.mark.parametrize(
    "line, given, expected",
    [
        ("IMAD.WIDE R4, R1, 0x4, R2", {"R1": -1 & emulate.WORD, "R2": 2, "R3": 1}, {"R4": 0xFFFFFFFE, "R5": 0}),
        ("IMAD.WIDE.U32 R4, R1, 0x4, RZ", {"R1": 1 << 31}, {"R4": 0, "R5": 2}),
        ("IMAD.HI.U32 R4, R1, 0xaaaaaaab, RZ", {"R1": 300}, {"R4": 200}),
        ("IMAD R4, R1, -0x2, R2", {"R1": 3, "R2": 7}, {"R4": 1}),
        ("IMAD R4, R1, RZ, R2", {"R1": None, "R2": 7}, {"R4": 7}),
        ("IADD3 R4, P0, R1, R2, RZ", {"R1": emulate.WORD, "R2": 1}, {"R4": 0, "P0": True}),
        ("IADD3 R4, P0, R1, -R2, RZ", {"R1": 5, "R2": 6}, {"R4": emulate.WORD, "P0": False}),
        ("IADD3.X R4, R1, ~R2, RZ, P0, !PT", {"R1": 5, "R2": 4, "P0": True}, {"R4": 1}),
        ("LEA R4, P1, R1, R2, 0x2", {"R1": 1, "R2": emulate.WORD - 3}, {"R4": 0, "P1": True}),
        ("LEA.HI.X R4, R1, R2, R3, 0x4, P1", {"R1": 0xF0000000, "R2": 1, "R3": 1, "P1": True}, {"R4": 33}),
        ("LOP3.LUT R4, R1, 0xc, RZ, 0x3c, !PT", {"R1": 10}, {"R4": 6}),
        ("LOP3.LUT P0, RZ, R1, 0x7, RZ, 0xc0, !PT", {"R1": 8}, {"P0": False}),
        ("LOP3.LUT R4, R1, R2, R3, 0xf8, !PT", {"R1": 1, "R2": 6, "R3": 12}, {"R4": 5}),
        ("SHF.R.S32.HI R4, RZ, 0x1f, R1", {"R1": 1 << 31}, {"R4": emulate.WORD}),
        ("SHF.L.U64.HI R4, R1, 0x4, R2", {"R1": 1 << 31, "R2": 1}, {"R4": 24}),
        ("SEL R4, R1, R2, !P0", {"R1": 1, "R2": 2, "P0": True}, {"R4": 2}),
        ("ISETP.GT.AND P0, P1, R1, RZ, PT", {"R1": -1 & emulate.WORD}, {"P0": False, "P1": True}),
        ("ISETP.GT.U32.AND P0, PT, R1, RZ, PT", {"R1": -1 & emulate.WORD}, {"P0": True}),
        ("ISETP.LT.AND.EX P0, PT, R1, R2, PT, P3", {"R1": 1, "R2": 1, "P3": True}, {"P0": True}),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0x2a, 0x0", {"P1": False, "P2": None}, {"P0": None}),
        ("PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0", {"UP0": True}, {"P0": True}),
        ("PRMT R4, R1, 0x5410, R2", {"R1": 0x12345678, "R2": 0x9ABCDEF0}, {"R4": 0xDEF05678}),
        ("PRMT R4, R1, 0x8888, RZ", {"R1": 0x80}, {"R4": emulate.WORD}),
        ("SGXT R4, R1, 0x4", {"R1": 0x1F}, {"R4": emulate.WORD}),
        ("SGXT.U32 R4, R1, 0x4", {"R1": 0x1F}, {"R4": 15}),
        ("VIMNMX R4, R1, R2, !PT", {"R1": -1 & emulate.WORD, "R2": 2}, {"R4": 2}),
        ("VIADDMNMX R4, R1, 0xfffffffe, RZ, !PT", {"R1": 1}, {"R4": 0}),
        ("P2R R4, PR, RZ, 0x5", {"P0": True, "P2": True}, {"R4": 5}),
        ("R2P PR, R1, 0x6", {"R1": 4, "P0": True}, {"P0": True, "P1": False, "P2": True}),
        ("STL.64 [R1+0x8], R4", {"R4": 1, "R5": 2}, {"[R1+0x8]": 1, "[R1+0xc]": 2}),
        ("UIADD3 UR4, UR5, -0x1, URZ", {"UR5": 3}, {"UR4": 2}),
        ("FADD R4, R1, R2", {"R1": 1, "R2": 1, "R4": 3}, {"R4": None}),
    ],
)
def test_an_instruction_computes(line, given, expected):
    """Of one number for all lanes, and of one for each."""
    (one,) = code(line)
    for spread in (lambda value: value, lambda value: np.full(32, value)):
        values = dict.fromkeys(emulate.ZEROS, 0) | dict.fromkeys(emulate.TRUE, True)
        values |= {
            name: value if value is None or name[0] == "U" or (name[0] == "P") else spread(value)
            for name, value in given.items()
        }
        Emulator([one], {}).decoded[0].run(values, True)
        for name, value in expected.items():
            found = values[name]
            assert (found is None) == (value is None), (name, found)
            assert value is None or np.all(found == value), (name, found)


@pytest.mark.parametrize(
    "access, stride, waves",
    [
        ("LDS R4, [R1]", 4, 1),
        ("LDS R4, [R1]", 0, 1),
        ("LDS R4, [R1]", 8, 2),
        ("LDS.64 R4, [R1]", 0, 2),  # a wavefront for each half of the lanes
        ("LDS R4, [R1+0x40]", 128, 32),
        ("LDS.U16 R4, [R1]", 2, 1),
        ("STS.U16 [R1], R4", 64, 16),  # a column of 32 x 32 numbers of 16 bits
        ("STS.U16 [R1], R4", 66, 1),  # ... with a word of padding every other row
        ("LDS.128 R4, [R1]", 16, 4),
        ("STS.128 [R1], R4", 32, 8),
        ("STS.64 [R1+UR4], R4", 8, 2),
        ("LDSM.16.M88.4 R4, [R1]", 16, 4),
        ("LDSM.16.M88.4 R4, [R1]", 128, 32),
        ("LDSM.16.M88.4 R4, [R1]", 144, 4),
        ("STSM.16.M88.2 [R1], R4", 128, 16),
    ],
)
def test_conflicts(access, stride, waves):
    rows = turn(
        f"""
        S2R R0, SR_TID.X
        UMOV UR4, 0x400
        IMAD R1, R0, {stride:#x}, RZ
        .L_x_0:
        {access}
        BRA `(.L_x_0)
        """
    )
    assert [found.waves for _, found in rows if found] == [waves]


@pytest.mark.parametrize(
    "opcode, stride, offset, sectors, lines",
    [
        ("LDG.E", 4, 0, 4, 1),
        ("LDG.E", 4, 4, 5, 2),
        ("LDG.E", 32, 0, 32, 8),
        ("LDG.E.128", 16, 0, 16, 4),
        ("STG.E.U16", 2, 0, 2, 1),
        ("STG.E.U16", 1024, 0, 32, 32),
    ],
)
def test_sectors(opcode, stride, offset, sectors, lines):
    where = f"desc[UR4][R2.64+{offset:#x}]"
    operands = f"R4, {where}" if opcode.startswith("L") else f"{where}, R4"
    rows = turn(
        f"""
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        IMAD.WIDE R2, R0, {stride:#x}, R2
        .L_x_0:
        {operands.join((opcode + " ", ""))}
        BRA `(.L_x_0)
        """,
        warp=2,
        constants={"c[0x0][0x210]": Y & emulate.WORD, "c[0x0][0x214]": Y >> 32},
    )
    (found,) = (access for _, access in rows if access)
    assert (found.sectors, found.lines, found.offset) == (sectors, lines, 64 * stride + offset)
    assert found.region == Y >> emulate.REGION_BITS
    assert len(found.cached) == (sectors if opcode.startswith("L") else 0)


PARTS = """
    S2R R0, SR_TID.X
    ISETP.NE.AND P0, PT, R0, RZ, PT
    LDC.64 R2, c[0x0][0x210]
    .L_x_0:
    BSSY B0, `(.L_x_2)
    @P0 BRA `(.L_x_1)
    RED.E.ADD desc[UR4][R2.64], R5
    {otherwise}
    .L_x_1:
    {away}
    .L_x_2:
    BSYNC B0
    BAR.SYNC 0x0
    BRA `(.L_x_0)
"""


def test_lanes_part_and_meet():
    constants = {"c[0x0][0x210]": 64, "c[0x0][0x214]": 0}
    forms = {
        "if": PARTS.format(otherwise="", away=""),
        "else": PARTS.format(otherwise="BRA `(.L_x_2)", away="LDS R4, [R0]"),
    }
    both = ["BSSY", "BRA", "RED.E.ADD"], ["BSYNC", "BAR.SYNC", "BRA"]
    rows = {form: turn(text, 0, constants) for form, text in forms.items()}
    assert [opcode for opcode, _ in rows["if"]] == [*both[0], *both[1]]
    assert [opcode for opcode, _ in rows["else"]] == [*both[0], "BRA", "LDS", *both[1]]
    assert rows["if"][2][1].sectors == 1
    # Of another warp all lanes jump.
    assert [opcode for opcode, _ in turn(forms["else"], 1, constants)] == ["BSSY", "BRA", "LDS", *both[1]]


def test_a_far_block_is_left_together():
    """A block behind the loop, to which some lanes jump, and whose end is waited for."""
    rows = turn(
        """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x10, PT
        .L_x_0:
        BSSY B0, `(.L_x_1)
        @P0 BRA `(.L_x_2)
        .L_x_1:
        BSYNC B0
        BRA `(.L_x_0)
        .L_x_2:
        LDS R4, [R0]
        BRA `(.L_x_1)
        """
    )
    assert [opcode for opcode, _ in rows] == ["BSSY", "BRA", "LDS", "BRA", "BSYNC", "BRA"]


def loop(body):
    return f"NOP\n.L_x_9:\nNOP\n{body}\nBRA `(.L_x_9) | stall=5"


JUMP = 1 + CLOCKS.branch  # the rest of such a loop


@pytest.mark.parametrize(
    "body, warps, cycles",
    [
        ("FADD R4, R4, R5 | stall=4\n" * 8, 1, 8 * 4 + JUMP),
        ("FADD R4, R4, R5 | stall=4\n" * 8, 4, 8 * 4 + JUMP),  # a scheduler each
        ("FADD R4, R4, R5 | stall=4\n" * 8, 32, 8 * (8 + 2)),  # ... which issues all of its own
        ("MUFU.EX2 R4, R4 | sets=0\nFADD R5, R4, R5 | stall=4 waits=1", 1, CLOCKS.exponential + 4 + JUMP),
        ("LDS R4, [RZ] | sets=3\nFADD R5, R4, R5 | stall=4 waits=8", 1, CLOCKS.shared + 4 + JUMP),
        ("HMMA.16816.F32 R4, R8, R10, R4\n" * 4, 1, 4 * 24),
        ("HMMA.16816.F32 R4, R8, R10, RZ\n" * 4, 1, 3 * 6 + 1 + JUMP),
    ],
)
def test_control_codes_and_clocks_are_kept(body, warps, cycles):
    # The last of four turns is counted to its jump.
    assert simulated(loop(body), warps).cycles == pytest.approx(cycles - CLOCKS.branch / 4, rel=0.02)


def test_conflicts_keep_the_pipe_busy():
    """Of 8 warps, each with 4 loads of 32 wavefronts."""
    loads = "LDS R4, [R1] | sets=0\n" * 4
    found = simulated(f"S2R R0, SR_TID.X\nIMAD R1, R0, 0x80, RZ\n{loop(loads + 'FADD R5, R4, R5 | waits=1')}", 8)
    assert found.wavefronts == 8 * 4 * 32
    assert found.cycles == pytest.approx(found.wavefronts, rel=0.05)


def test_what_comes_from_l2_takes_its_share():
    """Of 8 warps, each with 16 loads of 16 sectors that L1 cannot serve: as many bytes a cycle as the port has."""
    load = "LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] | sets=0\n"
    address = "S2R R0, SR_TID.X\nLDC.64 R2, c[0x0][0x210]\nIMAD.WIDE R2, R0, 0x10, R2"
    found = simulated(f"{address}\n{loop(16 * load + 'FADD R5, R4, R5 | waits=1')}", 8)
    assert found.sectors == 8 * 16 * 16
    assert found.cycles == pytest.approx(found.sectors * 32 / CLOCKS.l2_port, rel=0.1)


def test_a_barrier_waits_for_the_slowest_warp():
    """One of two warps has something to do in between, a stall of 15 at a time."""
    text = """
    S2R R0, SR_TID.X
    ISETP.GE.AND P0, PT, R0, 0x20, PT
    .L_x_0:
    @P0 BRA `(.L_x_1) | stall=5
    {slow}
    .L_x_1:
    BAR.SYNC 0x0 | stall=1
    BRA `(.L_x_0) | stall=5
    """
    fast, slow = (simulated(text.format(slow="NOP | stall=15\n" * many), 2) for many in (1, 21))
    assert slow.cycles - fast.cycles == pytest.approx(20 * 15, abs=1)
    assert slow.cycles == pytest.approx(5 + 21 * 15 + CLOCKS.barrier + CLOCKS.branch, rel=0.01)
    assert fast.barriers == slow.barriers == 1
    assert slow.parts["barrier"] > fast.parts["barrier"] + 100


SPIN = """
    LDC.64 R2, c[0x0][0x210]
    .L_x_0:
    STG.E desc[UR4][R2.64], R5 | stall=2
    .L_x_1:
    LDG.E.STRONG.GPU R4, desc[UR4][R2.64] | stall=2 sets=0
    ISETP.NE.AND P0, PT, R4, RZ, PT | stall=13 waits=1
    @P0 BRA `(.L_x_1) | stall=5
    BRA `(.L_x_0) | stall=5
"""


def test_a_spin_goes_round_until_the_store_is_seen():
    alone, waiting = simulated(SPIN, exchange=False), simulated(SPIN)
    one_turn = CLOCKS.l2 + 13 + CLOCKS.branch + 3
    assert alone.turns == 0
    # L2 sees the first load half of its way after the store.
    assert waiting.turns * 5 / 6 == np.ceil((CLOCKS.visible - CLOCKS.l2 / 2) / one_turn)
    assert waiting.cycles - alone.cycles == pytest.approx(waiting.turns * 5 / 6 * one_turn, abs=8)
    assert simulated(SPIN, clocks=replace(CLOCKS, visible=0)).cycles == alone.cycles
    late = simulated(SPIN, clocks=replace(CLOCKS, visible=CLOCKS.visible + 10 * one_turn))
    assert late.turns * 5 / 6 == waiting.turns * 5 / 6 + 10


def test_a_spin_for_what_nobody_stores_is_refused():
    with pytest.raises(NotSimulated, match="not known"):
        simulated(SPIN.replace("STG.E desc[UR4][R2.64], R5", "NOP"))


def test_copies_are_waited_for():
    """cp.async of a line a warp: sectors, and the time from its group to where it is awaited."""
    copy = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] | stall=2\nLDGDEPBAR | stall=2 sets=0\n"
    text = f"""
    S2R R0, SR_TID.X
    IMAD R1, R0, 0x10, RZ
    LDC.64 R2, c[0x0][0x210]
    IMAD.WIDE R2, R0, 0x10, R2 | stall=4
    {loop(copy + "DEPBAR.LE SB0, {left} | stall=4")}
    """
    waits, goes_on = (simulated(text.replace("{left}", left)) for left in ("0x0", "0x1"))
    assert waits.sectors == goes_on.sectors == 16
    assert waits.wavefronts == 2 + 4
    assert waits.cycles > CLOCKS.l2 > goes_on.cycles / 0.9


@cache
def known():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.known"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


def multiply_adds(row):
    """Of a warp in the matrix instructions of a turn."""
    sizes = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
    return sum(count * sizes[name.split(".")[1]] for name, count in row["opcodes"].items() if name.startswith("HMMA"))


def count(row, opcode):
    return sum(count for name, count in row["opcodes"].items() if name.startswith(opcode))


def test_multiply_adds():
    """A result takes 4 cycles, and a multiprocessor starts 128 a cycle."""
    chain, many = known()["one chain"], known()["many chains"]
    assert 4 <= chain["cycles"] / count(chain, "FFMA") < 4.6
    assert 118 < 16 * 32 * count(many, "FFMA") / many["cycles"] <= 128


def test_products():
    """Two that add to the same sum are 24 to 33 cycles apart; in bfloat16 mma.sync reaches some 0.6 of the 2,048
    multiply-adds that a multiprocessor's wgmma makes in a cycle."""
    chain, many = known()["one product"], known()["many products"]
    assert 23.9 < chain["cycles"] / count(chain, "HMMA") <= 33
    assert 0.5 * 2048 < 8 * multiply_adds(many) / many["cycles"] < 0.8 * 2048


def test_copied_sectors():
    """4 KiB a turn have 128 sectors, in as many turns as one of the machine code has; a wavefront passes 256 bytes."""
    row = known()["copy"]
    turns = row["sectors"] / 128
    assert turns == int(turns) > 0
    assert row["wavefronts"] == turns * 2 * 16
    assert row["cycles"] > 265


def test_exchanges():
    """A turn of the counter or of polling waits for the others; alone it does not."""
    for name in ("counter", "poll"):
        waits, alone = known()[name], known()[f"{name} alone"]
        assert waits["turns"] >= 1 > alone["turns"] == 0
        assert 300 < waits["cycles"] - alone["cycles"] < 1200
        assert not waits["unknown"]


def test_forms_of_a_plan():
    for form in ("H100 grid", "A100 grid", "H100 local"):
        row = known()[form]
        assert row["mode"] in form and row["why"] == ""
        assert row["timing"]["cycles"] > 0 and not row["timing"]["unknown"]
        assert (row["timing"]["turns"] > 0) == (row["mode"] == "grid")
    assert "sm_100" in known()["B200 grid"]["why"]
    assert known()["H100 step"]["mode"] == "step" and "launch" in known()["H100 step"]["why"]
    assert known()["B200 grid"]["timing"] is known()["H100 step"]["timing"] is None
