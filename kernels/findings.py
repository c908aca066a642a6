"""What has been found out about kernels on a device: which it does not run, which spill registers, and how long they
take, so that a plan takes the best.

On a GPU what holds in every process is kept in a file beside Triton's cache: one for each device, Triton and source of
ours. It has a line of JSON for each finding, appended whole, so that processes can share it; a line that cannot be read
is passed over, and the file may be deleted at any time. Such files are shipped with the package, in the folder
measured/, by the device's name: their times count where none were taken on the device at hand.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .environment import TRITON
from .tiles import Device, Problem, Tiles


class Candidate(NamedTuple):
    """A kernel that a plan can take, in all forms of input.

    problem: of one direction; with several layers of two, because that it has several is a constant of the kernel.
    mode: of the plan, or the name of a kernel beside the recurrence, which has no tiles.
    """

    problem: Problem
    mode: str
    tiles: Tiles | None = None

    @classmethod
    def of(cls, problem: Problem, mode: str, tiles: Tiles) -> "Candidate":
        return cls(alike(problem), mode, tiles)

    def __str__(self) -> str:
        if self.tiles is None:
            return self.mode
        return f"{self.mode}, {'backward' if self.problem.backward else 'forward'}, {self.tiles}"


def alike(problem: Problem) -> Problem:
    """What has the same kernels."""
    return problem._replace(directions=1, layers=min(problem.layers, 2))


class Launch(NamedTuple):
    """A kernel as it is timed: its microseconds a step are those of all B batch rows, rounded up to eight, and of all
    directions and layers of the problem."""

    problem: Problem
    B: int
    mode: str
    tiles: Tiles

    @property
    def candidate(self) -> Candidate:
        return Candidate.of(self.problem, self.mode, self.tiles)


class CallForm(NamedTuple):
    """A call of a module as it is timed, and what of it counts: its batch rows, rounded up to eight, and whether it has
    a backward pass, is a single step, or has lengths, resets or packed rows."""

    kind: str
    B: int
    H: int
    proj: int
    layers: int
    directions: int
    saves: bool
    one_step: bool
    cut: bool


class CallTime(NamedTuple):
    """Microseconds of a call on the kernels and on torch's own LSTM, and the date."""

    kernels: float
    torch: float
    date: str


def rounded(B: int) -> int:
    """Batch rows as they are timed: no tile has fewer than eight."""
    return -(-B // 8) * 8


class Refused(RuntimeError):
    """A launch that did not take place.

    lasts: it would be refused in every process, because the kernel does not compile or takes more than the device has.
    cooperative: the device does not run all programs of a grid at once.
    """

    def __init__(self, reason: str, lasts: bool = False, cooperative: bool = False) -> None:
        super().__init__(reason)
        self.lasts, self.cooperative = lasts, cooperative


class Findings:
    """Of one device.

    device: its name. refused: why a kernel does not run. spills: how many registers of a thread it keeps in memory.
    times: microseconds of a step. calls: of a call. shipped: times taken on another device of that name.
    """

    def __init__(self) -> None:
        self.device = ""
        self.refused: dict[Candidate, str] = {}
        self.spills: dict[Candidate, int] = {}
        self.times: dict[Launch, float] = {}
        self.calls: dict[CallForm, CallTime] = {}
        self.file: Path | None = None
        self.shipped: Findings | None = None

    def attach(self, file: Path, device: str = "") -> None:
        """Reads the file, and keeps what lasts there from now on; device: its name."""
        self.file, self.device = file, device
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # there is none yet
            return
        for line in lines:
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):  # cut short, or not ours
                continue

    def _take(self, found: Any) -> None:
        """Takes a finding as _keep() has written it."""
        if "call" in found:
            form, time = CallForm(**found["call"]), CallTime(**found["time"])
            self.calls[form] = time._replace(kernels=float(time.kernels), torch=float(time.torch))
            return
        problem, tiles = Problem(**found["problem"]), found["tiles"] and Tiles(**found["tiles"])
        candidate = Candidate(problem, found["mode"], tiles)
        hash(candidate)
        if "spills" in found:
            self.spills[candidate] = int(found["spills"])
        elif "us" in found:
            self.times[Launch(problem, int(found["B"]), found["mode"], tiles)] = float(found["us"])
        else:
            self.refused[candidate] = str(found["refused"])

    def refuse(self, candidate: Candidate, reason: str, lasts: bool) -> None:
        self.refused[candidate] = reason
        if lasts:
            self._keep(candidate, {"refused": reason})

    def note_spills(self, candidate: Candidate, registers: int) -> bool:
        """Whether that is news."""
        if self.spills.get(candidate, 0) >= registers:
            return False
        self.spills[candidate] = registers
        self._keep(candidate, {"spills": registers})
        return True

    def usable(self, problem: Problem, mode: str, tiles: list[Tiles]) -> list[Tiles]:
        """Those that run, in their order; of those that all spill registers the one that spills least."""
        if not self.refused and not self.spills:
            return tiles
        of = {Candidate.of(problem, mode, each): each for each in tiles}
        run = [one for one in of if one not in self.refused]
        whole = [one for one in run if one not in self.spills]
        return [of[one] for one in whole or sorted(run, key=self.spills.__getitem__)[:1]]

    def about(self, problem: Problem) -> tuple[str, ...]:
        """What both passes of a problem do without, and why."""
        every = self.refused | {one: f"spills {registers} registers" for one, registers in self.spills.items()}
        of = alike(problem)
        problems = [of._replace(backward=back, proj=proj) for back in (False, True) for proj in (0, of.proj)]
        return tuple(f"{one}: {why}" for one, why in every.items() if one.problem in problems)

    def measured(self) -> "Iterator[Findings]":
        """Those that have times, the device's own first."""
        yield self
        if self.shipped:
            yield self.shipped

    def note_time(self, launch: Launch, us: float) -> None:
        self.times[launch] = us
        self._keep(launch, {"B": launch.B, "us": us})

    def note_call(self, form: CallForm, time: CallTime) -> None:
        self.calls[form] = time
        self._write({"call": form._asdict(), "time": time._asdict()})

    def _keep(self, of: Candidate | Launch, finding: dict[str, Any]) -> None:
        tiles = None if of.tiles is None else asdict(of.tiles)
        self._write({"problem": of.problem._asdict(), "mode": of.mode, "tiles": tiles} | finding)

    def _write(self, finding: dict[str, Any]) -> None:
        if self.file is None:
            return
        line = json.dumps(finding)
        # On a line of its own also behind one that was cut short.
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, f"\n{line}\n".encode())  # at once: of two processes neither cuts the other's line
            finally:
                os.close(file)
        except OSError:  # read-only or full: the next process finds it out again
            pass


_OF: dict[Device, Findings] = {}


def findings_on(device: Device) -> Findings:
    return _OF.setdefault(device, Findings())


def refused_kernels() -> dict[Candidate, str]:
    """Of all devices, and why."""
    return {candidate: reason for found in _OF.values() for candidate, reason in found.refused.items()}


def forget() -> None:
    """Forgets all that this process knows; the files stay."""
    _OF.clear()
    _warned.clear()


def file_for(name: str) -> Path:
    """Where the findings of a device of that name are kept."""
    from triton import knobs

    return Path(knobs.cache.dir, "fused_lstm", f"{_in_a_path(name)}-triton-{TRITON}-{_source()}.jsonl")


def shipped_for(name: str) -> Path:
    """Where the findings about a device of that name are that are shipped, if there are any."""
    return Path(__file__).with_name("measured") / f"{_in_a_path(name)}.jsonl"


def _in_a_path(name: str) -> str:
    return re.sub(r"\W+", "-", name)


@cache
def _source() -> str:
    """A hash of the kernels' source: another one has other machine code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


_warned: set[str] = set()


def warn(candidate: Candidate, reason: str) -> None:
    """Once a process, because every plan says it too."""
    if not _warned:
        _warned.add(reason)
        text = (
            f"fused_lstm: a kernel does not run here ({candidate}: {reason}); another takes its place, or torch's own "
        )
        warnings.warn(f"{text}LSTM. The module's plan(x) says more, also of others.", RuntimeWarning, stacklevel=3)
