"""How long a sequence trains in a memory budget: what forward keeps for backward, counted, for four ways to run it.

    python examples/long_sequence.py                       # a few seconds
    python examples/long_sequence.py --hidden 512 --budget 1024 --length 2000

Counted are the bytes of every tensor that a forward pass leaves for the backward pass, input and output included and
the weights not. Ours are counted on fake tensors, which have sizes and no memory: the sizes are those of a GPU. What
nn.LSTM keeps is that of torch's CPU path; cuDNN has a reserve of its own. Then all four run and must agree.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import nullcontext

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TRITON_INTERPRET"] = "1"  # the kernels' path, also without a GPU

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fused_lstm

CHUNK = 128
Run = Callable[[Tensor, list[Tensor]], Tensor]


def plain(lstm: nn.Module) -> Run:
    return lambda x, held: lstm(x)[0]


def checkpointed(lstm: nn.Module) -> Run:
    """nn.LSTM on one chunk after the other, each under torch.utils.checkpoint."""

    def run(x: Tensor, held: list[Tensor]) -> Tensor:
        count = lstm.num_layers, x.shape[1], lstm.hidden_size
        hx, outputs = (x.new_zeros(count), x.new_zeros(count)), []
        for part in x.split(CHUNK):
            held += [part, *hx]  # checkpoint() holds its arguments itself, where no hook sees them
            y, hx = checkpoint(lstm, part, hx, use_reentrant=False)
            outputs.append(y)
        return torch.cat(outputs)

    return run


def kept(run: Run, T: int, args: argparse.Namespace, weights: list[nn.Parameter]) -> int:
    """The bytes that a forward pass over T steps keeps, input and output included."""
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    x = torch.empty(T, args.batch, args.hidden, dtype=weights[0].dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x, held)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (x, y, *held)}
    return sum(storages.values()) - sum(storages.get(w.untyped_storage()._cdata, 0) for w in weights)


def longest(of: Callable[[int], int], budget: int) -> int:
    """The longest T, by doubling, that keeps no more than the budget; 0 if one step is too much."""
    T = 0
    while of(max(1, 2 * T)) <= budget:
        T = max(1, 2 * T)
    return T


def ways(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[Run, nn.Module]]:
    """Four modules with the same weights, and how each is run."""
    torch.manual_seed(0)
    theirs = [nn.LSTM(args.hidden, args.hidden, args.layers, dtype=dtype) for _ in range(2)]
    ours = [fused_lstm.LSTM(args.hidden, args.hidden, args.layers, dtype=dtype, recompute=r) for r in (False, CHUNK)]
    modules: list[nn.Module] = [*theirs, *ours]
    for module in modules[1:]:
        module.load_state_dict(theirs[0].state_dict())
    names = "nn.LSTM", "nn.LSTM, checkpointed", "fused_lstm.LSTM", "fused_lstm.LSTM, recompute"
    runs = [plain(modules[0]), checkpointed(modules[1]), plain(modules[2]), plain(modules[3])]
    return dict(zip(names, zip(runs, modules, strict=True), strict=True))


def difference(args: argparse.Namespace) -> float:
    """The largest between the gradients of nn.LSTM and of the others over some chunks, in float64 and by their size."""
    small = argparse.Namespace(hidden=4, layers=args.layers, batch=2)
    x, grads = torch.randn(2 * CHUNK + 1, 2, 4, dtype=torch.float64), []
    for run, module in ways(small, torch.float64).values():
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        grads.append(torch.autograd.grad(run(leaves[0], []).square().sum(), leaves))
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for own in grads[1:] for a, b in zip(own, grads[0], strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=int, default=64, help="MiB")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--length", type=int, default=2000, help="also says what so many steps keep")
    args = parser.parse_args()
    found = {}
    for name in ways(args, torch.bfloat16):
        # oneDNN, behind nn.LSTM here, knows what it keeps when it runs, and not before.
        with FakeTensorMode() if name.startswith("fused_lstm") else nullcontext():
            run, module = ways(args, torch.bfloat16)[name]
            weights = list(module.parameters())
            found[name] = longest(lambda T, run=run, weights=weights: kept(run, T, args, weights), args.budget << 20)
            size = kept(run, args.length, args, weights) / 2**20
        print(f"{name:>27}: T {args.length} keeps {size:7.1f} MiB; {args.budget} MiB train T {found[name]}")
    off = difference(args)
    good = off < 1e-10 and found["fused_lstm.LSTM, recompute"] >= 2 * found["fused_lstm.LSTM"]
    print(
        f"{'AGREE' if good else 'DISAGREE'}: gradients at most {off:.1e} of the largest from nn.LSTM's; recompute "
        f"trains {found['fused_lstm.LSTM, recompute']} steps, the default {found['fused_lstm.LSTM']}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
