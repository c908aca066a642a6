"""The layouts of the kernels' and the reference's links: dense, packed, padded rows of several lengths, resets, and the
steps of a row beside each other."""

import torch

from fused_lstm.kernels.layout import DENSE, Layout
from fused_lstm.sequence import Sequence

NAMES = ("dense", "packed", "lengths", "reset", "lengths and reset", "rows first, lengths and reset")


def layout_of(name, T, B, device="cpu"):
    """Returns a layout and the leading sizes of its tensors; the same at every call."""
    generator = torch.Generator().manual_seed(T * 100 + B)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    starts = torch.rand(T, B, generator=generator) < 0.4
    if name == "dense":
        return DENSE, (T, B)
    if name == "packed":
        lengths = lengths.clamp(min=1).sort(descending=True).values
        lengths[0] = T
        batch_sizes = torch.stack([(lengths > t).sum() for t in range(T)])
        return Sequence.packed(batch_sizes, torch.device(device)).layout, (int(batch_sizes.sum()),)
    first = "rows first" in name
    starts = (starts.T.contiguous() if first else starts).to(device) if "reset" in name else None
    return Layout(lengths.to(device) if "lengths" in name else None, None, starts, first), (B, T) if first else (T, B)
