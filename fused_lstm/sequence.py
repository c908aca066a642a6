"""Where the steps of a direction lie among the rows of a sequence, and which belong together."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.layout import Layout
from .records import record

Rows = slice | Tensor


@record
class Sequence(NamedTuple):
    """Where the steps of one direction lie among the rows of the flattened (rows, features) sequence.

    It holds tensors and flags alone, no sizes: torch.compile would take those for constants.

    lengths, offsets, starts: the layout of the kernels.
    last: the rows of each batch row's last step in time, where they are not the last B rows; of a batch row without
        steps some row that no kernel touches.
    prev_step_rows: the rows of the step before that of each row from B on, where it is not B rows before.
    reverse: the direction runs from the last step to the first.
    reset_to_hx: at layout.starts the state becomes hx; otherwise zero.
    batch_first: the sequence is (B, T, features), starts are (B, T), and the rows follow each other so.
    """

    lengths: Tensor | None = None
    offsets: Tensor | None = None
    starts: Tensor | None = None
    last: Tensor | None = None
    prev_step_rows: Tensor | None = None
    reverse: bool = False
    reset_to_hx: bool = False
    batch_first: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.lengths, self.offsets, self.starts, self.batch_first)

    @staticmethod
    def padded(layout: Layout, reset_to_hx: bool, T: int) -> "Sequence":
        """layout: with lengths (B,) and starts (T, B), or (B, T) if it is so, if any."""
        lengths, _, starts, batch_first = layout
        whole = Sequence(lengths, None, starts, reset_to_hx=reset_to_hx, batch_first=batch_first)
        if lengths is None:
            return whole
        B = lengths.shape[0]
        step_stride, row_stride = layout.strides(T, B)
        last = (lengths - 1).clamp(min=0) * step_stride + torch.arange(B, device=lengths.device) * row_stride
        return whole._replace(last=last)

    @staticmethod
    def packed(batch_sizes: Tensor, device: torch.device) -> "Sequence":
        """batch_sizes: (T,) int64 on the CPU, as in a PackedSequence."""
        B = int(batch_sizes[0])
        offsets = batch_sizes.cumsum(0) - batch_sizes
        # Step t has batch_sizes[t] - batch_sizes[t + 1] rows more than the next: so many sequences end with it.
        ended = torch.diff(batch_sizes, append=batch_sizes.new_zeros(1)).neg()
        lengths = torch.arange(1, len(batch_sizes) + 1).repeat_interleave(ended).flip(0)
        last = offsets[lengths - 1] + torch.arange(B)
        prev = torch.arange(B, int(batch_sizes.sum())) - batch_sizes[:-1].repeat_interleave(batch_sizes[1:])
        lengths, offsets, last, prev = (index.to(device) for index in (lengths, offsets, last, prev))
        return Sequence(lengths, offsets, None, last, prev)

    def reversed(self) -> "Sequence":
        """The other direction over the same rows: what is cut before a step in one is cut after it in the other."""
        starts = self.starts
        if starts is not None:
            # With time in front, whichever way it lies.
            starts = starts.T if self.batch_first else starts
            starts = torch.cat([starts[1:], torch.zeros_like(starts[:1])])
            if self.lengths is not None:
                following = torch.arange(1, len(starts) + 1, device=starts.device)[:, None]
                starts &= following < self.lengths
            starts = starts.T.contiguous() if self.batch_first else starts
        return self._replace(starts=starts, reverse=not self.reverse)

    def time_first(self, T: int) -> "Sequence":
        """The same of T steps with batch_first off, for a view of what it lays out."""
        starts = None if self.starts is None else self.starts.T
        sequence = Sequence.padded(Layout(self.lengths, None, starts), self.reset_to_hx, T)
        return sequence._replace(reverse=self.reverse)

    def per_direction(self, directions: int) -> list["Sequence"]:
        """The Sequence of each direction; this is the first's."""
        return [self] if directions == 1 else [self, self.reversed()]

    def step_rows(self, B: int, rows: int) -> tuple[Rows, Rows, Rows, Rows]:
        """Rows of the flattened sequence, which has so many, of B batch rows: those of their first steps in the
        direction's order, of their last ones, of all steps but the first, and of the step before each of those. With
        batch_first the first steps are among the latter two, and what stands before them is another batch row's."""
        first: Rows
        last: Rows
        previous: Rows
        if self.batch_first:
            first, last = slice(0, rows, rows // B), slice(rows // B - 1, rows, rows // B)
            later, previous = slice(1, rows), slice(rows - 1)
        else:
            first, last = slice(B), slice(rows - B, rows)
            later, previous = slice(B, rows), slice(rows - B) if self.prev_step_rows is None else self.prev_step_rows
        last = last if self.last is None else self.last
        return (last, first, previous, later) if self.reverse else (first, last, later, previous)

    def chunks(self, T: int, B: int, rows: int, length: int) -> Iterator[tuple["Sequence", slice, int]]:
        """Cuts T steps into chunks of `length` steps, in the direction's order: yields each as a Sequence of its own,
        where it lies in the first dimension of the whole, and how many batch rows it has."""
        begins = range(0, T, length)
        # Where packed steps lie has to be asked for, once.
        firsts = [] if self.offsets is None else [*self.offsets.tolist(), rows]
        for k in reversed(range(len(begins))) if self.reverse else range(len(begins)):
            begin, end = begins[k], min(begins[k] + length, T)
            lengths = None if self.lengths is None else (self.lengths - begin).clamp(0, end - begin)
            if self.offsets is None or self.prev_step_rows is None or lengths is None:
                starts = None if self.starts is None else self.starts[begin:end]
                chunk = Sequence.padded(Layout(lengths, None, starts), self.reset_to_hx, end - begin)
                yield chunk._replace(reverse=self.reverse), slice(begin, end), B
                continue
            first, last, present = firsts[begin], firsts[end], firsts[begin + 1] - firsts[begin]
            lengths, steps = lengths[:present], self.offsets[begin:end] - first
            ends = steps[lengths - 1] + torch.arange(present, device=steps.device)
            prev = self.prev_step_rows[first + present - B : last - B] - first
            yield Sequence(lengths, steps, None, ends, prev, self.reverse), slice(first, last), present

    def without_steps(self) -> Tensor | None:
        """(B, 1) bool, the batch rows of no step at all; None where there are none."""
        return (self.lengths == 0)[:, None] if self.lengths is not None and self.offsets is None else None
