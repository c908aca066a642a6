"""One step without gradients: a kernel of its own, a launch for all layers."""

from ..call import Call, Result
from ..operators import OneStepArgs, one_step, unwatched
from ..route import Route


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py."""
    batch_first = call.options.batch_first
    x = call.input[:, 0] if batch_first else call.input[0]
    options = call.options
    weights = call.weights, call.scales or []
    args = OneStepArgs(x, call.h0, call.c0, *weights, options.bias, options.directions, route.how.ieee)
    y, hn, cn = one_step(args, unwatched(call.tensors()))
    return y[:, None] if batch_first else y[None], hn, cn, None
