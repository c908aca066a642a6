"""LSTM: the conventions of torch.nn.LSTM (batch_first, unbatched and packed input, hx) around functional.lstm()."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from .functional import lstm, plan_for
from .kernels.plan import Plan


class LSTM(nn.RNNBase):
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

    Raises:
        ValueError, TypeError: as torch.nn.LSTM, with its texts.
    """

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
    ) -> None:
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

    # torch's own checks, so that they and their texts stay torch's own.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Runs the sequence.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: (h0, c0) of shapes (L*D, B, Hout) and (L*D, B, H), without B for unbatched input; zeros if None.

        Returns:
            y, (hn, cn): y in the form of the input with D*Hout features; hn and cn in the shapes of h0 and c0.

        Raises:
            ValueError, RuntimeError, IndexError: as torch.nn.LSTM, with its texts.
        """
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            y, hidden = self._run(data, batch_sizes, self._states(data, hx, int(batch_sizes[0])), sorted_indices)
            packed = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(hidden, unsorted_indices)

        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batch_dim = 0 if self.batch_first else 1
        batched = input.dim() == 3
        if hx is not None and not (hx[0].dim() == hx[1].dim() == input.dim()):
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be "
                f"{input.dim()}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if batched:
            return self._run(input, None, self._states(input, hx, input.size(batch_dim)))
        if hx is not None:
            hx = tuple(state.unsqueeze(1) for state in hx)  # type: ignore[assignment]
        y, (hn, cn) = self._run(input.unsqueeze(batch_dim), None, self._states(input, hx, 1))
        return y.squeeze(batch_dim), (hn.squeeze(1), cn.squeeze(1))

    def _states(self, data: Tensor, hx: tuple[Tensor, Tensor] | None, B: int) -> tuple[Tensor, Tensor]:
        if hx is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            h0 = data.new_zeros(count, B, self.proj_size or self.hidden_size)
            return h0, data.new_zeros(count, B, self.hidden_size)
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        return hx[0], hx[1]

    def _run(
        self, data: Tensor, batch_sizes: Tensor | None, hx: tuple[Tensor, Tensor], permutation: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.check_forward_args(data, hx, batch_sizes)
        y, hn, cn = lstm(
            data,
            self.permute_hidden(hx, permutation),
            self._flat_weights,  # type: ignore[arg-type]
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first and batch_sizes is None,
            batch_sizes=batch_sizes,
        )
        return y, (hn, cn)

    def plan(self, input: Tensor | PackedSequence) -> Plan:
        """Returns the Plan that forward(input) would take, with its reason in words."""
        if isinstance(input, PackedSequence):
            data, B = input.data, int(input.batch_sizes[0])
        else:
            data, B = input, 1 if input.dim() == 2 else input.size(0 if self.batch_first else 1)
        return plan_for(data, B, self.hidden_size)


def swap(model: nn.Module, back: bool = False) -> int:
    """Turns every nn.LSTM inside `model` (and `model` itself) into fused_lstm.LSTM, in place.

    The module objects stay the same and only change their class, so parameters, hooks, training mode, device,
    parametrizations and every reference to them (optimizers, tied modules) are kept. A user's own subclass of
    nn.LSTM is left alone: its forward is not ours to replace.

    Args:
        model: any module.
        back: turn fused_lstm.LSTM into nn.LSTM instead.

    Returns:
        How many modules were turned.
    """
    old, new = (LSTM, nn.LSTM) if back else (nn.LSTM, LSTM)
    count = 0
    for module in model.modules():
        cls = type(module)
        if cls is old:
            module.__class__ = new
        elif parametrize.is_parametrized(module) and cls.__bases__ == (old,):
            # torch gives a parametrized module a class of its own: rebuild it over the new base.
            module.__class__ = type(cls.__name__.replace(old.__name__, new.__name__), (new,), dict(cls.__dict__))
        else:
            continue
        count += 1
    return count
