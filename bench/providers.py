"""What is measured: each provider turns an nn.LSTM into a module with the same weights and the same call."""

import copy
from collections.abc import Callable

from torch import nn

import fused_lstm

BASELINE = "nn.LSTM"


def fused(lstm: nn.LSTM) -> nn.Module:
    """fused_lstm.LSTM with the weights of `lstm`."""
    module = copy.deepcopy(lstm)
    fused_lstm.swap(module)
    # A copy has its weights in separate pieces; a module that was swapped in place has not.
    module.flatten_parameters()
    return module


# The module is called as module(x, hx) -> y, (hn, cn) and names its parameters as nn.LSTM does, which lets
# tests.parity run it.
PROVIDERS: dict[str, Callable[[nn.LSTM], nn.Module]] = {"fused_lstm": fused}
