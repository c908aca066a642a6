"""A bidirectional tagger on sentences of uneven length: packing them for nn.LSTM, and padded as they are.

    python examples/tagger.py                              # about 20 s on two CPU cores

The tag of a word is whether it also stands earlier or later in the sentence: only both directions together can tell.
nn.LSTM takes

    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    y, hidden = lstm(packed)
    y, _ = pad_packed_sequence(y, total_length=len(x))

which copies the input, sorts it, and waits for the device to hand the lengths to the host. fused_lstm takes

    y, hidden = lstm(x, lengths=lengths)
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm

WORDS = 12


def sentences(B: int, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Words (T, B), their tags (T, B), -100 past a sentence's end, and lengths (B,)."""
    words = torch.randint(0, WORDS, (T, B), generator=generator)
    lengths = torch.randint(2, T + 1, (B,), generator=generator)
    inside = torch.arange(T)[:, None] < lengths
    twice = ((words[:, None] == words[None]) & inside[None]).sum(1) > 1
    return words, twice.long().masked_fill(~inside, -100), lengths


class Tagger(nn.Module):
    def __init__(self, cls: type, H: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.lstm = cls(32, H, num_layers=2, bidirectional=True)
        self.tags = nn.Linear(2 * H, 2)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(words)
        if isinstance(self.lstm, fused_lstm.LSTM):
            y, _ = self.lstm(x, lengths=lengths)
        else:
            packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
            y, _ = pad_packed_sequence(self.lstm(packed)[0], total_length=len(x))
        return self.tags(y)


def train(cls: type, args: argparse.Namespace) -> tuple[list[float], float, float]:
    """Returns the losses, the share of right tags on new sentences, and the seconds."""
    torch.manual_seed(0)
    model = Tagger(cls, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)
    losses, begin = [], time.perf_counter()
    for _ in range(args.updates):
        words, tags, lengths = sentences(args.batch, args.length, generator)
        loss = nn.functional.cross_entropy(model(words, lengths).flatten(0, 1), tags.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    words, tags, lengths = sentences(4 * args.batch, args.length, generator)
    with torch.no_grad():
        right = (model(words, lengths).argmax(-1) == tags)[tags >= 0].float().mean().item()
    return losses, right, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    runs = {"nn.LSTM": train(nn.LSTM, args), "fused_lstm": train(fused_lstm.LSTM, args)}
    for name, (losses, right, seconds) in runs.items():
        print(f"{name:>10}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {right:.1%} of new tags right, {seconds:.1f} s")
    # Roundings grow with every update of the weights: the first ten are held to them, the end to the task.
    pairs = list(zip(runs["nn.LSTM"][0], runs["fused_lstm"][0], strict=True))
    difference = max(abs(a - b) for a, b in pairs[:10])
    agree = difference < 1e-3 and abs(runs["nn.LSTM"][1] - runs["fused_lstm"][1]) < 0.1
    print(f"{'AGREE' if agree else 'DISAGREE'}: the first losses differ by at most {difference:.1e}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
