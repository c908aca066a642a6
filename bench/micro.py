"""Small kernels that measure one term of the design each; bench.lab runs them.

A part has a function that yields what it measures as (name, params), and one that measures it: that first holds the
result to what it must be, then returns the times in microseconds, the value and its unit. A wrong result raises Wrong;
where a call ends in any case, with its time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from fused_lstm.kernels.cell import exp, sigmoid, tanh
from fused_lstm.kernels.matmul import dot, load_columns, operand, widened
from fused_lstm.kernels.plan import choose_kernel, cuda_device
from fused_lstm.kernels.sync import publish, wait
from fused_lstm.kernels.tiles import H100, Device

from .cases import DTYPES
from .timing import Times, alternate, graphed, on_host

# Turns of a spin before it gives up: a second or so, where a wait takes a few turns.
MAX_SPINS = 1_000_000
# Two slots of h serve all steps: a program writes the one of step s + 2 only after it has seen step s + 1 complete, and
# every program wrote its part of that after reading step s.


@triton.jit(do_not_specialize=["steps"])
def counter_kernel(
    flags,  # (steps,) in/out: step flags, zero at launch
    timeout_info,  # (4,) out: who waited in vain
    steps,
    MAX_SPINS: tl.constexpr,  # bound of a wait
):
    for step in range(steps):
        publish(flags + step)
        wait(flags + step, tl.num_programs(0), step, timeout_info, MAX_SPINS)


@triton.jit(do_not_specialize=["steps"])
def poll_kernel(
    h,  # (2, B, H) in/out: 16-bit patterns of h, steps by turns; tagged 1 at launch
    timeout_info,  # (4,) out: who waited in vain
    steps,
    B: tl.constexpr,
    H: tl.constexpr,
    MAX_SPINS: tl.constexpr,  # bound of all waits together
    BLOCK_H: tl.constexpr,  # hidden units of a program
    WIDTH: tl.constexpr,  # H, rounded up to a power of two
):
    # |h| <= 1 leaves the top bit of a float's exponent free: it tells this step's h from the one two steps before.
    TAG: tl.constexpr = 0x4000
    rows = tl.arange(0, B)[:, None] * H
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    columns = tl.arange(0, WIDTH)[None, :]
    turns = 0
    for step in range(steps):
        slot = h + step % 2 * (B * H)
        tag = tl.cast(step // 2 % 2 * TAG, tl.int16)
        tl.store(slot + rows + units, tag)
        missing = 1
        while (missing > 0) & (turns < MAX_SPINS):
            # Volatile: from L2, and again at each turn. An element that carries the tag is of this step: no fence.
            seen = tl.load(slot + rows + columns, mask=columns < H, other=tag, volatile=True)
            missing = tl.max(tl.max(((seen & TAG) != tag).to(tl.int32), axis=1), axis=0)
            turns += 1
        if missing > 0:  # noqa: SIM102 (`and` would perform the exchange in any case)
            if tl.atomic_cas(timeout_info, 0, 1) == 0:
                tl.store(timeout_info + 1, tl.program_id(0))
                tl.store(timeout_info + 3, step)


@triton.jit(do_not_specialize=["steps"])
def broadcast_kernel(
    h,  # (2, B, H) in/out: h, steps by turns: 1 in even steps, 2 in odd ones
    total,  # (programs,) out: sum of all that a program has read
    flags,  # (steps,) in/out: step flags, zero at launch
    timeout_info,  # (4,) out: who waited in vain
    steps,
    B: tl.constexpr,
    H: tl.constexpr,
    MAX_SPINS: tl.constexpr,  # bound of a wait
    READ: tl.constexpr,  # read h; without, the rest of a step remains
    BLOCK_B: tl.constexpr,  # B, rounded up to a tile
    BLOCK_H: tl.constexpr,  # hidden units of a program
    BLOCK_K: tl.constexpr,  # units of h in one load
):
    rows = tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (units < H)[:, None] & (rows < B)[None, :]
    sum = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for step in range(steps):
        slot = h + step % 2 * (B * H)
        own = (tl.zeros((BLOCK_H, BLOCK_B), tl.float32) + 1 + step % 2).to(h.dtype.element_ty)
        tl.store(slot + rows[None, :] * H + units[:, None], own, mask=mask)
        publish(flags + step)
        wait(flags + step, tl.num_programs(0), step, timeout_info, MAX_SPINS)
        if READ:
            for k in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
                sum += load_columns(slot + rows * H, rows < B, k, H, BLOCK_K)
    tl.store(total + tl.program_id(0), tl.sum(sum))


@triton.jit
def increment_kernel(
    x,  # (1,) in/out
):
    tl.store(x, tl.load(x) + 1)


@triton.jit
def function_kernel(
    x,  # (programs * BLOCK,) in: float32 arguments
    divisor,  # as x, in
    y,  # as x, out
    NAME: tl.constexpr,  # a key of FUNCTIONS
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + places)
    if NAME == "exp2":
        value = tl.exp2(value)
    elif NAME == "divide":
        value = value / tl.load(divisor + places)
    elif NAME == "exp":
        value = exp(value)
    elif NAME == "sigmoid":
        value = sigmoid(value)
    else:
        value = tanh(value)
    tl.store(y + places, value)


@triton.jit(do_not_specialize=["steps"])
def matrix_kernel(
    weight,  # (ROWS, CHUNKS * BLOCK_K) in: the same for every program
    x,  # (BLOCK_B, BLOCK_K) in
    out,  # (programs, ROWS, BLOCK_B) out: see settled()
    steps,
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    ROWS: tl.constexpr,  # forward: 4 gates of each of the program's units; backward: its units
    CHUNKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    batch = tl.arange(0, BLOCK_B)
    k_units = tl.arange(0, BLOCK_K)
    weights = ()
    for k in tl.static_range(CHUNKS):
        columns = k * BLOCK_K + k_units
        chunk = tl.load(weight + rows[:, None] * (CHUNKS * BLOCK_K) + columns[None, :])
        weights = weights + (operand(chunk, PRECISION),)  # noqa: RUF005
    x_tile = widened(tl.load(x + batch[None, :] * BLOCK_K + k_units[:, None]))
    sum = tl.zeros((ROWS, BLOCK_B), tl.float32)
    for _ in range(steps):
        # As in the recurrence, a step ends where its sum is used, and the next one's x is another: else the compiler
        # would take products out of the loop.
        sum *= 0.5
        x_tile = -x_tile
        for k in tl.static_range(CHUNKS):
            sum = dot(weights[k], x_tile, sum, PRECISION)
    tl.store(out + (tl.program_id(0) * ROWS + rows[:, None]) * BLOCK_B + batch[None, :], sum)


@dataclass(frozen=True)
class Lab:
    """Where it is measured: a CUDA device, or for a dry run the CPU; `seconds` go into one row."""

    device: torch.device
    seconds: float = 0.3

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def hardware(self) -> Device:
        """What the plans depend on."""
        return H100 if self.dry else cuda_device(self.device)

    @property
    def programs(self) -> list[int]:
        """How many programs work together: a quarter, half and all of the multiprocessors.

        One in a dry run: the interpreter runs programs one after another, and a second would be waited for in vain.
        """
        if self.dry:
            return [1]
        every = self.hardware.multiprocessors
        return [every // 4, every // 2, every]

    def zeros(self, *size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def steps(self, many: int) -> int:
        return 4 if self.dry else many

    def slope(
        self,
        call: Callable[[int], object],
        steps: int,
        less: Callable[[int], object] | None = None,
        hold: bool = True,
    ) -> Times:
        """Times in microseconds of one more step of call(steps), without that of less(steps) if given.

        Two lengths are timed by turns: what is not a step (launch, memset, loading of W_hh) falls out. hold: the host's
        time for its launches, too.
        """
        short = max(1, steps // 4)
        calls = {"long": partial(call, steps), "short": partial(call, short)}
        if less is not None:
            calls |= {"less long": partial(less, steps), "less short": partial(less, short)}
        times = alternate(calls, self.device, self.seconds, on_host(calls, self.device) if hold else {})
        rest = times["short"].median
        if less is not None:
            rest += times["less long"].median - times["less short"].median
        long = times["long"]
        us = [1e3 * (reading - rest) / (steps - short) for reading in (long.median, long.q20, long.q80)]
        if us[0] <= 0 and not self.dry:
            raise RuntimeError(f"{us[0]:.3g} us a step: lost in the noise")
        return Times(*us, long.rounds)


Measured = tuple[Times, float, str]  # and the value with its unit


class Wrong(Exception):
    """A result that is not what it must be; with what it took all the same, where it could be timed."""

    def __init__(self, why: str, measured: Measured | None = None) -> None:
        super().__init__(why)
        self.measured = measured


def timed(wrong: str, measure: Callable[[], Measured]) -> Measured:
    """Measures a call that ends, right or wrong; raises Wrong, with what it took, if `wrong` says what is not right."""
    try:
        measured = measure()
    except Exception as error:
        if wrong:
            raise Wrong(f"{wrong}; not timed: {type(error).__name__}: {error}") from None
        raise
    if wrong:
        raise Wrong(wrong, measured)
    return measured


def heard(timeout_info: torch.Tensor) -> None:
    """Raises Wrong if a program has waited in vain."""
    stuck, program, _, step = timeout_info.tolist()
    if stuck:
        raise Wrong(f"program {program} waited in vain at step {step}")


# By name: the function in float64, and the intervals whose floats it gets. Of ex2.approx and div.full PTX's tables say
# at most 2 ulp each; the others are what the cell makes of them. Not so far down that a result is denormal.
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[float, float]]]] = {
    "exp2": (torch.exp2, [(-2, -1), (-32, -1 / 32)]),
    "divide": (torch.divide, [(1, 2)]),
    "exp": (torch.exp, [(-2, -1), (-32, -1 / 32)]),
    "sigmoid": (torch.sigmoid, [(-16, -1 / 32), (1 / 32, 16)]),
    "tanh": (torch.tanh, [(1 / 32, 1 / 4), (1 / 4, 16)]),
}


def floats(low: float, high: float, count: int, device: torch.device) -> torch.Tensor:
    """`count` float32 between two bounds of one sign, as dense as float32 itself in each binade: at 2**23 all floats of
    one."""
    bits = torch.tensor([low, high], dtype=torch.float32).view(torch.int32).sort().values.tolist()
    step = (bits[1] - bits[0]) / count
    places = (torch.arange(count, dtype=torch.float64, device=device) * step).long() + bits[0]
    return places.to(torch.int32).view(torch.float32)


def ulps(result: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """The error of a float32 result in units of the last place that float32 gives gold (float64); no denormals."""
    return (result.double() - gold).abs() / torch.ldexp(torch.ones_like(gold), torch.frexp(gold).exponent - 24)


def functions_items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (_, intervals) in FUNCTIONS.items():
        for low, high in intervals:
            yield name, {"from": low, "to": high, "count": 256 if lab.dry else 2**23}


def functions(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    count, BLOCK = params["count"], 256 if lab.dry else 1024
    x = divisor = floats(params["from"], params["to"], count, lab.device)
    y, exact = torch.full_like(x, torch.nan), FUNCTIONS[name][0]
    if name == "divide":
        # Every divisor of a binade once, each with another dividend, from one end of it to the other.
        x = divisor[(torch.arange(count, device=lab.device) * 5_000_011) % count]

    def call() -> None:
        function_kernel[(count // BLOCK,)](x, divisor, y, NAME=name, BLOCK=BLOCK, num_warps=4)

    call()
    gold = exact(x.double(), divisor.double()) if name == "divide" else exact(x.double())
    largest = ulps(y, gold).max().item()
    if not largest < 1000:  # also NaN
        raise Wrong(f"{name} is off by {largest:.3g} ulp")
    times = alternate({name: call}, lab.device, lab.seconds, on_host({name: call}, lab.device))[name]
    us = Times(1e3 * times.median, 1e3 * times.q20, 1e3 * times.q80, times.rounds)
    return us, largest, "ulp"


def exchange_items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    for N in lab.programs:
        yield "counter", {"N": N}
        for B in (1, 2 if lab.dry else 16):
            yield "poll", {"N": N, "B": B, "units": 8}


def exchange(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    N, steps = params["N"], lab.steps(1000)
    flags, timeout_info = lab.zeros(steps), lab.zeros(4)
    if name == "counter":

        def call(steps: int) -> None:
            flags.zero_()
            counter_kernel[(N,)](
                flags, timeout_info, steps, MAX_SPINS=MAX_SPINS, num_warps=4, launch_cooperative_grid=True
            )

        call(steps)
        right = bool((flags == N).all())
    else:
        B, BLOCK_H = params["B"], params["units"]
        H = BLOCK_H * N
        h = lab.zeros(2, B, H, dtype=torch.int16)
        sizes = {"B": B, "H": H, "MAX_SPINS": MAX_SPINS, "BLOCK_H": BLOCK_H, "WIDTH": triton.next_power_of_2(H)}

        def call(steps: int) -> None:
            h.fill_(0x4000)
            poll_kernel[(N,)](h, timeout_info, steps, **sizes, num_warps=8, launch_cooperative_grid=True)

        call(2)
        right = bool((h == 0).all())
    heard(timeout_info)
    if not right:
        raise Wrong("not every program has taken part in every step")
    times = lab.slope(call, steps)
    heard(timeout_info)
    return times, times.median, "us a step"


def broadcast_items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    for N, H, B in product(lab.programs, (8, 32) if lab.dry else (1024, 256), (1, 2) if lab.dry else (64, 16, 1)):
        yield "read", {"N": N, "H": H, "B": B, "bytes": N * H * B * 2}


def broadcast(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    N, H, B, steps = params["N"], params["H"], params["B"], lab.steps(500)
    h, total = lab.zeros(2, B, H, dtype=torch.float16), lab.zeros(N, dtype=torch.float32)
    flags, timeout_info = lab.zeros(steps), lab.zeros(4)
    tiles = {"BLOCK_B": max(16, B), "BLOCK_H": triton.next_power_of_2(triton.cdiv(H, N)), "BLOCK_K": min(H, 128)}

    def call(READ: bool, steps: int) -> None:
        flags.zero_()
        options = {"num_warps": 8, "launch_cooperative_grid": True}
        broadcast_kernel[(N,)](
            h, total, flags, timeout_info, steps, B=B, H=H, MAX_SPINS=MAX_SPINS, READ=READ, **tiles, **options
        )

    call(True, steps)
    heard(timeout_info)
    expected = torch.full_like(total, B * H * (steps + steps // 2))
    try:
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)
    except AssertionError as error:
        raise Wrong(f"a program has read what is not of its step: {error}") from None
    times = lab.slope(partial(call, True), steps, less=partial(call, False))
    heard(timeout_info)
    return times, params["bytes"] / times.median, "bytes/us"


def launch_items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "python", {}
    yield "graph", {"replaced": "a plain call"} if lab.dry else {}


def launch(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    x, launches = lab.zeros(1), lab.steps(400)

    def call(launches: int) -> None:
        for _ in range(launches):
            increment_kernel[(1,)](x, num_warps=1)

    call(1)
    if name == "graph":
        run = cache(lambda launches: graphed(partial(call, launches), lab.device))
    else:
        run = partial(partial, call)
    x.zero_()
    run(launches)()
    if x.item() != launches:
        raise Wrong(f"{x.item()} launches ran, of {launches}")
    # From Python it is the host that sets the pace.
    times = lab.slope(lambda launches: run(launches)(), launches, hold=name == "graph")
    return times, times.median, "us a launch"


def matrix_items(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    for (H, B), dtype in product([(24, 2)] if lab.dry else [(256, 16), (512, 16), (1024, 64)], DTYPES):
        plan = choose_kernel(DTYPES[dtype], B, H, lab.hardware, dtype == "fp32")
        team = plan.backward.team
        for name, tiles, rows, gates in [("forward", plan.forward, 4, 1), ("backward", plan.backward, team, 4 // team)]:
            if plan.mode != "step":
                shape = {"rows": rows * tiles.units, "batch": tiles.batch, "chunk": tiles.chunk, "warps": tiles.warps}
                chunks = tiles.kept or gates * triton.cdiv(H, tiles.chunk)
                shape |= {"chunks": chunks, "precision": plan.precision}
                yield name, {"dtype": dtype, "H": H, "B": B, "N": lab.programs[-1], **shape}


def settled(steps: int) -> float:
    """How many times the product of all chunks with x the sum of matrix_kernel holds after so many steps."""
    sum, sign = 0.0, 1
    for _ in range(steps):
        sign = -sign
        sum = 0.5 * sum + sign
    return sum


def matrix(lab: Lab, name: str, params: dict[str, Any]) -> Measured:
    N, rows, batch, chunk, chunks = (params[size] for size in ("N", "rows", "batch", "chunk", "chunks"))
    dtype, steps = DTYPES[params["dtype"]], lab.steps(1000)
    weight, x = (torch.randn(size).to(lab.device, dtype) for size in [(rows, chunks * chunk), (batch, chunk)])
    out = lab.zeros(N, rows, batch, dtype=torch.float32).fill_(torch.nan)
    tiles = {"PRECISION": params["precision"], "ROWS": rows, "CHUNKS": chunks, "BLOCK_B": batch, "BLOCK_K": chunk}

    def call(steps: int) -> None:
        matrix_kernel[(N,)](weight, x, out, steps, **tiles, num_warps=params["warps"], num_stages=1)

    call(steps)
    once = weight.double().reshape(rows, chunks, chunk).sum(1) @ x.double().T
    expected = (once * settled(steps)).expand_as(out)
    error, largest = (out - expected).abs().max().item(), expected.abs().max().item()
    wrong = "" if error <= 4e-3 * largest else f"a product is off by {error:.3g}, of {largest:.3g}"

    def measure() -> Measured:
        times = lab.slope(call, steps)
        return times, 2 * rows * batch * chunk * chunks / times.median, "flop/us of one multiprocessor"

    return timed(wrong, measure)
