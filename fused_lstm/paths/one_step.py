"""One step without gradients: a kernel of its own, a launch for each layer."""

from torch import Tensor

from ..call import Call, Result
from ..operators import OneStepArgs, one_step, unwatched
from ..route import Route


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py."""
    x = call.input[:, 0] if call.options.batch_first else call.input[0]
    hn, cn = states(call._replace(input=x), route)
    y = hn[-1:].clone()
    return y.transpose(0, 1) if call.options.batch_first else y, hn, cn, None


def states(call: Call, route: Route) -> tuple[Tensor, Tensor]:
    """hn and cn; the input is (B, I)."""
    args = OneStepArgs(call.input, call.h0, call.c0, call.weights, call.options.bias, route.ieee)
    return one_step(args, unwatched(call.tensors()))
