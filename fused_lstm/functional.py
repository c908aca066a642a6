"""lstm(): layers x directions x dropout around the recurrence of one layer and direction, and its input checks."""

import operator
from collections.abc import Callable
from collections.abc import Sequence as Iterable
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import composed, masks, on_torch, operators
from .autograd import LSTMFunction
from .context import Context
from .kernels.environment import DEBUG
from .kernels.layout import DENSE, Layout, accumulator
from .layer import Members, named, together
from .planning import (
    autocast_dtype,
    check_recompute,
    chunk_of,
    full_precision,
    full_precision_of_cell,
    groups_of,
    path_of,
    projects_in_kernel,
    takes_one_step,
    why_torch,
)
from .sequence import Sequence


class States(NamedTuple):
    """The states of all steps, a tensor for each layer.

    y: (T, B, D*Hout) of each layer, before dropout; c: (T, B, D*H), its cells. In the form of the input otherwise.
    """

    y: tuple[Tensor, ...]
    c: tuple[Tensor, ...]


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
    record: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, States | None]:
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

    Returns:
        y: as input with D*Hout features; hn, cn: as hx; the States, None without return_states.

    Raises:
        RuntimeError: tensors of different devices, dtypes or sizes, or T = 0; with the texts of torch.nn.LSTM.
        ValueError: a recompute below 0.
        ValueError: lengths, reset or reset_to that do not fit the input. Lengths on a CUDA device out of 0 to T are
            found under FUSED_LSTM_DEBUG=1, because a look at them would wait for the device; otherwise clamped.
        ValueError: a mask or mask_to that do not fit the input.
    """
    layout, to_hx = layout_of(input, batch_first, batch_sizes, lengths, reset, reset_to), reset_to == "hx"
    directions = 2 if bidirectional else 1
    check_recompute(recompute)
    mask = masks.checked(input, batch_sizes, mask, mask_to)
    if mask is not None:
        rest: dict[str, Any] = {"bias": bias, "num_layers": num_layers, "dropout": dropout, "training": training}
        rest |= {"bidirectional": bidirectional, "return_states": return_states, "recompute": recompute, "ieee": ieee}
        unmasked = partial(lstm, weights=weights, reset_to=reset_to, **rest)
        return masks.run(unmasked, input, hx, mask, mask_to, layout, reset_to, directions, batch_first, record)
    context = Context.of(input, *hx, *weights)
    cut = batch_sizes is not None or layout is not DENSE
    path = path_of(input, context, return_states, record is not None, cut)
    composes = path == "composed"
    stack = on_torch.Layers(bias, num_layers, bidirectional, dropout, training)
    if path == "torch":
        if layout is not DENSE:
            check(input, hx, weights, 1 if batch_first else 0)
        stretches = on_torch.stretches_of(input, batch_first, layout.lengths, layout.starts)
        return *on_torch.run(input, batch_sizes, stretches, hx, weights, stack, batch_first, to_hx), None
    input, hx, weights = autocast(input, hx, weights)
    check(input, hx, weights, 1 if batch_first else 0)
    if path == "operator":
        given = input, batch_sizes, layout, hx, weights, stack, batch_first, to_hx
        y, hn, cn, *of_layers = on_torch.in_graph(*given, return_states)
        return y, hn, cn, States(*of_layers) if return_states else None

    # T in front of B, in any memory.
    x = input.transpose(0, 1) if batch_first else input
    save = record is not None or context.saves
    per_cell = len(weights) // (num_layers * directions)
    drops = bool(training and dropout > 0 and num_layers > 1)
    ieee = full_precision() if ieee is None else ieee
    if not (cut or return_states or composes) and takes_one_step(
        x.shape[0], bidirectional, per_cell % 2 == 1, save, drops
    ):
        hn, cn = operators.run(operators.one_step, x[0], *hx, weights, bias, ieee)
        y = hn[-1:].clone()
        return y.transpose(0, 1) if batch_first else y, hn, cn, None
    B, H = hx[1].shape[1:]
    # Without save nothing is kept, with record all is asked for.
    chunk = chunk_of(recompute, x, B, H) if save and record is None else 0
    # The kernels take both orders; of chunks, cut in time, each is copied.
    by_rows = batch_first and not (composes or chunk or x.is_contiguous())
    if batch_sizes is not None:
        sequence = Sequence.packed(batch_sizes, x.device)
    elif by_rows:
        x, starts = input, layout.starts
        layout = layout._replace(starts=None if starts is None else starts.T.contiguous(), batch_first=True)
        sequence = Sequence.padded(layout, to_hx, x.shape[1])
    else:
        sequence = Sequence.padded(layout, to_hx, x.shape[0])

    alone = bidirectional or return_states or record is not None or composes or to_hx
    projection = hx[0].shape[2] if per_cell % 2 else 0
    groups = groups_of(input, (B, H), num_layers, bool(alone or projection or chunk))
    projects = bool(projection) and projects_in_kernel(input, (B, H, projection), directions)

    ends: list[tuple[Tensor, Tensor]] = []
    states = States((), ())
    begin = 0
    for layers in groups:
        end = begin + layers * directions
        parameters = named(weights[begin * per_cell : end * per_cell], bias, end - begin)
        members = Members(layers > 1, projects)
        if drops and layers > 1:
            seed = torch.randint(2**62, (1,), device=x.device)
            members = Members(True, projects, seed, x.new_full((1,), 1 - dropout, dtype=accumulator(x.dtype)))
        h0, c0 = hx if len(groups) == 1 else (hx[0][begin:end], hx[1][begin:end])
        tensors = x, h0, c0
        if composes:
            x, hn, cn, cells, gates = composed.members(*tensors, parameters, sequence, members)
            c_saved = cells
        else:
            flat = (tensor for own in parameters for tensor in own)
            # Where nothing is differentiated autograd would only cost the host its time.
            run = LSTMFunction.apply if save else LSTMFunction.forward
            results: Any = run(*tensors, *sequence, *members, save, return_states, ieee, chunk, *flat)
            x, hn, cn, c_saved, gates, cells = results
        if record is not None:
            if layout.padded:  # the kernels leave the gates of the padding as the memory was
                gates = gates.masked_fill(layout.past(gates.shape), 0)
            of_time = (t.transpose(0, 1) if by_rows else t for t in (x, c_saved, gates))
            for of_direction in zip(*(t.chunk(directions, -1) for t in of_time), strict=True):
                record(*of_direction)
        ends.append((hn, cn))
        if return_states:
            states = States((*states.y, x), (*states.c, cells))
        begin = end
        if drops and begin < num_layers * directions:
            x = torch.dropout(x, dropout, True)
    if batch_first and not by_rows:
        x, states = x.transpose(0, 1), States(*(tuple(t.transpose(0, 1) for t in tensors) for tensors in states))
    hn, cn = (together(list(tensors), 0) for tensors in zip(*ends, strict=True))
    return x, hn, cn, states if return_states else None


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
    context = Context.of(input, *hx, *weights)
    if context.saves or context.forward_mode or why_torch(input, context) is not None:
        _, hn, cn, _ = lstm(input[None], (hx[0][None], hx[1][None]), weights, bias=bias, ieee=full_precision_of_cell())
    else:
        input, hx, weights = autocast(input, hx, weights)
        check(input, hx, weights, 0)
        states, ieee = (hx[0][None], hx[1][None]), full_precision_of_cell()
        hn, cn = operators.run(operators.one_step, input, *states, weights, bias, ieee)
    return hn[0], cn[0]


def layout_of(
    input: Tensor,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | Iterable[int] | None,
    reset: Tensor | None,
    reset_to: str,
) -> Layout:
    """The layout of padded input, checked; empty without lengths and reset.

    Raises:
        ValueError: as lstm().
    """
    if reset_to not in ("zero", "hx"):
        raise ValueError(f'reset_to must be "zero" or "hx", got {reset_to!r}')
    if lengths is None and reset is None:
        return DENSE
    if batch_sizes is not None:
        raise ValueError("lengths and reset take padded input: a PackedSequence has its lengths in itself")
    B, T = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    if lengths is not None:
        lengths = integers(lengths)
        if lengths.shape != (B,):
            raise ValueError(f"lengths must have shape ({B},), one for each row, got {tuple(lengths.shape)}")
        if lengths.device not in (input.device, torch.device("cpu")):
            raise ValueError(f"lengths must be on {input.device} as the input or on the CPU, got {lengths.device}")
        if B > 0 and may_look(lengths):
            least, most = int(lengths.min()), int(lengths.max())
            if least < 0 or most > T:
                raise ValueError(f"lengths must be from 0 to T = {T}, got {least} to {most}")
        lengths = lengths.to(input.device, torch.int64, non_blocking=True).clamp(0, T)
    if reset is not None:
        reset = masks.of_steps("reset", reset, input)
        reset = (reset.T if batch_first else reset).contiguous()
    return Layout(lengths, None, reset)


def integers(lengths: Any) -> Tensor:
    """lengths as a tensor: of a tensor, a NumPy array, or a sequence of integers of Python, NumPy or torch.

    Raises:
        ValueError: they are not integers.
    """
    if not isinstance(lengths, Tensor) and hasattr(lengths, "dtype"):
        lengths = torch.as_tensor(lengths)
    if not isinstance(lengths, Tensor):
        whole = [operator.index(length) for length in lengths if is_integer(length)]
        if len(whole) != len(lengths):
            raise ValueError(f"lengths must be integers, got {lengths}")
        return torch.tensor(whole, dtype=torch.int64)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    return lengths


def is_integer(value: Any) -> bool:
    """Of Python, of NumPy, or a tensor of one; bools are none."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Integral) and not isinstance(value, bool)


def may_look(tensor: Tensor) -> bool:
    """Whether a check may read a tensor's elements: they are at hand, or nobody minds to wait for the device."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return (tensor.device.type == "cpu" or DEBUG) and not traced


def autocast(
    input: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Everything in autocast's dtype, as nn.LSTM has it."""
    if input.is_meta or not torch.is_autocast_enabled(input.device.type):
        return input, hx, weights
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
