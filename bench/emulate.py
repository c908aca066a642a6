"""Runs the integer part of a kernel's machine code, a warp at a time: which way it goes through the turns of its time
loop, and what each access to memory takes of shared memory's banks or of the sectors of global memory.

A register holds one number for all 32 lanes, an array of one for each, or None: what is loaded from memory is unknown,
and so is all that is made of it. An unknown predicate lets an instruction run, and an unknown condition takes no jump:
a spin has found what it waits for.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any, NamedTuple

import numpy as np

from .sass import Instruction, Loop, width

WORD = 0xFFFFFFFF
LANES = np.arange(32, dtype=np.int64)
EVERY = np.ones(32, bool)
REGION_BITS = 34  # of an address within the region that its pointer points to
LIMIT = 400_000  # instructions of a warp

Value = Any  # int, (32,) int64 or None; of a predicate bool, (32,) bool or None
Values = dict[str, Value]  # by the names of registers, predicates, constants and special registers
Read = Callable[[Values], Value]
Run = Callable[[Values, Value], None]  # of the registers, and of the lanes that take part

# CALL.REL.NOINC, without a way back, also ends a loop of compute capability 8.0.
JUMPS = {"BRA", "CALL"}
CONTROL = JUMPS | {"BSSY", "BSYNC", "EXIT"}
ZEROS = ("RZ", "URZ", "SRZ")
TRUE = ("PT", "UPT")

LOADS = {"LDS", "LDSM", "LDG", "LD", "ATOM", "ATOMG", "ATOMS"}
STORES = {"STS", "STSM", "STG", "ST", "RED", "REDG", "LDGSTS"}
SHARED = {"LDS", "STS", "ATOMS"}
MATRICES = {"LDSM", "STSM"}  # of 8 rows of 16 bytes, a row from each of 8 lanes
# What changes no register.
NOTHING = {"BAR", "BSSY", "BSYNC", "CCTL", "CGAERRBAR", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "HGMMA", "MEMBAR"}
NOTHING |= {"LDGDEPBAR", "NANOSLEEP", "NOP", "SYNCS", "UCGABAR_ARV", "WARPGROUP", "WARPSYNC", "YIELD"}
# What computes with data, or with what other lanes have: its result counts as unknown.
DATA = {"BMSK", "F2F", "F2FP", "F2I", "FADD", "FCHK", "FFMA", "FLO", "FMNMX", "FMUL", "FSEL", "FSETP", "FSWZADD"}
DATA |= {"HADD2", "HFMA2", "HMMA", "HMNMX2", "HMUL2", "HSETP2", "I2F", "I2FP", "MUFU", "POPC", "REDUX"}
DATA |= {"SHFL", "VABSDIFF", "VIMNMX3", "VOTE", "VOTEU"}


class Access(NamedTuple):
    """What a warp's access to memory takes."""

    space: str  # "shared", "global", "unknown" for its address, or "off" if no lane takes part
    waves: int = 0  # wavefronts of shared memory; also of what LDGSTS takes there from global memory
    sectors: int = 0  # of 32 bytes of global memory
    lines: int = 0  # of 128 bytes
    region: int = 0  # of the pointer behind the address
    offset: int = 0  # bytes from there to the first lane's
    cached: tuple[int, ...] = ()  # sectors, by number, of a load that L1 may serve


Row = tuple[int, Access | None]  # an instruction that a warp has run, by its place


class Decoded(NamedTuple):
    guard: Read | None  # None: always
    run: Run | None
    measure: Callable[[Values, Value], Access] | None
    condition: Read | None  # of a jump, beside the guard
    control: str  # its opcode, if it may change which lanes go where


class Emulator:
    """A kernel, decoded once for all its warps.

    constants: by names such as "c[0x0][0x210]". unknown: opcodes that it does not know, whose results count as unknown.
    undecided: places of the jumps back that hang on what is loaded, as those of a spin do.
    """

    def __init__(self, code: Sequence[Instruction], constants: Mapping[str, int]) -> None:
        self.code = code
        self.constants = constants
        self.unknown: set[str] = set()
        self.undecided: set[int] = set()
        self.decoded = [self.decode(one) for one in code]

    def decode(self, one: Instruction) -> Decoded:
        base, run, measure, condition = one.base, None, None, None
        family = base if base in FAMILIES else base.removeprefix("U")
        if base in JUMPS:
            if re.fullmatch(r"!?U?P\w+", one.operands[0]):
                condition = predicate(one.operands[0])
        elif base in LOADS | STORES:
            measure = memory(one)
        elif family in FAMILIES:
            run = FAMILIES[family](one.opcode, one.operands)
        elif base not in NOTHING:
            run = unknown(one)
            if family not in DATA:
                self.unknown.add(one.opcode)
        guard = predicate(one.predicate) if one.predicate else None
        return Decoded(guard, run, measure, condition, base if base in CONTROL else "")

    def turns(
        self, loop: Loop | None, warp: int, program: tuple[int, int, int], programs: tuple[int, int, int], count: int
    ) -> list[list[Row]]:
        """What a warp runs in `count` turns of a loop, after its first; fewer if it leaves the loop before. Without a
        loop all that it runs, as one turn.

        program, programs: its ids and how many there are, by axis.
        """
        values: Values = dict.fromkeys(ZEROS, 0) | dict.fromkeys(TRUE, True) | dict(self.constants)
        values |= {f"SR_CTAID.{axis}": at for axis, at in zip("XYZ", program, strict=True)}
        values |= {f"SR_NCTAID.{axis}": number for axis, number in zip("XYZ", programs, strict=True)}
        values |= {"SR_TID.X": 32 * warp + LANES, "SR_LANEID": LANES, "SR_CgaCtaId": 0}
        turns: list[list[Row]] = [[]] if loop is None else []
        lanes = Lanes()
        place = 0
        for _ in range(LIMIT):
            guard, run, measure, condition, control = self.decoded[place]
            if control == "BSYNC" and lanes.wait(self.code[place].operands[0], place):
                place = lanes.others()
                continue
            if loop is not None and place == loop.head:
                if len(turns) == count + 1:
                    return turns[1:]
                turns.append([])
            active = lanes.active(True if guard is None else guard(values))
            # An unknown predicate may hold in every lane.
            access = measure(values, lanes.here if active is None else active) if measure else None
            if turns:
                turns[-1].append((place, access))
            if run:
                run(values, active)
            next_place = place + 1
            if control in JUMPS:
                taken = both_hold(active, condition(values)) if condition else active
                target = self.code[place].target
                if taken is None:
                    # If it hangs on what is loaded whether the loop goes on, it does.
                    taken = loop is not None and place == loop.jump
                    if not taken and target <= place:
                        self.undecided.add(place)
                next_place = lanes.jump(taken, target, next_place)
            elif control == "BSSY":
                lanes.joins[self.code[place].operands[0]] = lanes.here
            elif control == "EXIT" and active is not None and lanes.leave(active):
                if not lanes.parked:
                    break
                next_place = lanes.others()
            place = lanes.meet(next_place)
        return turns if loop is None else turns[1:-1]


class Lanes:
    """The lanes of a warp, which may go different ways: those that run, and those that do not until they meet again."""

    def __init__(self) -> None:
        self.here = EVERY
        self.parked: dict[int, np.ndarray] = {}  # by the place where they go on
        self.waiting: set[int] = set()  # places of them that they leave only together with others
        self.joins: dict[str, np.ndarray] = {}  # by register of BSSY, the lanes that BSYNC waits for

    def active(self, value: Value) -> Value:
        """A predicate in the lanes that are here."""
        return value if self.here is EVERY or value is None else self.here & value

    def jump(self, taken: Value, target: int, next_place: int) -> int:
        """Where the lanes go on that are here after a jump that some take: those that do not take it, if there are."""
        go = self.here & taken
        if not go.any():
            return next_place
        if np.array_equal(go, self.here):
            return target
        self.here = self.here & ~go
        self.park(target, go)
        return next_place

    def leave(self, active: Value) -> bool:
        """Whether no lane is left that is here, after those that are active have ended."""
        self.here = self.here & ~(self.here & active)
        return not self.here.any()

    def park(self, place: int, lanes: np.ndarray) -> None:
        self.parked[place] = lanes | self.parked.get(place, False)

    def wait(self, join: str, place: int) -> bool:
        """Whether lanes are missing at BSYNC; those that are here then stay at it."""
        missing = self.joins.get(join, self.here) & ~self.here
        if not any((missing & lanes).any() for lanes in self.parked.values()):
            return False
        self.park(place, self.here)
        self.waiting.add(place)
        return True

    def others(self) -> int:
        """Lets the lanes run whose place is the first; returns it."""
        place = min(self.parked.keys() - self.waiting or self.parked)
        self.waiting.discard(place)
        self.here = self.parked.pop(place)
        return place

    def meet(self, place: int) -> int:
        """Where to go on when lanes have come to a place: with those that are there, and never past any."""
        if not self.parked:
            return place
        if place in self.parked:
            self.here = self.here | self.parked.pop(place)
            self.waiting.discard(place)
        elif place > min(self.parked.keys() - self.waiting, default=place):
            self.park(place, self.here)
            return self.others()
        if self.here.all():
            self.here = EVERY
        return place


def both_hold(first: Value, second: Value) -> Value:
    return None if first is None or second is None else first & second


def is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P[T\d]", operand) is not None


def following(name: str) -> str:
    """The second half of a pair of registers, constants or places in local memory, by the name of the first; of zeros
    and special registers the same."""
    numbered = re.fullmatch(r"(U?R|c\[0x0\]\[(?:R\d+\+)?|\[R1\+)(0x[0-9a-f]+|\d+)(\]?)", name)
    if numbered is None:
        return name
    head, number, tail = numbered.groups()
    return f"{head}{int(number, 0) + 4:#x}{tail}" if tail else f"{head}{int(number) + 1}"


def signed(value: Value) -> Value:
    return ((value & WORD) ^ 0x80000000) - 0x80000000


def inverse(value: Value) -> Value:
    """Of a predicate."""
    return None if value is None else ~value if isinstance(value, np.ndarray) else not value


def reader(operand: str) -> Read:
    """How a number of 32 bits is read."""
    if operand[0] in "-~":
        read = reader(operand[1:])
        turned = operator.neg if operand[0] == "-" else operator.invert
        return lambda values: None if (value := read(values)) is None else turned(value) & WORD
    if re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
        number = int(operand, 0) & WORD
        return lambda values: number
    if indexed := re.fullmatch(r"c\[0x0\]\[(R\d+)\+(0x[0-9a-f]+)\]", operand):
        register, offset = indexed[1], int(indexed[2], 16)
        return lambda values: at_register(values, register, offset)
    name = re.sub(r"\.(64|U32|S32)$", "", operand)
    return lambda values: values.get(name)


def at_register(values: Values, register: str, offset: int) -> Value:
    """The constant that lies so many bytes behind the place in a register, which must be one for all lanes."""
    places = np.unique(values[register]) if values.get(register) is not None else ()
    return values.get(f"c[0x0][{int(places[0]) + offset:#x}]") if len(places) == 1 else None


def wide_reader(operand: str) -> Read:
    """How a number of 64 bits is read, by the first of its two registers; signed."""
    if operand.startswith("0x"):
        number = int(operand, 16)
        return lambda values: number
    name = operand.partition(".")[0]
    second = following(name)

    def read(values: Values) -> Value:
        low, high = values.get(name), values.get(second)
        return None if low is None or high is None else low + (signed(high) << 32)

    return read


def predicate(operand: str) -> Read:
    name = operand.removeprefix("!")
    if name != operand:
        return lambda values: inverse(values.get(name))
    return lambda values: values.get(name)


def write(values: Values, name: str, value: Value, active: Value = True) -> None:
    """Sets a register in the lanes that are active.

    If nobody has set it before, in all lanes: the others have nothing there that could be read.
    """
    if name in ZEROS:
        return
    if value is not None:
        value = value & WORD
        if name[0] == "U" and isinstance(value, np.ndarray):
            value = int(value[0])
    old = values.get(name)
    if active is None:
        values[name] = None
    elif active is True or np.all(active) or (old is None and np.any(active)):
        values[name] = value
    elif np.any(active):
        values[name] = None if value is None else np.where(active, value, old)


def decide(values: Values, name: str, value: Value, active: Value = True) -> None:
    """Sets a predicate in the lanes that are active."""
    if name in TRUE:
        return
    if isinstance(value, np.ndarray) and name[0] == "U":
        value = bool(value[0])
    if active is None:
        values[name] = None
    elif active is True or np.all(active):
        values[name] = value
    elif np.any(active):
        old = values.get(name)
        values[name] = None if old is None or value is None else np.where(active, value, old)


# The families of integer instructions: each gives, of an opcode and its operands, how it changes the registers.


def unknown(one: Instruction) -> Run:
    """An instruction with a result that counts as unknown."""
    results = one.operands[one.base == "SHFL" :][:2]  # which first says whether there is such a lane
    flags = [operand for operand in results if re.fullmatch(r"U?P\d", operand)]
    names = [operand for operand in results[:1] if re.fullmatch(r"U?R\d+", operand)]
    for _ in range(3 if one.base == "HMMA" else ".64" in one.opcode):
        names += [following(name) for name in names[-1:]]
    results = dict.fromkeys(flags + names)
    return lambda values, active: values.update(results)


def move(opcode: str, operands: tuple[str, ...]) -> Run:
    """MOV, and what reads a constant or a special register, or has a register in local memory while it is not used."""
    pairs = [tuple("[R1+0x0]" if operand == "[R1]" else operand for operand in operands[:2])]
    clears_two = opcode.startswith("CS2R") and ".32" not in opcode
    for _ in range(2 if clears_two or ".64" in opcode else 4 if ".128" in opcode else 1):
        pairs.append(tuple(map(following, pairs[-1])))
    moves = [(name, reader(source)) for name, source in pairs[:-1]]

    def run(values: Values, active: Value) -> None:
        # All is read before the first is written: an index may be in a register that is written.
        for (name, _), value in zip(moves, [read(values) for _, read in moves], strict=True):
            write(values, name, value, active)

    return run


def parted(operands: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
    """The registers and numbers of an instruction, the predicates before its first source, and those behind."""
    numbers = [operand for operand in operands if not is_predicate(operand)]
    source = operands.index(numbers[1], 1)
    of_result = [operand for operand in operands[:source] if is_predicate(operand)]
    return numbers, of_result, [operand for operand in operands[source:] if is_predicate(operand)]


def multiply_add(opcode: str, operands: tuple[str, ...]) -> Run:
    numbers, _, carries = parted(operands)
    name = numbers[0]
    x, y = reader(numbers[1]), reader(numbers[2])
    as_factor = (lambda value: value) if ".U32" in opcode else signed
    if ".WIDE" in opcode:
        z, second = wide_reader(numbers[3]), following(name)

        def run_wide(values: Values, active: Value) -> None:
            a, b, c = x(values), y(values), z(values)
            low = high = None
            if a is not None and b is not None and c is not None:
                total = as_factor(a) * as_factor(b) + c
                low, high = total, total >> 32
            write(values, name, low, active)
            write(values, second, high, active)

        return run_wide
    z = reader(numbers[3])
    if ".HI" in opcode:

        def run_high(values: Values, active: Value) -> None:
            a, b, c = x(values), y(values), z(values)
            known = a is not None and b is not None and c is not None
            write(values, name, (as_factor(a) * as_factor(b) >> 32) + c if known else None, active)

        return run_high
    if numbers[1] == numbers[2] == "RZ" and ".X" not in opcode:
        return lambda values, active: write(values, name, z(values), active)
    carry = predicate(carries[-1]) if ".X" in opcode else lambda values: 0

    def run(values: Values, active: Value) -> None:
        a, b, c, carried = x(values), y(values), z(values), carry(values)
        if a is None and isinstance(b, int) and b == 0:
            a = 0
        if b is None and isinstance(a, int) and a == 0:
            b = 0
        total = None
        if a is not None and b is not None and c is not None and carried is not None:
            total = signed(a) * signed(b) + c + carried
        write(values, name, total, active)

    return run


def term(operand: str) -> Read:
    """A term of a sum: what is subtracted is added as 2^32 less it, which carries where nothing is borrowed."""
    if operand[0] != "-":
        return reader(operand)
    read = reader(operand[1:])
    return lambda values: None if (value := read(values)) is None else WORD + 1 - value


def add(opcode: str, operands: tuple[str, ...]) -> Run:
    numbers, carries_out, carries_in = parted(operands)
    name = numbers[0]
    terms = [term(number) for number in numbers[1:] if number not in ZEROS]
    if ".X" in opcode:
        terms += [predicate(carry) for carry in carries_in]

    def run(values: Values, active: Value) -> None:
        total: Value = 0
        for read in terms:
            value = read(values)
            if value is None:
                write(values, name, None, active)
                for carry in carries_out:
                    decide(values, carry, None)
                return
            total = total + value
        write(values, name, total, active)
        for at, carry in enumerate(carries_out):
            decide(values, carry, total > WORD if at == 0 else total > 2 * WORD + 1, active)

    return run


def shift_add(opcode: str, operands: tuple[str, ...]) -> Run:
    """LEA: a shifted number plus another; .HI: the upper word of a shifted pair plus another."""
    numbers, carries_out, carries_in = parted(operands)
    name, x, y = numbers[0], reader(numbers[1]), reader(numbers[2])
    if ".HI" in opcode:
        extends = ".SX32" in opcode
        upper = reader(numbers[3])
        shift = int(numbers[3 if extends else 4], 0)
        carry = predicate(carries_in[-1]) if ".X" in opcode else lambda values: 0

        def run_high(values: Values, active: Value) -> None:
            low, other, carried = x(values), y(values), carry(values)
            high = None if low is None and extends else signed(low) >> 31 if extends else upper(values)
            total = None
            if low is not None and other is not None and high is not None and carried is not None:
                total = ((((signed(high) << 32) | (low & WORD)) >> (32 - shift)) & WORD) + other + carried
            write(values, name, total, active)

        return run_high
    shift = int(numbers[3], 0) if len(numbers) > 3 else 0

    def run(values: Values, active: Value) -> None:
        shifted, other = x(values), y(values)
        total = None
        if shifted is not None and other is not None:
            total = ((shifted << shift) & WORD) + (other & WORD)
        write(values, name, total, active)
        for carry in carries_out:
            decide(values, carry, None if total is None else total > WORD, True if total is None else active)

    return run


def truth(table: int, nothing: Value, invert: Callable[[Value], Value]) -> Callable[[Sequence[Value]], Value]:
    """A function of three operands by its table of 8 bits; unknown ones count only where the table looks at them.

    nothing, invert: false of all bits, and the opposite of an operand.
    """
    bits = (4, 2, 1)
    used = [at for at, bit in enumerate(bits) if any((table >> n ^ table >> (n ^ bit)) & 1 for n in range(8))]
    rows = [n for n in range(8) if not n & sum(bits[at] for at in range(3) if at not in used)]
    ones = [n for n in rows if table >> n & 1]
    # Of the function and of its opposite, the one that has fewer terms.
    turned = 2 * len(ones) > len(rows)
    chosen = [n for n in rows if n not in ones] if turned else ones
    terms = [[(at, bool(n & bits[at])) for at in used] for n in chosen]

    def value(operands: Sequence[Value]) -> Value:
        if any(operands[at] is None for at in used):
            return None
        result = nothing
        for factors in terms:
            result = result | reduce(
                operator.and_, [operands[at] if straight else invert(operands[at]) for at, straight in factors]
            )
        return invert(result) if turned else result

    return value


def logic(opcode: str, operands: tuple[str, ...]) -> Run:
    """LOP3: any function of the bits of three numbers."""
    numbers, flags, _ = parted(operands)
    name = numbers[0]
    sources = [reader(number) for number in numbers[1:4]]
    function = truth(int(numbers[4], 0), 0, operator.invert)

    def run(values: Values, active: Value) -> None:
        value = function([read(values) for read in sources])
        write(values, name, value, active)
        for flag in flags:
            decide(values, flag, None if value is None else (value & WORD) != 0, True if value is None else active)

    return run


def predicate_logic(opcode: str, operands: tuple[str, ...]) -> Run:
    """PLOP3: two functions of three predicates."""
    sources = [predicate(operand) for operand in operands[2:5]]
    functions = [
        (name, truth(int(table, 0), False, inverse)) for name, table in zip(operands[:2], operands[5:], strict=True)
    ]

    def run(values: Values, active: Value) -> None:
        operands = [read(values) for read in sources]
        for name, function in functions:
            value = function(operands)
            decide(values, name, value, True if value is None else active)

    return run


def shift(opcode: str, operands: tuple[str, ...]) -> Run:
    """SHF: a pair of numbers, shifted, of which one word is the result."""
    name, low, by, high = operands[0], *map(reader, operands[1:4])
    right, upper, wide, arithmetic = (part in opcode for part in (".R", ".HI", "64", ".S"))
    wraps, limit = ".W" in opcode, 63 if "64" in opcode else 32

    def run(values: Values, active: Value) -> None:
        x, n, y = low(values), by(values), high(values)
        if not right and not upper and not wide and y is None:
            y = 0
        if right and upper and x is None:
            x = 0
        if x is None or n is None or y is None:
            write(values, name, None, active)
            return
        n = n & (63 if wide else 31) if wraps else smaller(n, limit)
        if right and upper:
            value = signed(y) >> smaller(n, 31) if arithmetic else y >> n
        elif right:
            value = (y << larger(32 - n, 0)) | (x >> n)
        elif upper:
            value = (y << n) | (x >> larger(32 - n, 0))
        else:
            value = x << n
        write(values, name, value, active)

    return run


def smaller(value: Value, limit: Value) -> Value:
    either = isinstance(value, np.ndarray) or isinstance(limit, np.ndarray)
    return np.minimum(value, limit) if either else min(value, limit)


def larger(value: Value, limit: Value) -> Value:
    either = isinstance(value, np.ndarray) or isinstance(limit, np.ndarray)
    return np.maximum(value, limit) if either else max(value, limit)


def select(opcode: str, operands: tuple[str, ...]) -> Run:
    name, x, y, which = operands[0], reader(operands[1]), reader(operands[2]), predicate(operands[3])

    def run(values: Values, active: Value) -> None:
        first, second, chosen = x(values), y(values), which(values)
        if chosen is None:
            value = first if first is not None and second is not None and np.all(first == second) else None
        elif np.all(chosen):
            value = first
        elif not np.any(chosen):
            value = second
        else:
            value = None if first is None or second is None else np.where(chosen, first, second)
        write(values, name, value, active)

    return run


COMPARISONS = {name: getattr(operator, name.lower()) for name in ("GT", "GE", "LT", "LE", "EQ", "NE")}


def compare(opcode: str, operands: tuple[str, ...]) -> Run:
    """ISETP: a comparison and its opposite, each combined with a predicate; .EX: the upper words of 64 bits."""
    names, x, y = operands[:2], reader(operands[2]), reader(operands[3])
    combined = predicate(operands[4])
    lower = predicate(operands[5]) if ".EX" in opcode else None
    kind = opcode.split(".")[1]
    holds = COMPARISONS[kind]
    strictly = COMPARISONS[kind[0] + "T"] if kind[0] in "GL" else None
    combine = operator.or_ if ".OR" in opcode else operator.xor if ".XOR" in opcode else operator.and_
    as_number = (lambda value: value) if ".U32" in opcode else signed

    def run(values: Values, active: Value) -> None:
        first, second, other = x(values), y(values), combined(values)
        of_lower = lower(values) if lower else True
        if first is None or second is None or other is None or of_lower is None:
            for name in names:
                decide(values, name, None)
            return
        first, second = as_number(first), as_number(second)
        if lower is None:
            found = holds(first, second)
        elif kind == "NE":
            found = (first != second) | of_lower
        else:
            found = (first == second) & of_lower
            if strictly:
                found = found | strictly(first, second)
        decide(values, names[0], combine(found, other), active)
        decide(values, names[1], combine(inverse(found), other), active)

    return run


def permute(opcode: str, operands: tuple[str, ...]) -> Run:
    """PRMT: four of the eight bytes of two numbers, or their signs."""
    name, low, selector, high = operands[0], *map(reader, operands[1:4])

    def run(values: Values, active: Value) -> None:
        x, chosen, y = low(values), selector(values), high(values)
        if isinstance(chosen, int):
            places = [chosen >> 4 * at & 7 for at in range(4)]
            x = 0 if x is None and min(places) > 3 else x
            y = 0 if y is None and max(places) < 4 else y
        value: Value = None
        if x is not None and y is not None and chosen is not None:
            value, pair = 0, (signed(y) << 32) | x
            for at in range(4):
                place = chosen >> 4 * at & 15
                byte = pair >> 8 * (place & 7) & 255
                if isinstance(place, int) and place & 8:
                    byte = (byte >> 7) * 255
                value = value | byte << 8 * at
        write(values, name, value, active)

    return run


def extend(opcode: str, operands: tuple[str, ...]) -> Run:
    """SGXT: the lower bits of a number, with their sign or without."""
    name, x, bits = operands[0], reader(operands[1]), reader(operands[2])
    keeps_sign = ".U32" not in opcode

    def run(values: Values, active: Value) -> None:
        number, count = x(values), bits(values)
        value = None
        if number is not None and count is not None:
            value = number & ((1 << count) - 1)
            if keeps_sign:
                sign = 1 << (count - 1)
                value = (value ^ sign) - sign
        write(values, name, value, active)

    return run


def extreme(opcode: str, operands: tuple[str, ...]) -> Run:
    """VIMNMX: the smaller of two numbers where a predicate holds, elsewhere the larger; in VIADDMNMX the first is a
    sum."""
    name, terms, y = operands[0], [reader(operand) for operand in operands[1:-2]], reader(operands[-2])
    which = predicate(operands[-1])
    as_number = (lambda value: value & WORD) if "U32" in opcode else signed

    def run(values: Values, active: Value) -> None:
        parts, second, least = [read(values) for read in terms], y(values), which(values)
        value = None
        if second is not None and least is not None and not any(part is None for part in parts):
            first, second = as_number(sum(parts)), as_number(second)
            value = np.where(least, smaller(first, second), larger(first, second))
            value = value if value.ndim else int(value)
        write(values, name, value, active)

    return run


def magnitude(opcode: str, operands: tuple[str, ...]) -> Run:
    name, read = operands[0], reader(operands[1])

    def run(values: Values, active: Value) -> None:
        value = read(values)
        write(values, name, None if value is None else abs(signed(value)), active)

    return run


def predicates_in(mask: str) -> dict[int, str]:
    """The predicates whose bits a mask has, by the place of the bit."""
    return {at: f"P{at}" for at in range(7) if int(mask, 0) >> at & 1}


def pack(opcode: str, operands: tuple[str, ...]) -> Run:
    """P2R: predicates as bits of a number."""
    name, other, mask = operands[0], reader(operands[2]), int(operands[3], 0)
    flags, shifts = predicates_in(operands[3]), "." in opcode  # P2R.B1 into another byte

    def run(values: Values, active: Value) -> None:
        value = None if shifts else other(values)
        found = {at: values.get(flag) for at, flag in flags.items()}
        if any(bit is None for bit in found.values()):
            value = None
        if value is not None:
            value = reduce(operator.or_, [bit * 1 << at for at, bit in found.items()], value & ~mask)
        write(values, name, value, active)

    return run


def unpack(opcode: str, operands: tuple[str, ...]) -> Run:
    """R2P: predicates out of the bits of a number."""
    read, flags = reader(operands[1]), predicates_in(operands[2])

    def run(values: Values, active: Value) -> None:
        value = None if "." in opcode else read(values)
        for at, flag in flags.items():
            decide(values, flag, None if value is None else (value >> at & 1) == 1, active)

    return run


# By opcode, or by that of the same instruction for a whole warp, which has a U before it.
FAMILIES: dict[str, Callable[[str, tuple[str, ...]], Run]] = {
    **dict.fromkeys(("MOV", "LDC", "S2R", "S2UR", "CS2R", "R2UR", "LDL", "STL"), move),
    **dict.fromkeys(("IADD3", "VIADD"), add),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), extreme),
    "IMAD": multiply_add,
    "LEA": shift_add,
    "LOP3": logic,
    "PLOP3": predicate_logic,
    "SHF": shift,
    "SEL": select,
    "ISETP": compare,
    "PRMT": permute,
    "SGXT": extend,
    "IABS": magnitude,
    "P2R": pack,
    "R2P": unpack,
}


def memory(one: Instruction) -> Callable[[Values, Value], Access]:
    """How an access to memory is measured; what it loads counts as unknown."""
    *copied_to, where = (operand for operand in one.operands if "[" in operand)
    read, to = address(where), address(copied_to[0]) if copied_to else None
    opcode, base = one.opcode, one.base
    size = width(opcode)
    matrices = next((number for number in (4, 2) if f"88.{number}" in opcode), 1)
    weak = (base == "LDG" and "STRONG" not in opcode) or (base == "LDGSTS" and "BYPASS" not in opcode)
    loaded = []
    if base in LOADS:
        first = next(operand for operand in one.operands if not operand.startswith("P"))
        loaded = [first] if re.fullmatch(r"R\d+", first) else []
        count = matrices if base in MATRICES else size // 4
        for _ in range(count - 1 if loaded else 0):
            loaded.append(following(loaded[-1]))

    def access(values: Values, active: Value) -> Access:
        at = read(values)
        for name in loaded:
            values[name] = None
        if not np.any(active):
            return Access("off")
        if at is None:
            return Access("unknown")
        at, on = in_lanes(at), EVERY if active is True else in_lanes(active)
        if base in MATRICES:
            return Access("shared", matrix_waves(*pattern(at), matrices))
        if base in SHARED:
            return Access("shared", waves(*pattern(at), on.tobytes(), size))
        target = to(values) if to else None
        of_copy = 0 if target is None else waves(*pattern(in_lanes(target)), on.tobytes(), size)
        at = at if on is EVERY else at[on]
        first = int(at[0])
        line = first >> 7
        sectors, lines, numbers = touched((at - (line << 7)).tobytes(), size)
        cached = tuple([4 * line + number for number in numbers]) if weak else ()
        return Access("global", of_copy, sectors, lines, first >> REGION_BITS, first & ((1 << REGION_BITS) - 1), cached)

    return access


def in_lanes(value: Value) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else np.full(32, value)


def address(operand: str) -> Read:
    """How the address in the last of an operand's brackets is read."""
    terms: list[Read] = []
    offset = 0
    for part in filter(None, re.findall(r"\[([^\]]*)\]", operand)[-1].split("+")):
        if re.fullmatch(r"-?0x[0-9a-f]+", part):
            offset += int(part, 16)
        elif scaled := re.fullmatch(r"(\w+)\.X(\d+)", part):
            terms.append(times(reader(scaled[1]), int(scaled[2])))
        elif part.endswith(".64") or (part.startswith("UR") and "desc" in operand):
            terms.append(wide_reader(part))
        else:
            terms.append(reader(part))

    def read(values: Values) -> Value:
        total: Value = offset
        for term in terms:
            value = term(values)
            if value is None:
                return None
            total = total + value
        return total

    return read


def times(read: Read, factor: int) -> Read:
    return lambda values: None if (value := read(values)) is None else value * factor


def pattern(at: np.ndarray) -> tuple[int, bytes]:
    """Addresses in shared memory as the first's place among the 128 bytes of all banks, and where they lie from there:
    many accesses differ in nothing that the banks would see."""
    begin = int(at[0])
    return begin & 127, (at - begin).tobytes()


@cache
def matrix_waves(begin: int, places: bytes, matrices: int) -> int:
    """Wavefronts of an access to so many matrices: each takes those of its 8 rows."""
    at = np.frombuffer(places, np.int64) + begin
    rows = at[: 8 * matrices].reshape(matrices, 8)
    return sum(conflict(np.concatenate([(row >> 2) + word for word in range(4)])) for row in rows)


@cache
def waves(begin: int, places: bytes, on: bytes, size: int) -> int:
    """Wavefronts of an access of the lanes that are on; of wide ones half or a quarter of the lanes share one."""
    at, lanes = np.frombuffer(places, np.int64) + begin, np.frombuffer(on, bool)
    groups = {16: 4, 8: 2}.get(size, 1)
    total = 0
    for group, takes_part in zip(at.reshape(groups, -1), lanes.reshape(groups, -1), strict=True):
        if takes_part.any():
            words = group[takes_part] >> 2
            total += conflict(np.concatenate([words + word for word in range(max(1, size // 4))]))
    return max(1, total)


def conflict(words: np.ndarray) -> int:
    """How many different words the busiest of the 32 banks has."""
    return int(np.bincount(np.unique(words) & 31).max())


@cache
def touched(places: bytes, size: int) -> tuple[int, int, tuple[int, ...]]:
    """Sectors and lines of global memory that accesses touch, and the numbers of the sectors; places: bytes from the
    begin of a line."""
    at = np.frombuffer(places, np.int64)
    sectors = np.unique(np.concatenate([at >> 5, (at + size - 1) >> 5]))
    return len(sectors), len(np.unique(sectors >> 2)), tuple(sectors.tolist())
