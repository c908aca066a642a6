"""How long a step takes, by the machine code: the warps of one program on one multiprocessor of a Hopper GPU.

What a warp runs in a step, and what its accesses to memory take, is emulated (emulate.py). Control codes say when it
may go on where the assembler knows, the Clocks how long everything else takes. Four schedulers issue an instruction a
cycle each, warp w's on scheduler w % 4. All programs of a launch are taken to run in step with this one: what they hand
to it is there when its own would be, and a spin goes round until then.

Not in it: the instruction cache, misses of L2, the far half of it, other programs on the same multiprocessor.
"""

import math
import operator
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel

from fused_lstm.kernels.launch import SIZES
from fused_lstm.kernels.plan import Plan
from fused_lstm.kernels.tiles import H100, Device, ceil_div, in_turn, max_coresident, programs_of

from . import emulate, sass
from .emulate import Access, Row
from .sass import Instruction, Loop


def _table(cycles: Mapping[str, float]) -> Any:
    return field(default_factory=lambda: MappingProxyType(dict(cycles)))


@dataclass(frozen=True)
class Clocks:
    """Cycles that things take on a multiprocessor of compute capability 9.0; where no source stands, assumed.

    For 8.0 they are a guess: an A100's latencies are others, and its matrix units are half as fast.
    """

    # Latencies: from an instruction to the next that takes what it gives.
    shared: float = 29  # a load from shared memory; Luo et al. 2024 (arXiv 2402.13499), table IV
    matrices: float = 33  # LDSM
    shuffle: float = 24
    l2: float = 265  # a load from L2; Luo et al. give 263 to 273
    l1: float = 40  # ... from L1
    atomic: float = 350  # what an atomic operation in L2 gives back
    exponential: float = 20  # MUFU
    conversion: float = 24  # between integers and floats, and counts of bits
    special: float = 30  # a special register
    constant: float = 40  # LDC
    uniform_constant: float = 12  # ULDC
    reduction: float = 22  # REDUX
    vote: float = 12
    to_uniform: float = 12  # R2UR
    other: float = 20  # with a scoreboard, and none of these
    off: float = 12  # an access to memory in which no lane takes part
    # Between two products that add to the same sum, by their shape: m16n8k16 and m16n8k8 of TF32 as ptxas spaces them,
    # and 24.1 by Luo et al., table VII.
    product: Mapping[str, float] = _table({"16816": 24, "1688.TF32": 24, "1688": 18, "1684.TF32": 20})
    product_else: float = 24
    wgmma: float = 32  # past what its rate gives

    # When what an instruction reads may be written again: from there on.
    read: float = 8
    read_by_memory: float = 6  # past its last wavefront
    read_by_product: float = 10

    # Rates: until a scheduler's unit takes the next instruction of a warp.
    unit: Mapping[str, float] = _table({"alu": 2, "fmaheavy": 2, "fma": 1, "uniform": 2, "xu": 8, "mem": 2})
    # As ptxas spaces those that are independent. At the peak of wgmma m16n8k16 would take 4.
    product_rate: Mapping[str, float] = _table({"16816": 6, "1688": 4, "1688.TF32": 6, "1684.TF32": 4})
    product_rate_else: float = 6
    wgmma_columns: float = 2  # of the 64 x N x 32 bytes of a wgmma, a cycle; at least:
    wgmma_least: float = 16
    queue: int = 12  # accesses to memory that a scheduler holds before they begin
    l2_bytes: float = 3005  # from L2, a cycle, for all programs; kernels/model.py has 5.5 TB/s at 1.83 GHz
    l2_port: float = 64  # ... for one multiprocessor at most

    # Control and order.
    branch: float = 10  # a jump that is taken
    barrier: float = 22  # from its last warp to the next instruction
    fence: float = 500  # MEMBAR for other programs, after the last store
    fence_least: float = 20  # any MEMBAR
    invalidation: float = 40  # of L1
    visible: float = 615  # from a store until a load that then reaches L2 sees it; 750 to its data


# By unit, what it runs.
UNITS = {
    "alu": "BMSK CS2R F2FP FCHK FMNMX FSEL FSETP HMNMX2 HSETP2 IABS IADD3 IMNMX ISCADD ISETP LEA LOP3 MOV P2R PLOP3 "
    "PRMT R2P SEL SGXT SHF VABSDIFF VIADD VIMNMX",
    "fmaheavy": "IMAD",
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 FSWZADD",
    "uniform": "UMOV UIADD3 ULEA USHF ULOP3 UISETP USEL UPLOP3 UIMAD USGXT UPRMT UBMSK ULDC UP2UR UR2UP",
    "xu": "MUFU I2F F2I POPC FLO F2F",
    "mem": "LDS STS LDSM LDG STG ATOMG REDG RED ATOM SHFL ATOMS STSM LDGSTS",
    "tensor": "HMMA",
}
UNIT = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}
IN_SHARED = {"LDS", "LDSM", "STS", "STSM", "ATOMS"}
FROM_L2 = {"LDG", "ATOMG", "LD", "LDGSTS"}  # what comes back takes its share of L2
PUBLISHING = {"STG", "REDG", "RED"}
# Cycles from an instruction with a scoreboard to its result, by a field of Clocks.
LATENCY = {
    "MUFU": "exponential",
    "LDC": "constant",
    "ULDC": "uniform_constant",
    "REDUX": "reduction",
    "R2UR": "to_uniform",
    **dict.fromkeys(("S2R", "S2UR"), "special"),
    **dict.fromkeys(("VOTEU", "UFLO"), "vote"),
    **dict.fromkeys(("POPC", "I2F", "F2I", "I2FP", "F2F", "FLO"), "conversion"),
}
# What a warp is said to wait for, by the opcode that it waits for.
WAITS_FOR = {"LDS": "LDS", "LDSM": "LDS", "SHFL": "LDS", "STS": "STS", "MUFU": "MUFU"}
UNKNOWN_SECTORS, UNKNOWN_LINES = 8, 4  # of an access to an unknown address of global memory
NEVER = 1e18  # a cycle after all others
# Bytes in the constant bank before a kernel's arguments, by major compute capability.
ARGUMENTS = {8: 0x160, 9: 0x210}
FIRST_REGION = 5  # of the addresses that pointers are given; none has 0


@dataclass(frozen=True)
class Timing:
    """What a step takes, of one turn of a program's time loop."""

    cycles: float
    instructions: int  # of the time loop
    executed: float  # instructions that a warp runs, without further turns of a spin
    wavefronts: float  # of the pipe to memory; a conflict in shared memory adds some
    sectors: float  # of 32 bytes that come from L2
    barriers: float  # that a warp passes
    turns: float  # of spins in vain, a warp
    parts: dict[str, float]  # cycles of a warp by what it waits for; "issue": in which it does not wait
    unknown: tuple[str, ...]  # opcodes that the emulator does not know, and accesses at addresses that it does not know


class NotSimulated(Exception):
    """Why a kernel is not simulated."""


class Cost(NamedTuple):
    """What is known of an instruction before it runs."""

    one: Instruction
    base: str
    unit: str  # empty: none that another instruction could keep busy
    rate: float
    reason: str  # that the unit is busy
    boards: tuple[int, ...]  # scoreboards that it waits for
    adds_to: str  # the register of the sum that a product adds to
    latency: float  # of its result, past the wavefronts of an access to memory


@dataclass(slots=True, eq=False)
class Warp:
    rows: list[Row]  # what it runs
    steps: list[int]  # ... and in which step
    begins: list[float | None]  # by step, the cycle of its first instruction
    at: int = 0  # its next instruction, among the rows
    ready: float = 0.0  # the cycle from which its last instruction's stall lets it go on
    issued: float = 0.0  # the cycle of its last instruction
    wake: float = 0.0  # not before this cycle it can go on
    reason: str = ""  # ... and what it waits for until then
    clear: list[float] = field(default_factory=lambda: [0.0] * 6)  # by scoreboard, from which cycle on it is clear
    blame: list[str] = field(default_factory=lambda: [""] * 6)  # ... and what sets it
    sums: dict[str, float] = field(default_factory=dict)  # by register, when a product's sum is there
    wgmma: float = 0.0  # when the last wgmma's is there
    accessed: float = 0.0  # the cycle of its last wavefront
    stored: float = 0.0  # ... of a store
    copied: float = 0.0  # when all is there that LDGSTS has copied
    copies: list[float] = field(default_factory=list)  # ... by group of copies
    barriers: int = 0  # that it has come to
    arrives: float | None = None  # at a barrier that is not open yet
    samples: dict[int, float] = field(default_factory=dict)  # by step, when L2 saw the first load of a spin's turn
    votes: Counter[int] = field(default_factory=Counter)  # by step, turns of a spin that all warps take together
    turns: int = 0  # of spins in vain
    parts: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class Scheduler:
    warps: list[Warp]
    last: Warp | None = None  # whose instruction it has issued last
    free: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*UNITS, "wgmma"), 0.0))
    queue: deque[float] = field(default_factory=deque)  # when accesses to memory leave it


class Spin(NamedTuple):
    target: int  # place to which it jumps back
    together: bool  # with a barrier in it: all warps decide as one
    handover: int  # what it waits for
    lag: int  # whether it waits for what is published in its own step, 0, or in the one before, 1


class Exchange(NamedTuple):
    """How a program hands its part of a step to the others."""

    spins: dict[int, Spin]  # by the place of the jump back
    awaited: set[int]  # places of the loads that a spin looks at
    published: set[int]  # places of the stores that it waits for
    handover: Callable[[Access], int]  # which of several in a step an access belongs to


class Multiprocessor:
    """Four schedulers, what they share, and the warps of a program."""

    def __init__(
        self,
        code: Sequence[Instruction],
        traces: Sequence[Sequence[Sequence[Row]]],
        exchange: Exchange,
        clocks: Clocks,
        l2_bytes: float,
    ) -> None:
        """traces: by warp and step, what it runs. l2_bytes: that a multiprocessor gets from L2 in a cycle."""
        self.clocks = clocks
        self.l2_bytes = l2_bytes
        self.exchange = exchange
        run = {place for trace in traces for rows in trace for place, _ in rows}
        self.costs = {place: cost(code[place], clocks) for place in run}
        self.steps = len(traces[0])
        self.warps = [
            Warp(
                [row for rows in trace for row in rows],
                [step for step, rows in enumerate(trace) for _ in rows],
                [None] * (self.steps + 1),
            )
            for trace in traces
        ]
        self.schedulers = [Scheduler(self.warps[first::4]) for first in range(4)]
        self.pipe = 0.0  # when the pipe to memory takes the next wavefront
        self.l2 = 0.0  # when all that has been asked of L2 is there
        self.l1: dict[int, float] = {}  # by sector, when it is there
        self.visible: Counter[tuple[int, int]] = Counter()  # by step and handover, when all programs see it
        self.wavefronts = 0
        self.sectors = 0

    def run(self) -> None:
        now = 0.0
        left = len(self.warps)
        while left:
            next_wake, progressed = NEVER, False
            for scheduler in self.schedulers:
                ready = []
                for warp in scheduler.warps:
                    if warp.arrives is not None:
                        continue
                    # What it waits for can come later than was thought, but not earlier.
                    if warp.wake <= now:
                        self.look(warp, scheduler, now)
                    if warp.wake <= now:
                        ready.append(warp)
                    elif warp.wake < next_wake:
                        next_wake = warp.wake
                if not ready:
                    continue
                progressed = True
                warp = self.pick(scheduler, ready)
                self.issue(warp, scheduler, now)
                if warp.at == len(warp.rows):
                    scheduler.warps.remove(warp)
                    left -= 1
            if not progressed and next_wake == NEVER:
                raise NotSimulated("every warp waits for another one")
            now = now + 1 if progressed else max(now + 1, float(-(-next_wake // 1)))

    def look(self, warp: Warp, scheduler: Scheduler, now: float) -> None:
        """Finds the cycle from which a warp can go on, as far as it is known, and what it waits for until then."""
        cost = self.costs[warp.rows[warp.at][0]]
        wake, reason = warp.ready, "stall count"
        for board in cost.boards:
            if warp.clear[board] > wake:
                wake, reason = warp.clear[board], warp.blame[board]
        if cost.unit and scheduler.free[cost.unit] > wake:
            wake, reason = scheduler.free[cost.unit], cost.reason
        if cost.adds_to and warp.sums.get(cost.adds_to, 0.0) > wake:
            wake, reason = warp.sums[cost.adds_to], "tensor"
        if cost.unit == "mem":
            queue = scheduler.queue
            while queue and queue[0] <= now:
                queue.popleft()
            if len(queue) >= self.clocks.queue and queue[-self.clocks.queue] > wake:
                wake, reason = queue[-self.clocks.queue], "memory queue"
        warp.wake, warp.reason = wake, reason

    def pick(self, scheduler: Scheduler, ready: list[Warp]) -> Warp:
        """The warp of the last instruction goes on, unless that yields; otherwise the one that is the furthest back."""
        last = scheduler.last
        if last in ready and (len(ready) == 1 or not self.yields(last)):
            return last
        return min(ready, key=lambda warp: warp.at)

    def yields(self, warp: Warp) -> bool:
        return warp.at > 0 and self.costs[warp.rows[warp.at - 1][0]].one.yields

    def issue(self, warp: Warp, scheduler: Scheduler, now: float) -> None:
        (place, access), step = warp.rows[warp.at], warp.steps[warp.at]
        cost = self.costs[place]
        one = cost.one
        scheduler.last = warp
        if warp.begins[step] is None:
            warp.begins[step] = now
        self.account(warp, now)
        warp.wake = 0.0
        warp.ready = now + max(1, one.stall)
        if cost.unit:
            scheduler.free[cost.unit] = now + cost.rate
        if cost.unit == "mem":
            self.access(warp, scheduler, cost, access, now)
        elif cost.base == "HMMA":
            there = warp.sums[one.operands[0]] = now + cost.latency
            self.set_boards(warp, one, there, "tensor", now + self.clocks.read_by_product, "tensor")
        elif cost.base == "HGMMA":
            begin = max(scheduler.free["wgmma"], now)
            scheduler.free["wgmma"] = begin + cost.rate
            warp.wgmma = begin + cost.rate + cost.latency
            if one.sets is not None:
                warp.clear[one.sets], warp.blame[one.sets] = warp.wgmma, "tensor"
        elif cost.base == "WARPGROUP":
            if "DEPBAR" in one.opcode:
                warp.ready = max(warp.ready, warp.wgmma)
        elif cost.base == "BAR":
            self.meet(warp, now)
        elif cost.base == "MEMBAR":
            # For the threads of the program alone there is nothing to wait for.
            done = now if ".CTA" in one.opcode else max(now, warp.stored + self.clocks.fence)
            self.hold(warp, now, done + self.clocks.fence_least, "fence")
        elif cost.base == "LDGDEPBAR":
            warp.copies.append(warp.copied)
        elif cost.base == "DEPBAR":
            groups = len(warp.copies) - int(one.operands[1], 0)  # that must be done
            if groups > 0:
                self.hold(warp, now, max(now, warp.copies[groups - 1]), "global")
        elif cost.base == "CCTL":
            warp.ready = max(warp.ready, now + self.clocks.invalidation)
            self.l1.clear()
        else:
            reason = WAITS_FOR.get(cost.base, "other latency")
            self.set_boards(warp, one, now + cost.latency, reason, now + self.clocks.read, "read of operands")
        if place in self.exchange.spins and not self.passes(warp, place, step, now):
            return
        warp.at += 1
        if warp.at == len(warp.rows):
            warp.begins[self.steps] = now
        elif warp.rows[warp.at][0] != place + 1:
            warp.ready = max(warp.ready, now + self.clocks.branch)

    def hold(self, warp: Warp, now: float, until: float, part: str) -> None:
        """Holds a warp back behind its instruction."""
        warp.ready = max(warp.ready, until)
        warp.parts[part] += until - now
        warp.issued = max(warp.issued, until - 1)

    def account(self, warp: Warp, now: float) -> None:
        """Says where the cycles since a warp's last instruction have gone."""
        gap = now - warp.issued
        if gap > 0:
            waited = max(0.0, now - min(max(warp.wake, warp.issued), now))  # for the scheduler
            warp.parts["issue"] += 1
            warp.parts["scheduler"] += waited
            if gap - 1 - waited > 0:
                warp.parts[warp.reason] += gap - 1 - waited
        warp.issued = now

    def set_boards(
        self, warp: Warp, one: Instruction, there: float, reason: str, read: float, read_reason: str
    ) -> None:
        """Sets an instruction's scoreboards: clear when its result is there, and when its operands have been read."""
        if one.sets is not None:
            warp.clear[one.sets], warp.blame[one.sets] = max(warp.clear[one.sets], there), reason
        if one.frees is not None:
            warp.clear[one.frees], warp.blame[one.frees] = max(warp.clear[one.frees], read), read_reason

    def access(self, warp: Warp, scheduler: Scheduler, cost: Cost, access: Access | None, now: float) -> None:
        """An instruction in the pipe to memory, which all schedulers share; access: None of a shuffle."""
        clocks, one, base = self.clocks, cost.one, cost.base
        off = access is not None and access.space == "off"
        latency = clocks.off if off else cost.latency
        waves = 1
        if access is not None and not off:
            waves = access.waves if access.space == "shared" else guessed_waves(one.opcode)
            if base not in IN_SHARED:
                lines = access.lines if access.space == "global" else UNKNOWN_LINES
                # What LDGSTS copies passes the pipe a second time, which is counted here.
                waves = max(1, -(-lines // 2)) + access.waves
        begin = max(now + 2, self.pipe)
        end = begin + waves - 1  # when its last wavefront passes
        self.pipe = begin + waves
        self.wavefronts += waves
        scheduler.queue.append(begin)
        warp.accessed = max(warp.accessed, end)
        there = end + latency
        if base in FROM_L2 and not off:
            there = self.load(warp, one, base, access, end)
            if base == "LDGSTS":
                warp.copied = max(warp.copied, there)
        elif not off or base in ("LDS", "LDSM", "SHFL"):
            there -= 2
        if base in PUBLISHING:
            warp.stored = end
            if not off and one.place in self.exchange.published:
                key = warp.steps[warp.at], self.exchange.handover(access)
                self.visible[key] = max(self.visible[key], end + clocks.visible)
        if one.sets is not None:
            warp.clear[one.sets] = max(warp.clear[one.sets], there)
            warp.blame[one.sets] = WAITS_FOR.get(base, "global")
        read = end + clocks.read_by_memory
        if one.frees is not None and read > warp.clear[one.frees]:
            warp.clear[one.frees], warp.blame[one.frees] = read, "STS" if base == "STS" else "read of operands"

    def load(self, warp: Warp, one: Instruction, base: str, access: Access, end: float) -> float:
        """The cycle when what a load from global memory brings is there."""
        clocks, latency, known = self.clocks, self.clocks.l2, 0.0
        sectors = access.sectors if access.space == "global" else UNKNOWN_SECTORS
        new = [sector for sector in access.cached if sector not in self.l1]
        if access.cached:
            known = max((self.l1[sector] for sector in access.cached if sector in self.l1), default=0.0)
            sectors = len(new)
            latency = latency if new else clocks.l1
        arrival = end + latency
        self.l2 = max(self.l2, arrival) + sectors * 32 / self.l2_bytes
        there = max(arrival, self.l2 if sectors else 0.0, known)
        self.l1 |= dict.fromkeys(new, there)
        self.sectors += sectors
        if one.place in self.exchange.awaited:
            step = warp.steps[warp.at]
            # L2 is half of the way.
            warp.samples[step] = min(warp.samples.get(step, NEVER), end + latency / 2)
        return there + (clocks.atomic - clocks.l2 if base == "ATOMG" else 0)

    def meet(self, warp: Warp, now: float) -> None:
        """A warp comes to a barrier, which its accesses to memory must have passed; the last one opens it."""
        warp.barriers += 1
        warp.arrives = max(now, warp.accessed)
        if any(other.arrives is None for other in self.warps):
            return
        opens = max(other.arrives for other in self.warps) + self.clocks.barrier
        for other in self.warps:
            would = other.issued + 1 if other is warp else max(other.issued + 1, other.ready)
            other.parts["barrier"] += max(0.0, opens - would)
            other.arrives = None
            other.wake = 0.0
            other.ready = max(other.ready, opens)
            other.issued = max(other.issued, opens - 1)

    def passes(self, warp: Warp, place: int, step: int, now: float) -> bool:
        """Whether a spin has seen what it waits for; otherwise the warp goes back for another turn."""
        target, together, handover, lag = self.exchange.spins[place]
        looking = self.warps if together else [warp]
        samples = [other.samples[step] for other in looking if step in other.samples]
        if step < lag or not samples or min(samples) >= self.visible[step - lag, handover]:
            warp.samples.pop(step, None)
            return True
        warp.turns += 1
        while warp.rows[warp.at][0] != target:
            warp.at -= 1
        warp.ready = now + self.clocks.branch
        if not together:
            warp.samples.pop(step, None)
            return False
        warp.votes[step] += 1
        if len({other.votes[step] for other in self.warps}) == 1:  # the last one goes back
            for other in self.warps:
                other.samples.pop(step, None)
        return False


def cost(one: Instruction, clocks: Clocks) -> Cost:
    """What an instruction takes, as far as it does not depend on what it finds."""
    base, unit = one.base, UNIT.get(one.base, "")
    rate, latency = clocks.unit.get(unit, 1), getattr(clocks, LATENCY.get(base, "other"))
    adds_to = ""
    if base == "HMMA":
        shape = re.search(r"HMMA\.(\d+)", one.opcode)[1] + (".TF32" if "TF32" in one.opcode else "")
        rate = clocks.product_rate.get(shape, clocks.product_rate_else)
        latency = clocks.product.get(shape, clocks.product_else)
        adds_to = one.operands[3]
    elif base == "HGMMA":
        columns = int(re.search(r"HGMMA\.64x(\d+)x", one.opcode)[1])
        rate, latency = max(clocks.wgmma_least, columns // clocks.wgmma_columns), clocks.wgmma
    elif base == "LDSM":
        latency = clocks.matrices - 3
    elif base in IN_SHARED:
        latency = clocks.shared
    elif base == "SHFL":
        latency = clocks.shuffle
    elif unit == "mem":
        latency = clocks.l2
    boards = tuple(board for board in range(6) if one.waits >> board & 1)
    return Cost(one, base, unit, rate, "tensor" if unit == "tensor" else f"unit {unit}", boards, adds_to, latency)


def guessed_waves(opcode: str) -> int:
    """Wavefronts of an access to an unknown address of shared memory."""
    return next((waves for part, waves in (("88.4", 4), ("64", 2), ("128", 4)) if part in opcode), 1)


def arguments(kernel: CompiledKernel, sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The constant bank of a launch by names such as "c[0x0][0x210]", and by pointer the region of its addresses."""
    signature = re.search(r"tt\.func public @\w+\((.*?)\) attributes", kernel.asm["ttgir"], re.DOTALL)[1]
    at = ARGUMENTS[kernel.metadata.target.arch // 10]
    bank, regions = {}, {}

    def put(value: int, size: int) -> None:
        nonlocal at
        at = -(-at // size) * size
        for word in range(size // 4):
            bank[f"c[0x0][{at:#x}]"] = value >> 32 * word & emulate.WORD
            at += 4

    for name, kind in re.findall(r"%([\w.]+): (!tt\.ptr<\w+>|i32|i64|f32)", signature):
        if "ptr" in kind:
            regions[name] = FIRST_REGION + len(regions)
            put(regions[name] << emulate.REGION_BITS, 8)
        else:
            put(sizes[name], 8 if kind == "i64" else 4)
    for _ in range(2):  # scratch memory of the launch and of a profiler
        put(0, 8)
    return bank, regions


def exchange_of(
    code: Sequence[Instruction],
    loop: Loop,
    undecided: set[int],
    traces: Sequence[Sequence[Sequence[Row]]],
    handed: Collection[int],
    handover: Callable[[Access], int],
) -> Exchange:
    """How a kernel hands over, as its loop shows it.

    Args:
        undecided: places of jumps back that hang on what is loaded.
        traces: by warp and step, what it runs.
        handed: regions of what its spins look at, beside flags.
        handover: as in Exchange.
    """
    bodies = {jump: code[code[jump].target : jump] for jump in undecided & set(loop.members)}
    awaited = {one.place for body in bodies.values() for one in body if one.base in FROM_L2}
    counted = {
        place
        for place in loop.members
        if code[place].base in ("REDG", "RED")
        or (code[place].base == "ATOMG" and ".ADD" in code[place].opcode and place not in awaited)
    }
    published = counted | {
        place
        for trace in traces
        for place, access in trace[-1]
        if code[place].base == "STG" and access.space == "global" and access.region in handed
    }
    spins: dict[int, Spin] = {}
    for trace in traces:
        seen = set()
        for place, access in trace[-1]:  # in the order of a step
            if access is None or access.space == "off":
                continue
            looked_for = handover(access)
            if place in published:
                seen.add(looked_for)
            for jump, body in bodies.items():
                if place in awaited and body[0].place <= place < jump and jump not in spins:
                    together = any(one.base == "BAR" for one in body)
                    spins[jump] = Spin(body[0].place, together, looked_for, int(looked_for not in seen))
    return Exchange(spins, awaited, published, handover)


def simulate(
    kernel: CompiledKernel,
    sizes: Mapping[str, int],
    programs: tuple[int, int, int],
    *,
    program: tuple[int, int, int] | None = None,
    steps: int = 6,
    exchange: bool = True,
    handed: Collection[str] = (),
    handover: Callable[[Access], int] | None = None,
    clocks: Clocks | None = None,
) -> Timing:
    """Simulates a program of a compiled kernel through some turns of its time loop.

    Args:
        kernel: for a capability of 8.0 or 9.0.
        sizes: its 32-bit arguments, by name; they must let the loop run for steps + 2 turns.
        programs: of the launch, by axis.
        program: its ids; the second program of the first axis if left out.
        steps: simulated; the first two do not count.
        exchange: wait for the other programs; without, all that they hand over is there.
        handed: names of pointers to what its spins look at, beside flags; if left out dgates and products, dr, or y,
            dropped and the first of steps.
        handover: of several exchanges in a step, the one that an access belongs to; by its pointer if left out.
        clocks: Clocks() if left out.

    Raises:
        NotSimulated: what it is not made for.
    """
    arch = kernel.metadata.target.arch
    if arch // 10 not in ARGUMENTS:
        raise NotSimulated(f"sm_{arch}: its tensor memory and its matrix instructions are not known")
    constants, regions = arguments(kernel, sizes)
    of_pass = (
        {"dgates", "products", "dr"} if regions.keys() & {"dgates", "dr"} else {"y", "dropped", "steps", "steps.0"}
    )
    names = handed or of_pass
    return simulate_code(
        sass.parse(sass.disassemble(kernel.asm["cubin"])),
        constants,
        kernel.metadata.num_warps,
        programs,
        program or (min(1, programs[0] - 1), 0, 0),
        steps,
        exchange,
        {regions[name] for name in names if name in regions},
        handover or operator.attrgetter("region"),
        clocks or Clocks(),
    )


def simulate_code(
    code: Sequence[Instruction],
    constants: Mapping[str, int],
    warps: int,
    programs: tuple[int, int, int],
    program: tuple[int, int, int],
    steps: int,
    exchange: bool,
    handed: Collection[int],
    handover: Callable[[Access], int],
    clocks: Clocks,
) -> Timing:
    """As simulate(), of machine code as it stands. constants: its constant bank; handed: as regions."""
    loop = sass.time_loop(code)
    if loop is None:
        raise NotSimulated("no loop")
    emulator = emulate.Emulator(code, constants)
    traces = [emulator.turns(loop, warp, program, programs, steps) for warp in range(warps)]
    if any(len(trace) < steps for trace in traces):
        raise NotSimulated(f"a warp leaves the loop before turn {steps}")
    between = exchange_of(code, loop, emulator.undecided, traces, handed, handover)
    if not exchange:
        between = between._replace(spins={})
    elif between.spins and not between.published:
        raise NotSimulated("what its spins wait for lies at addresses that are not known")
    machine = Multiprocessor(code, traces, between, clocks, min(clocks.l2_port, clocks.l2_bytes / math.prod(programs)))
    machine.run()
    begins = [max(warp.begins[step] for warp in machine.warps) for step in range(steps + 1)]
    parts: Counter[str] = Counter()
    for warp in machine.warps:
        parts.update(warp.parts)
    last = [row for trace in traces for row in trace[-1]]
    nowhere = {f"address of {code[place].opcode}" for place, access in last if access and access.space == "unknown"}
    return Timing(
        cycles=(begins[steps] - begins[2]) / (steps - 2),
        instructions=len(loop.members),
        executed=len(last) / warps,
        wavefronts=machine.wavefronts / steps,
        sectors=machine.sectors / steps,
        barriers=sum(warp.barriers for warp in machine.warps) / warps / steps,
        turns=sum(warp.turns for warp in machine.warps) / warps / (steps - 1),
        parts={part: round(cycles / warps / steps, 1) for part, cycles in parts.most_common() if cycles},
        unknown=tuple(sorted(emulator.unknown | nowhere)),
    )


class Run(NamedTuple):
    """When, in cycles since a program began, it has left what others wait for, and when it has ended."""

    left: float
    ended: float


def simulate_once(
    kernel: CompiledKernel,
    sizes: Mapping[str, int],
    programs: tuple[int, int, int],
    program: tuple[int, int, int],
    *,
    arrives: float = 0.0,
    handed: str = "exchange",
    resident: int | None = None,
    clocks: Clocks | None = None,
) -> Run:
    """Simulates a program of a kernel without a time loop, from its first instruction to its last.

    Args:
        kernel: for a capability of 8.0 or 9.0.
        sizes: its 32-bit arguments, by name.
        programs: of the launch, by axis. program: its ids.
        arrives: the cycle at which what it waits for can be seen.
        handed: the argument with what it leaves for others; of a record its first tensor.
        resident: how many share what L2 gives; all, if left out.
        clocks: Clocks() if left out.
    """
    clocks = clocks or Clocks()
    constants, regions = arguments(kernel, sizes)
    constants |= {f"c[0x0][{0xC + 4 * axis:#x}]": count for axis, count in enumerate(programs)}
    code = sass.parse(sass.disassemble(kernel.asm["cubin"]))
    emulator = emulate.Emulator(code, constants)
    traces = [emulator.turns(None, warp, program, programs, 1) for warp in range(kernel.metadata.num_warps)]
    bodies = {jump: code[code[jump].target : jump] for jump in emulator.undecided}
    awaited = {one.place for body in bodies.values() for one in body if one.base in FROM_L2}
    # Of a record Triton names its tensors alike, or by their places or their own names behind a point.
    region = next((region for name, region in regions.items() if name.partition(".")[0] == handed), None)
    published = {
        place
        for trace in traces
        for place, access in trace[0]
        if code[place].base == "STG" and access.space == "global" and access.region == region
    }
    spins = {jump: Spin(body[0].place, False, 1, 0) for jump, body in bodies.items()}
    shared = min(clocks.l2_port, clocks.l2_bytes / min(resident or math.prod(programs), H100.multiprocessors))
    machine = Multiprocessor(code, traces, Exchange(spins, awaited, published, lambda access: 0), clocks, shared)
    machine.visible[0, 1] = arrives  # type: ignore[assignment]
    machine.run()
    left = machine.visible[0, 0]
    return Run(left, max(warp.begins[1] or 0.0 for warp in machine.warps))


def launches_of(plan: Plan, name: str, H: int, B: int, device: Device) -> tuple[tuple[int, int, int], int]:
    """The programs of the first launch of a plan in mode "grid", or of the only one in mode "local", and how many
    launches, or tiles in turn, follow one another. Args as simulate_plan()."""
    recurrences, stacked = max(plan.directions, plan.layers), plan.layers > 1
    tiles = getattr(plan, name)
    blocks, groups = programs_of(tiles, H, B)
    if tiles.in_turn:
        at_once = in_turn(device.multiprocessors // blocks, recurrences, groups)
        turns = ceil_div(groups, at_once[1])
        return (blocks, at_once[1], at_once[0]), turns * ceil_div(recurrences, at_once[0])
    at_once = max_coresident(device.multiprocessors // blocks, recurrences, groups, stacked)
    count = ceil_div(recurrences, at_once[0]) * ceil_div(groups, at_once[1]) if plan.mode == "grid" else 1
    return (blocks, at_once[1], at_once[0]), count


def simulate_plan(
    kernel: CompiledKernel,
    name: str,
    plan: Plan,
    H: int,
    B: int,
    *,
    device: Device = H100,
    **options: Any,
) -> tuple[Timing | None, str]:
    """Simulates a kernel of a plan in its launch, where there are several in the first; of a stack, the second layer.

    Args:
        kernel: compiled for the plan.
        name: "forward" or "backward".
        H, B: hidden units, batch rows.
        device: of as many multiprocessors.
        options: of simulate().

    Returns:
        The timing, or None and why it is not simulated.
    """
    if plan.mode == "step":
        return None, "a step is a launch of its own, which takes longer than its program"
    (blocks, groups_at_once, members_at_once), _ = launches_of(plan, name, H, B, device)
    T = 64  # more than are simulated
    if (tiles := getattr(plan, name)).in_turn:
        # One tile each; with more in turn nobody waits for what is handed over.
        options.setdefault("exchange", programs_of(tiles, H, B)[1] <= groups_at_once)
        B = min(B, groups_at_once * tiles.batch)
    sizes = dict(zip(SIZES, (T, B, T * B, B, 1, 0, 0, 0, T), strict=True))
    program = min(1, blocks - 1), 0, int(plan.layers > 1)
    try:
        return simulate(kernel, sizes, (blocks, groups_at_once, members_at_once), program=program, **options), ""
    except NotSimulated as why:
        return None, str(why)
