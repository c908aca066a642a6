"""The short table, made from rows alone."""

from .cases import Case
from .store import Row


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    ms, baseline_ms = row["ms"]["median"], row["baseline_ms"]["median"]
    plan = row["plan"]["mode"] if row["plan"] else ""
    return f"{baseline_ms / ms:.2f}x {1e3 * ms / row['case']['T']:.2f} {plan}".rstrip()


def _provider(name: str, rows: list[Row]) -> list[str]:
    cells, lines = {}, {}
    for row in rows:
        case = Case(**row["case"])
        line = (case.dtype, case.mode, case.shape)
        cells[line, case.B] = row
        lines[line] = None  # a dict keeps the order of the rows
    widths = sorted({B for _, B in cells})
    head = ["dtype", "mode", "shape", *(f"B{B}" for B in widths)]
    body = [[*line, *(_cell(cells.get((line, B))) for B in widths)] for line in lines]
    table = [head, ["---"] * len(head), *body]
    return [
        f"{name}: speed-up over {rows[0]['baseline']} (ratio of medians), then its own time in µs a step and its plan",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
    ]


def table(rows: list[Row]) -> str:
    """Returns rows of one environment as Markdown: a table for each provider, then why rows have no time."""
    if not rows:
        return "no rows"
    versions = ", ".join(f"{name} {value}" for name, value in rows[0]["environment"].items() if value is not None)
    lines = [versions, ""]
    for name in dict.fromkeys(row["provider"] for row in rows):
        lines += _provider(name, [row for row in rows if row["provider"] == name])
    for row in rows:
        if row["status"] != "ok":
            case = Case(**row["case"])
            first_line = row["why"].partition("\n")[0][:160]
            lines.append(f"- {row['provider']} {case.dtype} {case.mode} {case.shape} B{case.B}: {first_line}")
    return "\n".join(lines).rstrip()
