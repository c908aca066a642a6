"""The recurrence in the kernels, for whole sequences, with gradients or without."""

from .. import autograd
from ..call import Call, Result
from ..route import Route
from .layers import layer_by_layer


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py."""
    return layer_by_layer(call, route, autograd.run)
