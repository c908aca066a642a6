"""How far kernels/model.py is from bench.simulate, over all tiles that an H100 can have and not just the chosen ones.

`python -m bench.fit` compiles them for some sizes, simulates a step of each in its first launch, and prints for each
function of the model how far it is off, by what its terms would have to be multiplied to fit best, and its worst rows;
then where the tiles that it chooses are not the fastest by simulation, all launches counted.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import correlation

import torch

from fused_lstm.kernels import model
from fused_lstm.kernels.choice import candidates, choose_kernel
from fused_lstm.kernels.tiles import H100, Problem, Tiles, ceil_div, programs_of

from .offline import DTYPES, KERNELS, Row, compile_kernel
from .simulate import simulate_plan

TERMS = model.terms_for(H100)


def simulated(dtypes: Iterable[str], sizes: Iterable[int], batches: list[int], layers: int) -> Iterator[Row]:
    """A row for each tile and each number of rows that its first launch has of these batches."""
    for dtype, H in product(dtypes, sizes):
        torch_dtype, ieee = DTYPES[dtype]
        chosen = choose_kernel(torch_dtype, 1, H, H100, ieee, 1, layers)
        problems = (Problem(dtype, H, name == "backward", 1, layers) for name in KERNELS)
        every = [candidates(chosen.mode, problem, H100) for problem in problems]
        for name, found in zip(KERNELS, every, strict=True):
            for tiles in found:
                plan = replace(chosen, forward=tiles, backward=tiles)
                kernel = compile_kernel(name, plan, H, torch_dtype, H100)
                row = {"dtype": dtype, "kernel": name, "mode": plan.mode, "H": H, "layers": layers}
                row["tiles"] = vars(tiles)
                for B in of_first_launch(row, batches):
                    timing, why = simulate_plan(kernel, name, plan, H, B)
                    yield row | {"B": B} | ({"cycles": timing.cycles} if timing else {"not_simulated": why})


def at_once(row: Row) -> int:
    """The batch groups of a launch."""
    blocks, _ = programs_of(Tiles(**row["tiles"]), row["H"], 1)
    return max(1, H100.multiprocessors // (row["layers"] * blocks))


def of_first_launch(row: Row, batches: Iterable[int]) -> list[int]:
    """The numbers of rows that a first launch has of these batches, less those that its tiles are not for."""
    tiles = Tiles(**row["tiles"])
    least = tiles.batch if tiles.in_turn else 1
    return sorted({min(B, at_once(row) * tiles.batch) for B in batches if least <= B})


def predicted(row: Row, B: int) -> float:
    """The model's cycles of B rows, of all launches."""
    return model.step(TERMS, row["mode"], Tiles(**row["tiles"]), problem_of(row), B).us * TERMS.clock


def problem_of(row: Row) -> Problem:
    return Problem(row["dtype"], row["H"], row["kernel"] == "backward", 1, row["layers"])


def terms(row: Row) -> dict[str, float]:
    """The model's cycles of a row, by term."""
    tiles, layers = Tiles(**row["tiles"]), row["layers"]
    blocks, groups = programs_of(tiles, row["H"], row["B"])
    return model.of_launch(TERMS, row["mode"], tiles, problem_of(row), row["B"], layers * blocks * groups)


def function(row: Row) -> str:
    """The name of the function of the model that a row is for."""
    if row["mode"] == "local":
        return "few_units"
    if row["tiles"]["part"]:
        return "in_turn"
    return "few_rows" if row["tiles"]["poll"] else "behind_flags"


def ranks(values: list[float]) -> list[int]:
    places = sorted(range(len(values)), key=values.__getitem__)
    return sorted(range(len(values)), key=places.__getitem__)


def described(row: Row) -> str:
    tiles = " ".join(f"{name} {value}" for name, value in row["tiles"].items() if value not in (0, False))
    return f"{row['dtype']} {row['kernel']} H {row['H']} layers {row['layers']} B {row['B']}: {tiles}"


def errors(name: str, rows: list[Row], worst: int) -> None:
    """Prints how far a function of the model is off."""
    off = sorted((abs(predicted(row, row["B"]) / row["cycles"] - 1), at) for at, row in enumerate(rows))
    median, most = off[len(rows) // 2][0], off[len(rows) * 9 // 10][0]
    rank = correlation(ranks([predicted(row, row["B"]) for row in rows]), ranks([row["cycles"] for row in rows]))
    print(f"{name}: {len(rows)} rows, off by {median:.0%} in the median, {most:.0%} at nine of ten,", end=" ")
    print(f"{off[-1][0]:.0%} at most; rank correlation {rank:.2f}")
    found = [terms(row) for row in rows]
    names = list(dict.fromkeys(name for each in found for name in each))
    shares = torch.tensor(
        [[each.get(name, 0) / row["cycles"] for name in names] for each, row in zip(found, rows, strict=True)]
    )
    factors = torch.linalg.lstsq(shares, torch.ones(len(rows), 1), driver="gelsd").solution[:, 0]
    print("  best times", ", ".join(f"{name} {factor:.2f}" for name, factor in zip(names, factors, strict=True)))
    for _, at in off[: -worst - 1 : -1]:
        print(f"  {predicted(rows[at], rows[at]['B']):.0f} cycles for {rows[at]['cycles']:.0f}: {described(rows[at])}")


def regrets(rows: list[Row], batches: list[int], worst: int) -> None:
    """Prints where a choice by the model takes longer than the best tiles."""
    shapes = defaultdict(list)
    for row, B in product(rows, batches):
        of_launch = at_once(row) * row["tiles"]["batch"]
        if row["B"] == min(B, of_launch):
            all_launches = ceil_div(B, of_launch) * row["cycles"]
            shape = row["dtype"], row["kernel"], row["H"], row["layers"], B
            shapes[shape].append((predicted(row, B), all_launches, described(row | {"B": B})))
    found = []
    for each in shapes.values():
        chosen, best = min(each), min(each, key=lambda one: one[1])
        found.append((chosen[1] / best[1], f"{chosen[1]:.0f} cycles, {chosen[2]}\n    {best[1]:.0f} by {best[2]}"))
    found.sort(reverse=True)
    print(f"{len(found)} choices, of which {sum(one[0] > 1.25 for one in found)} take more than 1.25 times the least")
    print(*(f"  {times:.2f} times: {which}" for times, which in found[:worst]), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the model of a step with its simulation.")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16", "tf32", "fp32"])
    parser.add_argument("--H", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--B", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--layers", type=int, default=1, help="in one launch")
    parser.add_argument("--save", type=Path, help="add the rows to this file")
    parser.add_argument("--load", type=Path, help="take the rows of this file instead of simulating")
    parser.add_argument("--worst", type=int, default=5, help="rows to print of each")
    args = parser.parse_args()
    rows = []
    if args.load:
        rows = [json.loads(line) for line in args.load.read_text(encoding="utf-8").splitlines()]
    else:
        for row in simulated(args.dtype, args.H, args.B, args.layers):
            rows.append(row)
            if args.save:
                with args.save.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    rows = [row for row in rows if "cycles" in row]
    of_function = defaultdict(list)
    for row in rows:
        of_function[function(row)].append(row)
    for name, found in of_function.items():
        errors(name, found, args.worst)
    regrets(rows, args.B, args.worst)


if __name__ == "__main__":
    main()
