"""`python -m bench.lab`: measures on a CUDA device the terms on which the kernels' design rests, one row for each.

functions  the largest error of exp2, of a division, and of the cell's exp, sigmoid and tanh (kernels/cell.py), in ulp
exchange   a step flag among N programs (kernels/sync.py), and beside it programs that poll the data itself
broadcast  N programs that all read the h tile which they have just written together
launch     from one dependent kernel to the next, launched from Python and in a CUDA graph
matrix     the products of a step with W_hh on chip, at the tiles that the plans take
tune       the recurrence kernels with tiles around the plan's own
plans      what the plans choose among, and the whole call beside nn.LSTM's, by fused_lstm.tune()

A worker process measures row by row and a supervisor watches it, as in bench.run: what hangs or takes the CUDA context
down costs one row. A dry run takes the same lines on tiny sizes in Triton's interpreter; its times mean nothing.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import micro, plans, store, tune, worker
from .micro import Lab, Measured, Wrong
from .store import Row
from .worker import RESTART, lost


@dataclass(frozen=True)
class Part:
    """What a part measures, (name, params) in the order of worth, and how: raises Wrong, or whatever goes wrong."""

    items: Callable[[Lab], Iterator[tuple[str, dict[str, Any]]]]
    measure: Callable[[Lab, str, dict[str, Any]], Measured]


PARTS = {
    "functions": Part(micro.functions_items, micro.functions),
    "exchange": Part(micro.exchange_items, micro.exchange),
    "broadcast": Part(micro.broadcast_items, micro.broadcast),
    "launch": Part(micro.launch_items, micro.launch),
    "matrix": Part(micro.matrix_items, micro.matrix),
    "tune": Part(tune.items, tune.measure),
    "plans": Part(plans.items, plans.measure),
}


class Item(NamedTuple):
    """What one row measures."""

    part: str
    name: str
    params: dict[str, Any]


Work = list[Item]


def listed(lab: Lab, parts: list[str]) -> Work:
    """Returns what the parts measure."""
    return [Item(part, name, params) for part in parts for name, params in PARTS[part].items(lab)]


def todo(work: Work, path: Path, environment: dict[str, Any]) -> Work:
    """Returns the part of `work` that has no row of this environment in the file yet."""
    done = {repr((row["part"], row["name"], row["params"])) for row in store.read(path, environment)}
    return [item for item in work if repr(tuple(item)) not in done]


def row(item: Item, environment: dict[str, Any], status: str, why: str = "", **measured: Any) -> Row:
    """Returns one row of the results file.

    status is "ok", or "refused" (a wrong result) or "failed", then with the reason in why. A row that is ok, or refused
    and ended all the same, holds value and unit; us, the microseconds that a step or launch takes; and median, q20, q80
    and rounds of these.
    """
    return item._asdict() | {"environment": environment, "status": status, "why": why[:2000]} | measured


def measure(item: Item, lab: Lab, environment: dict[str, Any]) -> Row:
    """Measures one item; an exception becomes a row that says so."""
    status, why = "ok", ""
    try:
        measured = PARTS[item.part].measure(lab, item.name, item.params)
    except Wrong as wrong:
        status, why, measured = "refused", str(wrong), wrong.measured
    except Exception as error:
        return row(item, environment, "failed", f"{type(error).__name__}: {error}")
    if measured is None:
        return row(item, environment, status, why)
    times, value, unit = measured
    return row(item, environment, status, why, value=value, unit=unit, us=times.median, **asdict(times))


def sweep(work: Work, path: Path, lab: Lab, environment: dict[str, Any], until: float) -> int:
    """Measures what the file has no row of yet, in order, until the deadline; returns as bench.run.sweep does."""
    rest = todo(work, path, environment)
    with tune.compiling(lab, [item[1:] for item in rest if item.part == "tune"]) as ready:
        for item in rest:
            if time.time() >= until:
                break
            if item.part == "tune":
                ready(*item[1:])
            measured = measure(item, lab, environment)
            store.append(path, measured)
            print(f"{item.part}: {what(measured)}: {measured['status']}", flush=True)
            if measured["status"] != "ok" and lost(lab.device):
                return RESTART
    return 0


def supervise(command: list[str], work: Work, path: Path, environment: dict[str, Any], until: float) -> None:
    """Runs the worker `command` until it has measured all of `work`, or until the deadline."""

    def fail(item: Item, why: str) -> None:
        store.append(path, row(item, environment, "failed", why))

    worker.supervise(command, path, lambda: todo(work, path, environment), fail, until)


def terms(rows: list[Row]) -> dict[str, float]:
    """Returns the measured terms of a performance model by name; those without a row that is ok are left out.

    exchange_us, poll_us: a step flag, and a step of programs that poll the data of one batch row; all multiprocessors.
    l2_bytes_per_us: of the largest read, where latency counts least; all programs together.
    launch_us, graph_launch_us: from one kernel to the next, from Python and in a CUDA graph.
    matrix_DTYPE_flop_per_us_per_sm: median over tiles; fp32 counts the flop of one product, not of the three it takes.
    """
    good = [row for row in rows if row["status"] == "ok"]

    def largest(part: str, name: str, size: Callable[[dict[str, Any]], Any] = len) -> list[Row]:
        found = [row for row in good if (row["part"], row["name"]) == (part, name)]
        return sorted(found, key=lambda row: size(row["params"]))[-1:]

    found = {
        "exchange_us": largest("exchange", "counter", lambda params: params["N"]),
        "poll_us": largest("exchange", "poll", lambda params: (params["N"], -params["B"])),
        "l2_bytes_per_us": largest("broadcast", "read", lambda params: params["bytes"]),
        "launch_us": largest("launch", "python"),
        "graph_launch_us": largest("launch", "graph"),
    }
    for row in good:
        if row["part"] == "matrix":
            found.setdefault(f"matrix_{row['params']['dtype']}_flop_per_us_per_sm", []).append(row)
    return {name: statistics.median(row["value"] for row in rows) for name, rows in found.items() if rows}


def what(row: Row) -> str:
    """A row's name and sizes, in a line."""
    sizes = row["params"] | row["params"].get("tiles", {})
    words = (value if isinstance(value, str) else f"{name} {value}" for name, value in sizes.items() if name != "tiles")
    return " ".join([row["name"], *words])


def _value(row: Row, digits: str) -> str:
    """Its value, marked if the result was wrong; without one, its status."""
    if "value" not in row:
        return row["status"]
    return f"{row['value']:{digits}}" + (f", {row['status']}" if row["status"] != "ok" else "")


def _tuned(rows: list[Row]) -> list[str]:
    """The cells of one case of one pass: its best candidate that is right, beside the plan's own."""
    good = [row for row in rows if row["status"] == "ok"]
    own = next((_value(row, ".3f") for row in rows if row["params"]["chosen"]), "none")
    if not good:
        return ["tune", what(rows[0]), f"none, the plan's own {own}", f"of {len(rows)} tried"]
    best = min(good, key=lambda row: row["value"])
    value = f"{best['value']:.3f}, the plan's own {own}"
    return ["tune", what(best), value, f"{best['unit']}, best of {len(good)}, {len(rows)} tried"]


def broken(row: Row) -> bool:
    """A wrong result, or none where there must be one: a device may have no room for tiles that are not the plan's."""
    return row["status"] == "refused" or (row["status"] == "failed" and row["params"].get("chosen", True))


def table(rows: list[Row]) -> str:
    """Returns rows of one environment as Markdown: values, terms, the best tiles, then what is broken and why."""
    if not rows:
        return "no rows"
    lines = [["part", "what", "value", "unit"], ["---"] * 4]
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["part"] == "tune":
            case = (row["name"], *(row["params"][name] for name in ("dtype", "H", "B")))
            cases.setdefault(case, []).append(row)
        else:
            lines.append([row["part"], what(row), _value(row, ".4g"), row.get("unit", "")])
    lines += [["terms", name, f"{value:.4g}", ""] for name, value in terms(rows).items()]
    lines += [_tuned(case) for case in cases.values()]
    versions = ", ".join(f"{name} {value}" for name, value in rows[0]["environment"].items() if value is not None)
    if rows[0]["environment"].get("dry"):
        versions += ": a dry run, whose times are the interpreter's and mean nothing"
    why = [f"- {row['part']} {what(row)}: {row['why'].partition(chr(10))[0][:160]}" for row in filter(broken, rows)]
    return "\n".join([versions, "", *(f"| {' | '.join(cells)} |" for cells in lines), "", *why]).rstrip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU in Triton's interpreter")
    parser.add_argument("--results", type=Path, help="folder (default: bench/results, a temporary one for --dry)")
    parser.add_argument("--until", type=float, default=time.time() + 420, help="deadline, seconds since the epoch")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # the supervisor's environment
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {' '.join(sorted(unknown))}; there are {' '.join(PARTS)}")
    return args


def _source() -> str:
    """A hash of the lab's own code, on which its rows depend besides the kernels."""
    files = [store.ROOT / "bench" / name for name in ("micro.py", "plans.py", "tune.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def main() -> int:
    """Runs the command line; returns 1 if a row is broken, from a dry run also if one is missing."""
    args = _arguments()
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry runs without one")
    lab = Lab(torch.device("cpu"), seconds=0.0) if args.dry else Lab(torch.device("cuda", torch.cuda.current_device()))
    environment = args.worker or store.environment(lab.device) | {"lab": _source(), "dry": args.dry or None}
    results = args.results or (Path(tempfile.mkdtemp()) if args.dry else store.ROOT / "bench/results")
    path = store.folder_for(results, environment) / "lab.jsonl"
    parts = args.parts or list(PARTS)
    work = listed(lab, parts)
    if args.worker:
        if "plans" in parts:
            plans.keep_in(path.parent, lab)
        return sweep(work, path, lab, environment, args.until)

    if args.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.lab", *parts, "--worker", json.dumps(environment)]
    command += ["--results", str(results), "--until", str(args.until), *["--dry"] * args.dry]
    supervise(command, work, path, environment, args.until)
    rows = store.read(path, environment)
    missing = len(todo(work, path, environment))
    print(f"\n{path}: {len(work) - missing} of {len(work)} rows{'; the same command goes on' * bool(missing)}\n")
    text = table(rows)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(map(broken, rows)) or (args.dry and missing > 0))


if __name__ == "__main__":
    raise SystemExit(main())
