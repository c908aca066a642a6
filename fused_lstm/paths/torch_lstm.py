"""torch's own LSTM, called as it is: the path of a plan whose mode is "torch"."""

import torch
from torch import _VF, Tensor

from .. import segments
from ..call import Call, Options, Result
from ..kernels.layout import Layout
from ..route import Route
from ..segments import Stretches
from ..sequence import Sequence

Hidden = tuple[Tensor, Tensor]


def run(call: Call, route: Route) -> Result:
    """See paths/__init__.py."""
    return *whole(call, stretches_of(call)), None


def whole(call: Call, stretches: Stretches | None) -> tuple[Tensor, Tensor, Tensor]:
    """All layers at once. stretches: between the lengths and resets of the input, None without them."""
    input, hx, options = call.input, (call.h0, call.c0), call.options
    if stretches is None:
        return dense_or_packed(input, call.batch_sizes, hx, call.weights, options)
    packed_options = options._replace(batch_first=False)

    def packed(data: Tensor, sizes: Tensor, hx: Hidden) -> tuple[Tensor, Tensor, Tensor]:
        return dense_or_packed(data, sizes, hx, call.weights, packed_options)

    x = input.transpose(0, 1) if options.batch_first else input
    y, hn, cn = segments.run(packed, x, hx, stretches, options.directions, options.reset_to_hx)
    return y.transpose(0, 1) if options.batch_first else y, hn, cn


def dense_or_packed(
    input: Tensor, batch_sizes: Tensor | None, hx: Hidden, weights: list[Tensor], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own operator."""
    dropout, training = options.dropout, options.training
    if input.is_cuda and not training and torch.is_grad_enabled():
        # cuDNN differentiates in training mode only; without dropout that mode computes the same.
        training, dropout = True, 0.0
    # nn.LSTM's constructor takes 1 for True, this does not.
    rest = options.bias, options.num_layers, dropout, training, bool(options.bidirectional)
    if batch_sizes is None:
        return _VF.lstm(input, hx, weights, *rest, options.batch_first)
    return _VF.lstm(input, batch_sizes, hx, weights, *rest)


def stretches_of(call: Call) -> Stretches | None:
    """What lengths and resets make of the input; None without them."""
    if call.lengths is None and call.starts is None:
        return None
    T, B = call.steps, call.input.shape[0 if call.options.batch_first else 1]
    return Stretches.of(Sequence.padded(Layout(call.lengths, None, call.starts), False, T), T, B, call.input.device)
