"""LSTM and LSTMCell: torch.nn's conventions (batch_first, unbatched and packed input, hx) around functional.py."""

from collections.abc import Sequence
from operator import is_not
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from .call import Options, States
from .checks import checked_recompute, with_batch_dim
from .context import PLAIN, Context
from .functional import lstm, lstm_cell
from .interop import Refusing, as_leaf
from .kernels.plan import Plan
from .route import Form, autocast_dtype, full_precision, full_precision_of_cell, plan_of, unless_autocast, why_torch


class LSTM(Refusing, nn.RNNBase):
    """A drop-in for torch.nn.LSTM whose recurrence runs in fused Triton kernels on CUDA.

    Arguments, parameters, state_dict, input forms, results and errors are those of torch.nn.LSTM
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html). With T steps, B rows, I input features,
    L layers, D directions and Hout = proj_size or hidden_size:

    Args:
        input_size: I, features of the input.
        hidden_size: H, units of a layer.
        num_layers: L; each layer reads the output of the one below.
        bias: False leaves out bias_ih and bias_hh.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...); hx is not affected.
        dropout: probability to zero an element of each layer's output but the last's, in training.
        bidirectional: a second set of weights reads the sequence backwards; D = 2.
        proj_size: P > 0 projects h to P features (https://arxiv.org/abs/1402.1128).
        device, dtype: of the parameters.
        recompute: True to keep for backward, beside input and output, the states between chunks of steps alone, and
            make the gates and cells again chunk by chunk: the same gradients in less memory and a little more time. A
            number is the length of the chunks; that of True follows from the GPU's memory and is in the plan. Also an
            attribute, to be set at any time; no part of the state_dict. On torch's path, where the plan's mode is
            "torch", it has no effect.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM, with its texts; a recompute that is below 0, or no bool or integer.
    """

    # Of the class too: a swapped module has no attribute of its own.
    recompute: bool | int = False
    # To what quantize() has quantized the weights; "" for nothing.
    quantized: str = ""

    # Subclassing RNNBase and not nn.LSTM: torch.compile refuses every instance of nn.LSTM.
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool | int = False,
    ) -> None:
        checked_recompute(recompute)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        if recompute:  # the class has the default
            self.recompute = recompute

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", recompute={self.recompute}" if self.recompute else "")

    # torch's own checks, so that they and their texts stay torch's own.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def _update_flat_weights(self) -> None:
        # torch's own finds each weight by nn.Module.__getattr__, which takes longer than to see that none has changed.
        parameters = map(self._parameters.get, self._flat_weights_names)
        if is_compiling() or any(map(is_not, parameters, self._flat_weights)):
            super()._update_flat_weights()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor | None, Tensor | None] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        reset_to: str = "zero",
        mask: Tensor | None = None,
        mask_to: str = "zero",
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the sequence. Without the keywords the call is nn.LSTM's.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: (h0, c0) of shapes (L*D, B, Hout) and (L*D, B, H), without B for unbatched input; a B of 1 is broadcast;
                zeros for what is None.
            lengths: (B,) integers, the steps of each row of padded input, in any order and also 0: past them y is zero,
                hn and cn are the states at each row's own last step, and the reverse direction begins there. What the
                padding holds must be finite.
            reset: (T, B) bool, (B, T) with batch_first, (T,) unbatched: the steps before which the state is reset, in
                every layer, and with it the gradient cut; the reverse direction is cut at the same place.
            reset_to: the state after a reset, "zero" or "hx".
            mask: (T, B) bool, (B, T) with batch_first, (T,) unbatched: False at the steps to skip, in every layer and
                both directions, as if the row did not have them: the state stays as it is, but for a reset, which takes
                effect there too. What input holds there must be finite; its gradient is zero.
            mask_to: y at a skipped step, and the States of each layer: "zero", or "hold" for the state as it stands
                there, which is hx before a direction's first step that is not skipped. Past a row's end it is zero all
                the same.
            return_states: also return the States of all steps and layers.

        Returns:
            y, (hn, cn): y in the form of the input with D*Hout features; hn and cn in the shapes of h0 and c0.
            y, (hn, cn), states: with return_states.

        Raises:
            ValueError, RuntimeError, IndexError: as torch.nn.LSTM, with its texts.
            ValueError: lengths, reset or reset_to that do not fit the input. Lengths on a CUDA device out of 0 to T are
                found under FUSED_LSTM_DEBUG=1, because a look at them would wait for the device; otherwise clamped.
            ValueError: a mask or mask_to that do not fit the input.
        """
        options: dict[str, Any] = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "mask": mask}
        options |= {"mask_to": mask_to, "return_states": return_states}
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx, **options)
        return self._forward(input, hx, options)

    def _forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor | None, Tensor | None] | None, options: dict[str, Any]
    ) -> tuple[Any, ...]:
        """forward(), with any of lstm()'s keywords for the sequence in options."""
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            states_in = self._states(data, hx, int(batch_sizes[0]))
            y, hidden, *states = self._run(data, batch_sizes, states_in, sorted_indices, options)

            def packed(y: Tensor) -> PackedSequence:
                return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)

            states = [States(*(tuple(map(packed, tensors)) for tensors in both)) for both in states]  # type: ignore
            return packed(y), self.permute_hidden(hidden, unsorted_indices), *states

        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batch_dim = 0 if self.batch_first else 1
        batched = input.dim() == 3
        if hx is not None:
            dims = [input.dim() if state is None else state.dim() for state in (hx[0], hx[1])]
            if dims != [input.dim()] * 2:
                raise RuntimeError(
                    f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be "
                    f"{input.dim()}-D but got ({dims[0]}-D, {dims[1]}-D) tensors"
                )
        if batched:
            return self._run(input, None, self._states(input, hx, input.size(batch_dim)), None, options)
        with_batch_dim(options, input, batch_dim)
        if hx is not None:
            hx = tuple(None if state is None else state.unsqueeze(1) for state in hx)  # type: ignore[assignment]
        y, (hn, cn), *states = self._run(input.unsqueeze(batch_dim), None, self._states(input, hx, 1), None, options)
        states = [States(*(tuple(t.squeeze(batch_dim) for t in tensors) for tensors in both)) for both in states]
        return y.squeeze(batch_dim), (hn.squeeze(1), cn.squeeze(1)), *states

    def _states(self, data: Tensor, hx: tuple[Tensor | None, Tensor | None] | None, B: int) -> tuple[Tensor, Tensor]:
        if isinstance(hx, Tensor):
            raise TypeError(f"lstm() takes hx as a tuple of two Tensors, (h0, c0), got one Tensor of {tuple(hx.shape)}")
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        count = self.num_layers * (2 if self.bidirectional else 1)
        states = []
        for state, size in zip(hx or (None, None), (self.proj_size or self.hidden_size, self.hidden_size), strict=True):
            if state is None:
                state = data.new_zeros(count, B, size)
            elif B != 1 and state.dim() == 3 and state.shape[1] == 1:
                state = state.expand(-1, B, -1)
            states.append(state)
        return states[0], states[1]

    def _weights(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """The weights in nn.LSTM's order, and as lstm() takes them the scales of those that are quantized."""
        return self._flat_weights, None  # type: ignore[return-value]

    def _run(
        self,
        data: Tensor,
        batch_sizes: Tensor | None,
        hx: tuple[Tensor, Tensor],
        permutation: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Any, ...]:
        self.check_forward_args(data, hx, batch_sizes)
        weights, scales = self._weights()
        y, hn, cn, states = lstm(
            data,
            self.permute_hidden(hx, permutation),
            weights,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first and batch_sizes is None,
            batch_sizes=batch_sizes,
            recompute=self.recompute,
            scales=scales,
            **options,
        )
        return (y, (hn, cn)) if states is None else (y, (hn, cn), states)

    def plan(self, input: Tensor | PackedSequence) -> Plan:
        """Returns the Plan that forward(input) would take here and now, with its reason in words.

        Whether gradients are wanted counts, as within torch.no_grad(): one step without them has a kernel of its own.
        """
        packed = isinstance(input, PackedSequence)
        if isinstance(input, PackedSequence):
            data, T, B = input.data, len(input.batch_sizes), int(input.batch_sizes[0])
        else:
            data, (T, B) = input, (input.shape[0], 1) if input.dim() == 2 else input.shape[:2]
            if self.batch_first and input.dim() == 3:
                T, B = B, T
        options = Options(
            bool(self.bias),
            self.num_layers,
            self.dropout,
            self.training,
            bool(self.bidirectional),
            self.batch_first,
            recompute=checked_recompute(self.recompute),
        )
        context, sizes = Context.of(data, *self.parameters()), (B, self.hidden_size, self.proj_size)
        form = Form(options, context, data.device, autocast_dtype(data), *sizes, T == 1, packed)
        return plan_of(form._replace(ieee=full_precision(), weights=unless_autocast(self.quantized)))


class LSTMCell(Refusing, nn.LSTMCell):
    """A drop-in for torch.nn.LSTMCell on the same kernels; without gradients one launch, which writes h and c alone.

    Arguments, parameters, state_dict and errors are those of torch.nn.LSTMCell
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html).
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Runs one step.

        Args:
            input: (B, I), or (I,).
            hx: (h0, c0), both (B, H), or (H,); zeros if None.

        Returns:
            h, c: as h0 and c0.

        Raises:
            ValueError, RuntimeError: as torch.nn.LSTMCell, with its texts.
        """
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        context = Context.of(input)
        if why_torch(context, autocast_dtype(input), input.device) is not None and not context.batched:
            return super().forward(input, hx)
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        for name, tensor in (("input", input), *((f"hx[{k}]", state) for k, state in enumerate(hx or ()))):
            if tensor.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input[None]
        if hx is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            hx = (zeros, zeros)
        elif len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        elif not batched:
            hx = (hx[0][None], hx[1][None])
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}")
        for k, state in enumerate(hx):
            if state.shape[0] != x.shape[0]:
                raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
            if state.dim() != 2 or state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {self.hidden_size}"
                )
        weights = [
            weight for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh) if weight is not None
        ]
        h, c = lstm_cell(x, hx, weights, bias=bool(self.bias))
        return (h, c) if batched else (h[0], c[0])

    def plan(self, input: Tensor) -> Plan:
        """Returns the Plan that forward(input) takes without gradients."""
        context, sizes = Context.of(input), (input.shape[0], self.hidden_size, 0)
        context = PLAIN if context.plain else context._replace(saves=False)
        dtype, ieee = autocast_dtype(input), full_precision_of_cell()
        return plan_of(Form(Options(), context, input.device, dtype, *sizes, one_step=True, ieee=ieee))
