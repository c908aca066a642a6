"""lstm(): a call is checked, its route looked up, and run."""

from collections.abc import Callable
from collections.abc import Sequence as Iterable

from torch import _VF, Tensor

from . import masks
from .call import Call, Options, Record, Result
from .checks import checked, checked_recompute
from .paths import RUN
from .route import Route, full_precision_of_cell, route_of
from .tensors import check_tensors, prepared
from .weights import wide_weights

# Is shown every call before it runs: of tuning.py.
watch: Callable[[Call], object] | None = None


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | Iterable[int] | None = None,
    reset: Tensor | None = None,
    reset_to: str = "zero",
    mask: Tensor | None = None,
    mask_to: str = "zero",
    return_states: bool = False,
    recompute: bool | int = False,
    ieee: bool | None = None,
    record: Record | None = None,
    scales: list[Tensor] | None = None,
) -> Result:
    """Runs a stack of LSTM layers, in the form that its plan chooses.

    Args:
        input: (T, B, I), (B, T, I) with batch_first, or the (rows, I) data of a packed sequence with batch_sizes.
        hx: (h0, c0) of shapes (L*D, B, Hout) and (L*D, B, H); rows in the packed order.
        weights: per layer, then direction: weight_ih, weight_hh, then bias_ih and bias_hh with bias, then weight_hr
            of a projection; shapes as in torch.nn.LSTM.
        bias, num_layers, dropout, training, bidirectional: as in torch.nn.LSTM.
        batch_sizes: (T,) int64 on the CPU, as in a PackedSequence.
        lengths: (B,) integers, steps of each row of padded input, in any order and also 0: past them y is zero, hn and
            cn are the states at each row's own last step, and the other direction begins there.
        reset: (T, B) bool, (B, T) with batch_first: the steps before which the state is reset, in every layer; the
            other direction is cut at the same place.
        reset_to: the state after a reset, "zero" or "hx".
        mask: (T, B) bool, (B, T) with batch_first: False at the steps to skip, in every layer and both directions, as
            if the row did not have them: the state stays as it is, but for a reset, which takes effect there too. What
            input holds there must be finite; its gradient is zero.
        mask_to: y at a skipped step, and the States of each layer: "zero", or "hold" for the state as it stands there,
            which is hx before a direction's first step that is not skipped. Past a row's end it is zero all the same.
        return_states: also return the states of all steps.
        recompute: for backward keep, beside input and output, the states between chunks of so many steps alone (True:
            as many as the device's memory suggests), and make the gates and cells of a chunk again when backward comes
            to it: less memory for a forward pass of the products and the cells more. Without gradients, with record, in
            forward mode and on torch's path it has no effect.
        ieee: float32 products on CUDA in full precision, or else in TF32; None: as cuDNN's own switch says, which
            torch.nn.LSTM follows. torch's own LSTM follows that switch alone.
        record: called for each layer, then direction, with its y (T, B, Hout), c (T, B, H) and activated gates
            (T, B, 4H), or (rows, ...) packed, as they are saved for backward, zero past a row's end; only to be read:
            the kernels let no gradient through c and gates. At a skipped step gates are zero, and y and c as mask_to
            says.
        scales: (4H,) each, in the input's dtype, of weight_ih, then weight_hh of each layer and direction: these
            weights have 8 bits, int8 or float8_e4m3fn, and a row of them is its scale times their numbers. None: all
            weights are of the input's dtype.

    Returns:
        y: as input with D*Hout features; hn, cn: as hx; the States, None without return_states.

    Raises:
        RuntimeError: tensors of different devices, dtypes or sizes, or T = 0; with the texts of torch.nn.LSTM.
        ValueError: a recompute below 0.
        ValueError: lengths, reset or reset_to that do not fit the input. Lengths on a CUDA device out of 0 to T are
            found under FUSED_LSTM_DEBUG=1, because a look at them would wait for the device; otherwise clamped.
        ValueError: a mask or mask_to that do not fit the input.
    """
    lengths, starts, mask = checked(input, batch_first, batch_sizes, lengths, reset, reset_to, mask, mask_to)
    to_hx, chunk = reset_to == "hx", checked_recompute(recompute)
    options = Options(bias, num_layers, dropout, training, bidirectional, batch_first, to_hx, return_states, chunk)
    call = Call(input, *hx, weights, batch_sizes, lengths, starts, options, ieee, record, scales)
    return run(call) if mask is None else masks.run(call, mask, mask_to, run)


def run(call: Call) -> Result:
    """lstm() of a call without a mask, of which all but the tensors is checked."""
    if watch is not None:
        watch(call)
    return run_on(route_of(call), call)


def run_on(route: Route, call: Call) -> Result:
    """run() on its route."""
    if call.scales is not None:
        call = of_route(call, route)
    if route.path != "torch":
        call = prepared(call)
    elif call.lengths is not None or call.starts is not None:
        check_tensors(call)
    return RUN[route.path](call, route)


def of_route(call: Call, route: Route) -> Call:
    """A call whose weights have 8 bits with those wide that its route does not multiply as they are."""
    assert call.scales is not None
    if route.narrow and route.path == "one step":
        return call
    weights = wide_weights(call.weights, call.scales, hh=not route.narrow)
    return call._replace(weights=weights, scales=call.scales[1::2] if route.narrow else None)


def lstm_cell(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], *, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """One step of one layer on the kernels, in the precision that torch.nn.LSTMCell's products have.

    Args:
        input: (B, I). hx: (h0, c0), both (B, H). weights, bias: as of one layer in lstm().

    Returns:
        h, c: (B, H).

    Raises:
        RuntimeError: as lstm().
    """
    h0, c0 = hx
    call = Call(input[None], h0[None], c0[None], weights, None, None, None, Options(bias), full_precision_of_cell())
    if watch is not None:
        watch(call)
    route = route_of(call)
    if route.path in ("torch", "in graph"):  # torch's own LSTM would have the precision of nn.LSTM's products
        return _VF.lstm_cell(input, hx, *weights)
    _, hn, cn, _ = run_on(route, call)
    return hn[0], cn[0]
