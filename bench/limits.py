"""What compiling has found that a recurrence cannot have: up to which H a kernel keeps registers and shared memory.

bench.offline asks each Triton about the kernels that are planned, and writes down every answer in a file of that
Triton's, `probed-*.jsonl`: the name of the limit, H, and what happens there, below a line with a hash of the source
that was compiled. kernels/limits.json is made from these files alone, and what one Triton cannot compile is planned for
none. Once the kernels have changed a limit stays; that a kernel passes counts no more, and is asked anew.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fused_lstm.kernels import choice
from fused_lstm.kernels import limits as of_kernels
from fused_lstm.kernels.limits import limit_name, minor
from fused_lstm.kernels.tiles import Problem, Tiles

Row = dict[str, Any]
Limits = dict[str, tuple[int, str]]

LIMITS = Path(of_kernels.__file__).with_name("limits.json")
# A limit is found to so much of H: the next that is tried is further away.
RESOLUTION = 1 / 16
# In place of the half of a kernel: the answer is about all that is planned for a target.
ALL = "all"


def name_of(group: Row) -> str:
    """The name of the limit that a group of sizes has."""
    layers = 2 if group["stack"] else 1
    of = group["kernel"] == "backward", 1, layers, group["proj"], group["weights"]
    problem = Problem(group["dtype"], group["H"], *of)
    return limit_name(Tiles(**group["tiles"]), group["mode"], problem, group["target"])


def limits_of(probed: Iterable[list[Row]]) -> Limits:
    """The limits that follow from what each Triton was asked."""
    found: Limits = {}
    for rows in probed:
        for (name,), (passing, failing) in edges(rows, "name").items():
            found[name] = min(found.get(name, (passing, failing["why"])), (passing, failing["why"]))
    return dict(sorted(found.items()))


def rough_limits(rows: list[Row]) -> set[str]:
    """The names of those that are further from the least failure than bisect() leaves them."""
    return {
        name
        for (name, _), (passing, failing) in edges(rows, "name", "half").items()
        if failing["H"] - passing > RESOLUTION * failing["H"]
    }


def edges(rows: list[Row], *fields: str) -> dict[tuple[str, ...], tuple[int, Row]]:
    """By these fields of the rows the least H that fails, as its row, and the largest below it that passes, 0 if none
    does; of those alone of which one fails."""
    asked: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        asked.setdefault(tuple(row[field] for field in fields), []).append(row)
    found = {}
    for which, of in asked.items():
        failing = min((row for row in of if row["why"]), key=lambda row: row["H"], default=None)
        if failing is not None:
            found[which] = max((row["H"] for row in of if row["H"] < failing["H"]), default=0), failing
    return found


def read_probed(results: Path) -> dict[str, list[Row]]:
    """By Triton's version what it was asked."""
    return {
        path.stem.removeprefix("probed-"): list(with_source(path.read_text(encoding="utf-8").splitlines()))
        for path in sorted(results.glob("probed-*.jsonl"))
    }


def with_source(lines: Iterable[str]) -> Iterator[Row]:
    """The answers, each with the source that it is about."""
    source: Row = {}
    for row in map(json.loads, lines):
        if "source" in row:
            source = row
        else:
            yield row | source


def checked_by(probed: dict[str, list[Row]], source: Callable[[str], str]) -> dict[str, list[str]]:
    """By a Triton the targets whose plans it has compiled from their source, all of them: they have an answer of their
    own."""
    found = {
        version: {row["name"] for row in rows if row["half"] == ALL and row["source"] == source(row["name"])}
        for version, rows in probed.items()
    }
    return {minor(version): sorted(names) for version, names in found.items()}


def text_of(probed: dict[str, list[Row]], source: Callable[[str], str]) -> str:
    """The text of limits.json: a line for each."""
    parts = {"checked": checked_by(probed, source), "limits": limits_of(probed.values())}
    text = (
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in of.items())
        + "\n}"
        for part, of in parts.items()
    )
    return "{\n" + ",\n".join(text) + "\n}\n"


def install(limits: Limits) -> None:
    """Lets this process plan by limits."""
    of_kernels.limits().clear()
    of_kernels.limits().update(limits)
    for cached in (choice.candidates, choice.choose_kernel, choice.choose_narrow, choice.grouped, choice.projects):
        cached.cache_clear()


class Asked:
    """What one Triton was asked about a source, and its answers: a file of a line each, so that another run goes on
    from there."""

    def __init__(self, results: Path, version: str, source: Callable[[str], str], why: Callable[[Row], str]) -> None:
        """source: of what a limit, or an answer about all of a target, is about."""
        self.path, self.source, self.why = results / f"probed-{version}.jsonl", source, why
        self.answers: dict[tuple[str, str], dict[int, str]] = {}
        before = read_probed(results).get(version, [])
        self.rough = rough_limits(before)  # as a run that was cut short leaves them
        self.last = before[-1]["source"] if before else ""  # the source above the last answer
        for row in before:
            if row["why"] or row["source"] == source(row["name"]):
                self.answers.setdefault((row["name"], row["half"]), {})[row["H"]] = row["why"]

    def fails(self, group: Row, H: int) -> bool:
        """Whether a group's kernel fails at an H. What a longer row of its class passes none is asked again, unless a
        shorter one fails."""
        name, half = name_of(group | {"H": H}), group["half"]
        answers = self.answers.setdefault((name, half), {})
        if H in answers:
            return answers[H] != ""
        longer = any(other > H and not why for other, why in answers.items())
        if longer and not any(other < H and why for other, why in answers.items()):
            return False
        return self.answered(group | {"H": H}, self.why(group | {"H": H}))

    def answered(self, group: Row, why: str) -> bool:
        """Writes down what happens to a group's kernel; whether it fails."""
        self.noted({"name": name_of(group), "H": group["H"], "half": group["half"], "why": why})
        return why != ""

    def noted(self, row: Row) -> None:
        answers = self.answers.setdefault((row["name"], row["half"]), {})
        if answers.get(row["H"]) != row["why"]:
            answers[row["H"]] = row["why"]
            source = self.source(row["name"])
            rows = [row] if self.last == source else [{"source": source}, row]
            self.last = source
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
            print(*row.values(), flush=True)


def explore(choose: Callable[[], list[Row]], asked: Asked, whole: bool = True) -> None:
    """Asks a Triton about the kernels that are planned, and where one fails lowers its limit and plans again, until all
    that are planned pass. Goes on where it was cut short, and may run beside others that choose other kernels.

    choose: the groups that are planned by the limits that are installed. whole: they are all of their targets.
    """
    results = asked.path.parent
    # A run that was cut short may have left limits lower than they need be: they are looked for once more.
    lower = limits_of(read_probed(results).values())
    installed = {name: limit for name, limit in lower.items() if name not in asked.rough}
    while True:
        install(installed)
        groups = choose()
        print(f"{len(groups)} planned", flush=True)
        failed = 0
        for group in groups:
            if asked.fails(group, group["H"]):
                failed += 1
                bisect([H for H in group["sizes"] if group["H"] >= H], partial(asked.fails, group))
        before, installed = installed, limits_of(read_probed(results).values())
        if not failed and before == installed:
            break
    for of_target in sorted({group["target"] for group in groups}) if whole else ():
        asked.noted({"name": of_target, "H": 0, "half": ALL, "why": ""})
    write(results, asked.source)


def bisect(sizes: list[int], fails: Callable[[int], bool]) -> None:
    """Asks about sizes, of which the last fails, until it is known about where that begins."""
    low, high = -1, len(sizes) - 1  # the last that passes, the first that fails
    middle = 0  # most kernels that fail do so at every size
    while high - low > 1 and (low < 0 or sizes[high] - sizes[low] > RESOLUTION * sizes[high]):
        if fails(sizes[middle]):
            high = middle
        else:
            low = middle
        middle = (low + high) // 2


def write(results: Path, source: Callable[[str], str]) -> None:
    """Makes limits.json anew."""
    probed = read_probed(results)
    LIMITS.write_text(text_of(probed, source), encoding="utf-8")
    install(limits_of(probed.values()))
