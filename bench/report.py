"""The table and the plot of a device, made from its rows alone: `python -m bench.report bench/results/<device>`."""

import math
import sys
from dataclasses import replace
from pathlib import Path

from . import store
from .cases import Case
from .lab import terms
from .model import floor, terms_of
from .store import Row


def microseconds(row: Row) -> float:
    """A provider's own time for one step."""
    return 1e3 * row["ms"]["median"] / row["case"]["T"]


def samples(row: Row) -> float:
    """Steps of batch rows that a provider goes through in a second."""
    return 1e3 * row["case"]["B"] * row["case"]["T"] / row["ms"]["median"]


def speed_up(row: Row) -> tuple[float, float, float]:
    """How many times as fast as nn.LSTM: ratio of the medians, and of nn.LSTM's median to the 80% and 20% quantile."""
    ms, baseline_ms = row["ms"], row["baseline_ms"]["median"]
    return baseline_ms / ms["median"], baseline_ms / ms["q80"], baseline_ms / ms["q20"]


def share_of_floor(row: Row, measured: dict[str, float]) -> float | None:
    """The floor's part in the time; None without a kernel plan, or for a device that the model lacks.

    measured: terms that replace the model's own, as from bench.lab.terms().
    """
    case, device = Case(**row["case"]), terms_of(row["environment"]["device"])
    if (
        device is None
        or not row["plan"]
        or row["plan"]["mode"] == "torch"
        or case.form != "dense"
        or case.proj
        or case.cell
        or case.weights
        or case.mode == "one step"
    ):
        return None
    device = device.measured(measured)
    passes = [False, True] if case.mode == "forward+backward" else [False]
    recurrence = sum(floor(device, case.dtype, row["plan"]["mode"], case.H, case.B, backward).us for backward in passes)
    # The products that are parallel over time: input_gates; in backward dx, dW_ih and dW_hh.
    columns = case.I + (2 * case.I + case.H) * (case.mode == "forward+backward")
    products = 8 * case.B * case.H * columns / (device.matrix[case.dtype] * device.multiprocessors)
    return case.layers * case.directions * (recurrence + products) / microseconds(row)


def beside_fp16(rows: list[Row]) -> dict[Case, float]:
    """nn.LSTM's median time in fp16, by the same case in bf16."""
    found: dict[Case, float] = {}
    for row in rows:
        case = Case(**row["case"])
        if case.dtype == "fp16" and "baseline_ms" in row:
            found.setdefault(replace(case, dtype="bf16"), row["baseline_ms"]["median"])
    return found


def _cells(row: Row, measured: dict[str, float], fp16: dict[Case, float]) -> list[str]:
    case = Case(**row["case"])
    start = [case.dtype, case.mode, f"{case.shape} B{case.B}", row["provider"]]
    if "ms" not in row:
        return [*start, row["status"], *[""] * (len(HEAD) - len(start) - 1)]
    ratio, low, high = speed_up(row)
    half = [
        f"{fp16[case] / row['ms']['median']:.2f}" if case in fp16 else "",
        f"{case.calls * row['copy_ms'] / row['baseline_ms']['median']:.0%}" if row.get("copy_ms") else "",
    ]
    share = share_of_floor(row, measured)
    # Rows of an older sweep have no count of what is kept, no time of the host and none of a copy.
    memory = [f"{row[name] / 2**20:.1f}" if row.get(name) else "" for name in MEMORY]
    hosts = [f"{1e3 * row[name]:.0f}" if row.get(name) else "" for name in HOSTS]
    times = [f"{samples(row):.3g}", f"{microseconds(row):.2f}", f"{1e3 * row['baseline_ms']['median'] / case.T:.2f}"]
    mark = "" if row["status"] == "ok" else f", {row['status']}"
    plan = [row["plan"]["mode"] if row["plan"] else "", f"{share:.0%}" if share else ""]
    return [*start, f"{ratio:.2f} ({low:.2f}-{high:.2f}){mark}", *half, *times, *hosts, *memory, *plan]


HOSTS = ("host_ms", "baseline_host_ms")
MEMORY = ("memory", "baseline_memory", "kept", "baseline_kept")
HEAD = [
    *("dtype", "mode", "sizes", "provider", "speed-up (20-80%)", "over fp16", "copying"),
    *("samples/s", "µs a step", "nn.LSTM's", "host µs", "nn.LSTM's"),
    *("peak MiB", "nn.LSTM's", "kept MiB", "nn.LSTM's", "plan", "of the floor"),
]
LEGEND = (
    "Speed-up: nn.LSTM's median time over the provider's, timed side by side in turns; refused: of a result that breaks"
    " the parity rule, for the reason below. Over fp16: nn.LSTM's time in fp16 over the provider's in bf16. Copying: "
    "the part of nn.LSTM's time in which torch copies its weights, as it does at each call in bf16. Samples: steps of "
    "batch rows. Host: until a call returns, its work queued; on a GPU that is not in the other times. Kept: what "
    "forward leaves for backward, input and output included and weights not. Peak: beyond the input, with the "
    "gradients. A cell of fused_lstm.cells stands with the sizes; for nn.LSTM then stands nn.GRU or nn.RNN, where torch"
    " has that cell."
)


def table(rows: list[Row], measured: dict[str, float]) -> str:
    """Returns rows of one environment as Markdown: what was measured, then why rows are refused or have no time."""
    if not rows:
        return "no rows"
    versions = ", ".join(f"{name} {value}" for name, value in rows[0]["environment"].items() if value is not None)
    lines = [versions, "", LEGEND, ""]
    fp16 = beside_fp16(rows)
    cells = [HEAD, ["---"] * len(HEAD), *(_cells(row, measured, fp16) for row in rows)]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    failures = [row for row in rows if row["status"] != "ok"]
    for row in failures:
        case = Case(**row["case"])
        why = row["why"].partition("\n")[0][:160]
        lines += [""] * (row is failures[0])
        lines.append(f"- {row['provider']} {case.dtype} {case.mode} {case.shape} B{case.B}: {why}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draws the speed-up over nn.LSTM of every provider on every case that is ok, a panel for each dtype and mode, as
    SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fused_lstm"  # the same rows, the same file
    from matplotlib import pyplot

    rows = [row for row in rows if row["status"] == "ok"]
    panels: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        case = Case(**row["case"])
        shapes = panels.setdefault((case.dtype, case.mode), {})
        shapes.setdefault(f"{case.shape} B{case.B}", {})[row["provider"]] = row
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    columns = min(2, len(panels))
    height = 1.2 + 0.24 * max(map(len, panels.values()))
    size = (5.4 * columns, height * math.ceil(len(panels) / columns))
    figure, axes = pyplot.subplots(math.ceil(len(panels) / columns), columns, figsize=size, squeeze=False, sharex=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, ((dtype, mode), shapes) in zip(axes.flat, panels.items(), strict=False):
        for k, provider in enumerate(providers):
            of = {shape: speed_up(by[provider]) for shape, by in shapes.items() if provider in by}
            at = [list(shapes).index(shape) + 0.18 * (k - (len(providers) - 1) / 2) for shape in of]
            middles = [middle for middle, _, _ in of.values()]
            spans = [[m - low for m, low, _ in of.values()], [high - m for m, _, high in of.values()]]
            ax.errorbar(middles, at, xerr=spans, fmt="o", markersize=4, linewidth=1, label=provider)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(title=f"{mode}, {dtype}", yticks=range(len(shapes)), yticklabels=list(shapes), xscale="log")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if f"{value:e}"[0] in "25" else "")
        ax.tick_params(labelsize=8, labelbottom=True, which="both")
        ax.invert_yaxis()
        ax.grid(axis="x", which="both", linewidth=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"Speed-up over nn.LSTM: {rows[0]['environment']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(folder: Path) -> str:
    """Makes table.md and plot.svg beside the sweep.jsonl of a device, of its newest environment; returns the table.

    What bench.lab has measured on the device, in lab.jsonl, takes the place of the model's own terms in the floor.
    Without matplotlib there is no plot, and a line that says so.
    """
    rows = store.read(folder / "sweep.jsonl")
    rows = [row for row in rows if row["environment"] == rows[-1]["environment"]]
    text = table(rows, terms(store.read(folder / "lab.jsonl")))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    if any(row["status"] == "ok" for row in rows):
        try:
            plot(rows, folder / "plot.svg")
        except ImportError as error:
            print(f"no plot.svg: {error}; with matplotlib, python -m bench.report {folder} draws it")
    return text


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
