"""Trains an LSTM in several processes with torch's own DistributedDataParallel.

    torchrun --nproc-per-node=2 examples/train_ddp.py      # on a CPU; with GPUs, a process for each

fused_lstm needs nothing of its own for it: its parameters are nn.LSTM's. The task is to sum the two marked numbers of
each row. The rows of a batch are dealt to the processes, so that any number of them trains on the same batches: rank 0
prints the loss over all rows, which is that of --nproc-per-node=1; at the end every process must hold the same weights.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_lstm


class Adder(nn.Module):
    def __init__(self, H: int) -> None:
        super().__init__()
        self.lstm, self.out = fused_lstm.LSTM(2, H), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[1][0][-1])[:, 0]


def batch(T: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and marks (T, B, 2), two marks a row; and the sum of the marked numbers (B,)."""
    numbers = torch.rand(T, B, generator=generator)
    places = torch.rand(T, B, generator=generator).topk(2, dim=0).indices
    marks = torch.zeros(T, B).scatter_(0, places, 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)


def train(args: argparse.Namespace) -> bool:
    """Returns whether all processes end with the same weights."""
    rank, world, cuda = dist.get_rank(), dist.get_world_size(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = DistributedDataParallel(Adder(args.hidden).to(device))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(args.steps):
        rows, targets = batch(args.length, args.batch, generator)
        x, target = rows[:, rank::world].to(device), targets[rank::world].to(device)
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, args.steps // 5) == 0:
            dist.all_reduce(loss := loss.detach() / world)
            if rank == 0:
                print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    others = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(others, weights)
    return all(torch.equal(weights, other) for other in others)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="rows of all processes together")
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=32)
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch % world:
        parser.error(f"--batch {args.batch} is not the same number of rows for each of {world} processes")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    agree = train(args)  # its model is gone before the process group is, or the process may hang at its end
    if dist.get_rank() == 0:
        print(f"{'AGREE' if agree else 'DISAGREE'}: the weights of {dist.get_world_size()} processes")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
