"""A cell as the kernels take it: its printed source, made functions of Triton."""

import hashlib
import linecache
from functools import cache
from typing import Any

from ..kernels.equations import Equations
from .definition import Cell


@cache
def compiled(cell: Cell) -> Equations:
    """The Equations of a cell.

    Raises:
        ValueError: an operation that has no form in Triton here, named.
    """
    source, graph = cell.source, cell.graph
    key = hashlib.sha256(source.rpartition('"""')[2].encode()).hexdigest()[:12]  # of the code alone
    file = f"<fused_lstm cell {cell.__name__} {key}>"
    # Where inspect, and through it Triton, looks for the text of a function.
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    module: dict[str, Any] = {"__name__": f"fused_lstm.cells.printed_{key}"}
    exec(compile(source, file, "exec"), module)
    before, after = graph.taken
    return Equations(
        f"{cell.__name__} {key}",
        module["forward"],
        module["backward"],
        len(cell.gates),
        len(graph.outputs),
        len(cell.params),
        len(graph.saved),
        tuple(k for k, gate in enumerate(cell.gates) if gate in graph.apart),
        before,
        after,
    )
