"""lstm(): layers x directions x dropout around the recurrence of one layer and direction, and its input checks."""

import torch
from torch import _VF, Tensor

from .autograd import LSTMFunction, Sequence
from .kernels.plan import Plan, choose, why_torch


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a stack of LSTM layers, in the form that its plan chooses.

    Args:
        input: (T, B, I), (B, T, I) with batch_first, or the (rows, I) data of a packed sequence with batch_sizes.
        hx: (h0, c0) of shapes (L*D, B, Hout) and (L*D, B, H); rows in the packed order.
        weights: per layer, then direction: weight_ih, weight_hh, then bias_ih and bias_hh with bias, then weight_hr
            of a projection; shapes as in torch.nn.LSTM.
        bias, num_layers, dropout, training, bidirectional: as in torch.nn.LSTM.
        batch_sizes: (T,) int64 on the CPU, as in a PackedSequence.

    Returns:
        y: as input with D*Hout features; hn, cn: as hx.

    Raises:
        RuntimeError: tensors of different devices, dtypes or sizes, or T = 0; with the texts of torch.nn.LSTM.
    """
    if why_torch(autocast_dtype(input), input.device) is not None:
        return torch_lstm(
            input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes
        )
    input, hx, weights = autocast(input, hx, weights)
    check(input, hx, weights, 1 if batch_first else 0)

    x = input.transpose(0, 1) if batch_first else input
    directions = 2 if bidirectional else 1
    if batch_sizes is None:
        sequence = Sequence.dense(x.shape[0], x.shape[1])
    else:
        sequence = Sequence.packed(batch_sizes, x.device)
    sequences = [sequence, sequence.reversed()][:directions]
    ieee = full_precision()
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (input, *hx, *weights))

    per_cell = len(weights) // (num_layers * directions)
    hn, cn = [], []
    for layer in range(num_layers):
        outputs = []
        for direction, sequence in enumerate(sequences):
            cell = layer * directions + direction
            parameters = named(weights[cell * per_cell : (cell + 1) * per_cell], bias)
            y, h, c, *_ = LSTMFunction.apply(x, hx[0][cell], hx[1][cell], *parameters, sequence, save, ieee)
            outputs.append(y)
            hn.append(h)
            cn.append(c)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        if dropout and training and layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    return x.transpose(0, 1) if batch_first else x, torch.stack(hn), torch.stack(cn)


def named(weights: list[Tensor], bias: bool) -> tuple[Tensor | None, ...]:
    """The weights of one layer and direction as weight_ih, weight_hh, bias_ih, bias_hh, weight_hr."""
    weight_ih, weight_hh, *rest = weights
    bias_ih, bias_hh = rest[:2] if bias else (None, None)
    weight_hr = rest[-1] if len(rest) % 2 else None
    return weight_ih, weight_hh, bias_ih, bias_hh, weight_hr


def plan_for(input: Tensor, B: int, H: int) -> Plan:
    """The plan of a call, in the dtype that autocast gives it."""
    return choose(autocast_dtype(input), B, H, input.device, full_precision())


@torch.compiler.assume_constant_result
def full_precision() -> bool:
    """Whether float32 products are not to be TF32: cuDNN's own switch says so, which is the one nn.LSTM follows."""
    return torch.backends.cudnn.rnn.fp32_precision != "tf32"  # type: ignore[attr-defined]


def torch_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own LSTM."""
    if input.is_cuda and not training and torch.is_grad_enabled():
        # cuDNN differentiates in training mode only; without dropout that mode computes the same.
        training, dropout = True, 0.0
    bidirectional = bool(bidirectional)  # nn.LSTM's constructor takes 1, torch's operator does not
    if batch_sizes is None:
        return _VF.lstm(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first)
    return _VF.lstm(input, batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast, where it is on, has a tensor used."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def autocast(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Everything in autocast's dtype, as nn.LSTM has it."""
    input, h0, c0, *weights = (tensor.to(autocast_dtype(tensor)) for tensor in (input, *hx, *weights))
    return input, (h0, c0), weights


def check(input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], time_dim: int) -> None:
    """Raises for what torch's own LSTM refuses and the module does not check."""
    if input.dim() == 3 and input.shape[time_dim] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    for kind, tensors in (("hidden", hx), ("parameter", weights)):
        for tensor in tensors:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} "
                    f"and {kind} tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {input.dtype} "
                    f"and {kind} tensor with {tensor.dtype}"
                )
