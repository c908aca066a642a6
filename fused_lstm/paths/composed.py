"""The recurrence composed of torch operations, step by step: what the other paths lack, slowly."""

from ..call import Call, Result
from ..composed import recurrences
from ..recurrence import Inputs, Outputs, Recurrence
from ..route import Route
from .layers import layer_by_layer


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py."""
    return layer_by_layer(call, route, outputs)


def outputs(how: Recurrence, inputs: Inputs) -> Outputs:
    """What runs in one launch of the kernels. Here c and gates have a gradient, too."""
    y, hn, cn, cells, gates = recurrences(how, inputs)
    return Outputs(y, hn, cn, cells, gates, cells)
