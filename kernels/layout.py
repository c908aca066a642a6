"""Where a sequence lies among the rows of a tensor, and what leads from layer to layer: what every launcher takes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of the cell state and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layout(NamedTuple):
    """Where sequences lie among the rows of a tensor and where they begin, in the order of their direction.

    lengths: (B,) int64, steps of each batch row; None: every row has all T.
    offsets: (T,) int64, first row of each step of a packed sequence, whose rows are sorted as torch packs them; None: B
        rows a step.
    starts: (rows,) bool, the steps before which the state is set to the reset state, of two directions (2, rows); None:
        none.
    batch_first: the steps of a batch row lie together, (B, T, ...), not packed; otherwise (T, B, ...).
    """

    lengths: Tensor | None = None
    offsets: Tensor | None = None
    starts: Tensor | None = None
    batch_first: bool = False

    def strides(self, T: int, B: int) -> tuple[int, int]:
        """How many rows on the next step of the same batch row lies, if not packed, and the next batch row."""
        return (1, T) if self.batch_first else (B, 1)

    def steps(self, shape: torch.Size) -> int:
        """T of a tensor of so many steps and features."""
        return shape[1 if self.batch_first else 0] if self.offsets is None else self.offsets.shape[0]

    def of_direction(self, d: int) -> "Layout":
        """That of one direction, where both have starts of their own."""
        both = self.starts is not None and self.starts.dim() == 3
        return self._replace(starts=self.starts[d]) if both else self

    @property
    def padded(self) -> bool:
        """Rows of several lengths in a tensor that has all T steps of each."""
        return self.lengths is not None and self.offsets is None

    def past(self, shape: torch.Size) -> Tensor:
        """(T, B, 1) bool, or (B, T, 1), the steps past each row's length, of padded rows and so many features."""
        time = torch.arange(shape[-2 if self.batch_first else -3], device=self.lengths.device)
        past = time[:, None] >= self.lengths
        return (past.T if self.batch_first else past)[..., None]

    @property
    def tensors(self) -> "LayoutTensors":
        """What a kernel takes of it; the order of batch rows only where it is not their own."""
        order = self.lengths.argsort(descending=True) if self.lengths is not None and self.offsets is None else None
        return LayoutTensors(self.lengths, self.offsets, self.starts, order)


class LayoutTensors(NamedTuple):
    """A Layout's tensors, as the kernels take them; what is None compiles away.

    order: (B,) int64, the order in which padded batch rows are dealt to programs, the longest first: a program ends
        with the longest of its rows, so rows of like lengths go together.
    """

    lengths: Tensor | None
    offsets: Tensor | None
    starts: Tensor | None
    order: Tensor | None


DENSE = Layout()  # T steps of B rows


class Stack(NamedTuple):
    """What leads from a layer to the next where several run in one launch.

    weight_ih: (L - 1, 4H, H), of the layers above the first. bias: (L - 1, 4H), the sum of both, of the same.
    seed: (1,) int64, of the dropout between the layers; None: no dropout. keep: (1,) in the accumulator's dtype, the
        share of units that it keeps.
    """

    weight_ih: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None
    keep: Tensor | None = None


NO_STACK = Stack()  # one layer


class StepWeights(NamedTuple):
    """Of each layer and direction, layer by layer: weight_ih (4H, I or D*O), weight_hh (4H, O), bias_ih and bias_hh
    (4H), weight_hr (P, H) of a projection; O is P with one, H without. All contiguous, and of one dtype; but weight_ih
    and weight_hh may have 8 bits, and then scale_ih and scale_hh (4H) say what a 1 in each row stands for."""

    weight_ih: tuple[Tensor, ...]
    weight_hh: tuple[Tensor, ...]
    bias_ih: tuple[Tensor, ...] | None
    bias_hh: tuple[Tensor, ...] | None
    weight_hr: tuple[Tensor, ...] | None
    scale_ih: tuple[Tensor, ...] | None = None
    scale_hh: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, recurrences: Iterable[tuple[Tensor | None, ...]], scales: Sequence[Tensor] = ()) -> "StepWeights":
        """Of the first five of each layer and direction; scales: of weight_ih and weight_hh of each, if they have 8
        bits."""
        columns = zip(*recurrences, strict=True)
        of_all = [None if column[0] is None else tuple(weight.contiguous() for weight in column) for column in columns]
        of_rows = [tuple(scale.contiguous() for scale in scales[k::2]) or None for k in range(2)]
        return cls(*of_all, *of_rows)  # type: ignore[arg-type]

    def part(self, first: int, end: int) -> "StepWeights":
        """Those of some of the layers and directions."""
        return StepWeights(*(None if each is None else each[first:end] for each in self))  # type: ignore[arg-type]


def words(x: Tensor) -> Tensor:
    """The same memory as integers, of which -1 is the SENTINEL."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
