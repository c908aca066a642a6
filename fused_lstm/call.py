"""One call of lstm(): its tensors and its options, as they go from the checks to the path that runs it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Record = Callable[[Tensor, Tensor, Tensor], None]


class Options(NamedTuple):
    """As lstm() takes them; recompute: the steps of a chunk, 0 for none, None: as many as the memory suggests."""

    bias: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    reset_to_hx: bool = False
    return_states: bool = False
    # Not as lstm() has it: True and 1 would be one key of a Route.
    recompute: int | None = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def use_dropout(self) -> bool:
        return bool(self.training and self.dropout > 0 and self.num_layers > 1)


class Call(NamedTuple):
    """The arguments of lstm(), checked; starts: the resets, (T, B) bool.

    h0: (L*D, B, Hout). c0: (L*D, B, H). weights: per layer, then direction, as nn.LSTM lists them.
    scales: as lstm() takes them; where weight_ih is wide, of weight_hh alone.
    """

    input: Tensor
    h0: Tensor
    c0: Tensor
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    starts: Tensor | None
    options: Options
    ieee: bool | None = None
    record: Record | None = None
    scales: list[Tensor] | None = None

    @property
    def hx(self) -> tuple[Tensor, Tensor]:
        return self.h0, self.c0

    def with_hx(self, h0: Tensor, c0: Tensor) -> "Call":
        return self._replace(h0=h0, c0=c0)

    @property
    def P(self) -> int:
        """proj_size, 0 without a projection."""
        return self.h0.shape[2] if len(self.weights) // (self.options.num_layers * self.options.directions) % 2 else 0

    @property
    def steps(self) -> int:
        """T; of a packed sequence its rows."""
        return self.input.shape[1 if self.options.batch_first else 0]

    @property
    def cut(self) -> bool:
        """Whether rows have lengths or resets, or are packed."""
        return self.batch_sizes is not None or self.lengths is not None or self.starts is not None

    def tensors(self) -> list[Tensor]:
        """All that a gradient may be wanted of."""
        return [self.input, self.h0, self.c0, *self.weights]


class States(NamedTuple):
    """The states of all steps, a tensor for each layer.

    y: (T, B, D*Hout) of each layer, before dropout; c: (T, B, D*H), its cells. In the form of the input otherwise.
    """

    y: tuple[Tensor, ...]
    c: tuple[Tensor, ...]


Result = tuple[Tensor, Tensor, Tensor, States | None]  # y, hn, cn, and the States if they are asked for
