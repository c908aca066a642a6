"""One step without gradients: a kernel of its own, a launch for each layer."""

from ..call import Call, Result
from ..operators import OneStepArgs, one_step, unwatched
from ..route import Route


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py."""
    batch_first = call.options.batch_first
    x = call.input[:, 0] if batch_first else call.input[0]
    args = OneStepArgs(x, call.h0, call.c0, call.weights, call.options.bias, route.how.ieee)
    hn, cn = one_step(args, unwatched(call.tensors()))
    y = hn[-1:].clone()
    return y.transpose(0, 1) if batch_first else y, hn, cn, None
