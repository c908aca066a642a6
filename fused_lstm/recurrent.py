"""Recurrent: a layer of any cell, with nn.LSTM's conventions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from . import masks
from .call import Options
from .cells.definition import Cell
from .cells.layers import CellCall
from .cells.route import chunk_of, plan_of, run
from .cells.weights import Weights
from .checks import checked, checked_recompute, with_batch_dim
from .context import Context
from .interop import as_leaf
from .kernels.planned import Plan
from .route import autocast_dtype

Hidden = Tensor | tuple[Tensor | None, ...]


class Recurrent(nn.RNNBase):
    """A stack of layers of one cell, with the conventions and keywords of torch.nn.LSTM and torch.nn.GRU.

    With T steps, B rows, I input features, H hidden units, L layers, D directions, and G gates of the cell. Parameters
    of each layer, with the suffix _l0, of the reverse direction _l0_reverse: weight_ih (G·H, I), weight_hh (G·H, H),
    bias_ih and bias_hh (G·H), each vector of the cell under its own name (H), and weight_fh (F·H, F·H) where F states
    of the cell feed back. All begin as torch.nn's do, uniform within 1/√H.

    Args:
        cell: of fused_lstm.cells, or a function of your own under fused_lstm.cell.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            torch.nn.LSTM.
        recompute: as in fused_lstm.LSTM, on the kernels and composed of torch operations. In graphs and under
            transforms, where the plan has no chunk, and with resets to hx it has no effect.

    Raises:
        TypeError: cell is none.
        ValueError, TypeError: as torch.nn.LSTM, with its texts.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        recompute: bool | int = False,
    ) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"Recurrent takes a cell of fused_lstm.cells or fused_lstm.cell, got {type(cell).__name__}")
        checked_recompute(recompute)
        # torch's checks of all others; of its parameters, which have no memory, only the names are kept.
        super().__init__(
            "RNN_TANH",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device="meta",
        )
        self.mode, self.cell, self.recompute = cell.__name__, cell, recompute
        self._flat_weights_names, self._all_weights = [], []
        self._parameters.clear()
        D = 2 if bidirectional else 1
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[:D]:
                shapes = Weights.shapes(cell, input_size if layer == 0 else D * hidden_size, hidden_size)
                names = [f"{name}_l{layer}{suffix}" for name in Weights.names(cell, bias)]
                for name, of in zip(names, Weights.names(cell, bias), strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shapes[of], device=device, dtype=dtype)))
                self._flat_weights_names += names
                self._all_weights.append(names)
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if hasattr(self, "cell"):  # otherwise torch's constructor asks, for parameters without memory
            super().reset_parameters()

    def flatten_parameters(self) -> None:
        """Does nothing: cuDNN, for which torch flattens parameters, has none of these cells."""

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("torch.jit.script does not compile fused_lstm.Recurrent; torch.export and torch.compile do")

    def extra_repr(self) -> str:
        recompute = f", recompute={self.recompute}" if self.recompute else ""
        return f"{self.cell.__name__}, {super().extra_repr()}{recompute}"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        reset_to: str = "zero",
        mask: Tensor | None = None,
        mask_to: str = "zero",
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the sequence.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
            hx: (h0, and each further state of the cell), of a cell without one h0 alone, each (L*D, B, H), or (L*D, H)
                unbatched; a B of 1 is broadcast; zeros for what is None.
            lengths, reset, reset_to, mask, mask_to: as fused_lstm.LSTM takes them.
            return_states: also return the states of all steps and layers.

        Returns:
            y, hx: y in the form of the input with D*H features; hx as it is taken, after each row's last step.
            y, hx, states: with return_states; states.h and the cell's states by name are tuples of a tensor for each
                layer, in the form of y.

        Raises:
            ValueError, RuntimeError, IndexError: as fused_lstm.LSTM.
        """
        options: dict[str, Any] = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "mask": mask}
        options |= {"mask_to": mask_to, "return_states": return_states}
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx, **options)
        return self._forward(input, hx, options)

    def _forward(
        self, input: Tensor | PackedSequence, hx: Hidden | None, options: dict[str, Any], record: Any = None
    ) -> tuple[Any, ...]:
        """forward(); record: of a CellCall."""
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            states = [self.permute_hidden(s, sorted_indices) for s in self._states(hx, data, int(batch_sizes[0]), 3)]
            y, *ends, of_layers = self._run(data, batch_sizes, states, options, record)
            ends = [self.permute_hidden(end, unsorted_indices) for end in ends]
            return self._formed(y, ends, of_layers, lambda tensor: input._replace(data=tensor))
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batch_dim = 0 if self.batch_first else 1
        if input.dim() == 3:
            states = self._states(hx, input, input.size(batch_dim), 3)
            y, *ends, of_layers = self._run(input, None, states, options, record)
            return self._formed(y, ends, of_layers, lambda tensor: tensor)
        with_batch_dim(options, input, batch_dim)
        states = self._states(hx, input, 1, 2)
        y, *ends, of_layers = self._run(input.unsqueeze(batch_dim), None, states, options, record)
        ends = [end.squeeze(1) for end in ends]
        return self._formed(y, ends, of_layers, lambda tensor: tensor.squeeze(batch_dim))

    def _formed(self, y: Tensor, ends: list[Tensor], of_layers: Any, form: Callable[[Tensor], Any]) -> tuple[Any, ...]:
        """What forward() returns, what has all steps in the form of the input."""
        hx = tuple(ends) if self.cell.states else ends[0]
        if of_layers is None:
            return form(y), hx
        return form(y), hx, self.cell.S(*(tuple(map(form, of_state)) for of_state in of_layers))

    def _states(self, hx: Hidden | None, data: Tensor, B: int, dims: int) -> list[Tensor]:
        """h0 and the other states, each (L*D, B, H), of hx in its form of so many dimensions."""
        names = self.cell.S._fields
        given = (None,) * len(names) if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != len(names) or isinstance(hx, Tensor) != (len(names) == 1 and hx is not None):
            form = f"({', '.join(f'{name}0' for name in names)})" if self.cell.states else "h0, a tensor"
            raise ValueError(f"the cell {self.mode} takes hx as {form}, got {type(hx).__name__} of {len(given)}")
        states = []
        for state in given:
            if state is None:
                state = data.new_zeros(self.num_layers * (2 if self.bidirectional else 1), B, self.hidden_size)
            elif state.dim() != dims:
                batched = "batched 3-D" if dims == 3 else "unbatched 2-D"
                raise RuntimeError(f"For {batched} input, hx should also be {dims}-D but got {state.dim()}-D tensor")
            elif dims == 2:
                state = state.unsqueeze(1)
            elif B != 1 and state.shape[1] == 1:
                state = state.expand(-1, B, -1)
            states.append(state)
        return states

    def _run(
        self, data: Tensor, batch_sizes: Tensor | None, hx: list[Tensor], options: dict[str, Any], record: Any
    ) -> tuple[Any, ...]:
        """As layers.run(), of padded or packed input."""
        self.check_input(data, batch_sizes)
        expected = self.get_expected_hidden_size(data, batch_sizes)
        for k, state in enumerate(hx):
            which = f"hidden[{k}]" if self.cell.states else "hidden"
            self.check_hidden_size(state, expected, f"Expected {which} size {{}}, got {{}}")
        batch_first = self.batch_first and batch_sizes is None
        lengths, reset, reset_to = (options[name] for name in ("lengths", "reset", "reset_to"))
        cuts = lengths, reset, reset_to, options["mask"], options["mask_to"]
        lengths, starts, mask = checked(data, batch_first, batch_sizes, *cuts)
        call = CellCall(
            self.cell,
            data,
            tuple(hx),
            self._flat_weights,  # type: ignore[arg-type]
            batch_sizes,
            lengths,
            starts,
            Options(
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                bool(self.bidirectional),
                batch_first,
                reset_to == "hx",
                options["return_states"],
                checked_recompute(self.recompute),
            ),
            record,
        )
        return run(call) if mask is None else masks.run(call, mask, options["mask_to"], run)

    def plan(self, input: Tensor | PackedSequence) -> Plan:
        """Returns the Plan that forward(input) would take here and now, with its reason in words."""
        data = input.data if isinstance(input, PackedSequence) else input
        if isinstance(input, PackedSequence):
            B = int(input.batch_sizes[0])
        else:
            B = 1 if input.dim() == 2 else input.shape[0 if self.batch_first else 1]
        context, D = Context.of(data, *self.parameters()), 2 if self.bidirectional else 1
        sizes = autocast_dtype(data), B, self.hidden_size, data.device
        plan = plan_of(self.cell, context, *sizes, D)
        return replace(plan, chunk=chunk_of(Options(recompute=checked_recompute(self.recompute)), context, *sizes))
