"""Reads the machine code of a compiled kernel: its instructions, their control codes, and its loops.

A control code is what the assembler knows of time: how many cycles pass before the warp's next instruction and, where
that is not known before, which of six scoreboards it waits for. The bits are those that Jia et al. 2018 (arXiv
1804.06826, section 2.1) found for compute capability 7.0, and have been the same since.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import triton

# An instruction and the first half of its bits; the second half has a line of its own.
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)[\s;]*/\* 0x[0-9a-f]{16} \*/")
SECOND_WORD = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/")
LABEL = re.compile(r"\s*(\.L\w+):")
JUMP = re.compile(r"`\((\.L\w+)\)")
NO_SCOREBOARD = 7


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, as nvdisasm prints it."""

    place: int  # among all of the kernel
    predicate: str  # "P0", "!UP1"; empty: always
    opcode: str  # with its modifiers, such as "LDG.E.128"
    operands: tuple[str, ...]
    stall: int  # cycles before the warp's next instruction
    yields: bool  # the scheduler is to prefer another warp to the next one
    sets: int | None  # the scoreboard that is clear when its result is there
    frees: int | None  # the scoreboard that is clear when its operands have been read
    waits: int  # bit mask of the scoreboards that must be clear before it
    target: int | None  # the place that it names, of a jump or where warps meet again

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def always_leaves(self) -> bool:
        """Whether the instruction behind it is never the next one."""
        # A uniform predicate is an operand, before the label.
        jumps = self.base == "BRA" and self.operands[0].startswith("`")
        return not self.predicate and (self.base == "EXIT" or jumps)


class Loop(NamedTuple):
    head: int  # the place where a turn begins
    jump: int  # ... and that of the jump back to it
    members: list[int]  # all places of a turn, in the order of the text


def tool(name: str, *arguments: str) -> str:
    """What one of CUDA's binary tools prints, which Triton brings."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


@lru_cache(maxsize=4)  # it takes longer than all that is made of it
def disassemble(cubin: bytes) -> str:
    """The text of a kernel's machine code, labels in place of addresses, with the bits of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tool("nvdisasm", "-c", "-hex", file.name)


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly of one kernel, in its order."""
    found: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    words: dict[int, int] = {}  # by place, the second half of an instruction's bits
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := INSTRUCTION.match(line):
            found.append(instruction)
        elif word := SECOND_WORD.match(line):
            words[len(found) - 1] = int(word[1], 16)
    code = []
    for place, instruction in enumerate(found):
        predicate, opcode, operands = instruction.groups()
        label = JUMP.search(operands)
        target = labels.get(label[1]) if label else None
        code.append(Instruction(place, predicate or "", opcode, split(operands), *control(words[place]), target))
    return code


def control(word: int) -> tuple[int, bool, int | None, int | None, int]:
    """An instruction's stall, yields, sets, frees and waits, from the second half of its bits."""
    bits = word >> 41
    sets, frees = (None if board == NO_SCOREBOARD else board for board in ((bits >> 5) & 7, (bits >> 8) & 7))
    return bits & 15, not bits >> 4 & 1, sets, frees, bits >> 11 & 63


def split(operands: str) -> tuple[str, ...]:
    """The operands of an instruction, without the hint that a register's value is used again."""
    return tuple(part.strip() for part in operands.replace(".reuse", "").split(",") if part.strip())


def time_loop(code: Sequence[Instruction]) -> Loop | None:
    """The largest loop of a kernel: in a recurrence, the one over the steps."""
    before: list[set[int]] = [set() for _ in range(len(code) + 1)]  # by instruction, those that it can follow
    jumps = [(one.place, one.target) for one in code if one.target is not None]
    for one in code:
        if not one.always_leaves:
            before[one.place + 1].add(one.place)
    for place, target in jumps:
        before[target].add(place)
    largest = None
    for place, head in jumps:
        if head > place:
            continue
        # All from which the jump back is reached without its target. Parts may stand anywhere: blocks are moved out of
        # the way. If the kernel's begin is among them, the jump only returns from such a block.
        members, todo = {head}, [place]
        while todo:
            member = todo.pop()
            if member not in members:
                members.add(member)
                todo += before[member]
        if 0 not in members and (largest is None or len(members) > len(largest.members)):
            largest = Loop(head, place, sorted(members))
    return largest


def width(opcode: str) -> int:
    """Bytes that one thread moves in an access such as "LDG.E.128"."""
    bits = re.search(r"\.[USF]?(8|16|64|128|256)\b", opcode)
    return int(bits[1]) // 8 if bits else 4
