"""Step flags: how the programs of a batch group hand h (or dgates) of a step on.

One counter per (batch group, step), zero at launch. Each program of the group adds one when its slice of the step's
tensor is written; a step is complete when the counter has reached the number of programs. Only the programs of one
group wait for one another, and a cooperative launch guarantees that all of them run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Sync(NamedTuple):
    """The tensors by which programs find out that others have written; what is None compiles away."""

    flags: Any  # (R, batch groups, T) int32: the step flags; only of a grid without `poll`
    timeout_info: Any  # (4,) int32 out: which program timed out; only with MAX_SPINS
    zeros: Any  # (4H,) written by every program, read instead of rows that are not awaited; only with `poll`


@triton.jit
def publish(flag):
    """Counts this program's slice in, after all of its threads have written it."""
    # The barrier orders every thread's stores before the one thread that performs the release: Triton itself puts
    # none between them.
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit
def wait(flag, programs, step, timeout_info, MAX_SPINS: tl.constexpr):
    """Returns when all `programs` slices have been counted in, with their data visible.

    MAX_SPINS bounds the spin, for debugging; 0 does not. A program that reaches the bound writes (1, its ids, its step)
    to `timeout_info` and lets every program that waits for the flag pass, so that the launch ends.
    """
    # Spin on a volatile load, not an atomic: Triton broadcasts an atomic's result to all threads with a barrier on
    # every iteration, and the atomic would contend with the publishers.
    spins = 0
    while (tl.load(flag, volatile=True) < programs) & (spins <= MAX_SPINS):
        if MAX_SPINS > 0:
            spins += 1
    # One acquire follows the spin, not one an iteration, because it empties the L1 cache. Its result must be used, or
    # the compiler drops it as a dead load.
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < programs:
        if MAX_SPINS > 0:
            record_timeout(step, timeout_info)
            tl.atomic_add(flag, programs, sem="relaxed", scope="gpu")
    # No thread may read ahead of the one that performed the acquire.
    tl.debug_barrier()


@triton.jit
def wait_if(needed, flags, step, timeout_info, MAX_SPINS: tl.constexpr, BACK: tl.constexpr = 0):
    """wait() for all programs of a group at a step, or so many before it, where it is needed."""
    if needed:
        wait(flags + step - BACK, tl.num_programs(0), step + 1 - BACK, timeout_info, MAX_SPINS)


@triton.jit
def record_timeout(step, timeout_info):
    """Writes (1, this program's ids, step) to timeout_info, unless another program has."""
    if tl.atomic_cas(timeout_info, 0, 1) == 0:
        tl.store(timeout_info + 1, tl.program_id(0))
        tl.store(timeout_info + 2, tl.program_id(1))
        tl.store(timeout_info + 3, step)


def raise_if_stuck(timeout_info: Tensor, kernel: str, plan: object) -> None:
    """Raises RuntimeError for a program that has written to timeout_info."""
    stuck, program, group, step = timeout_info.tolist()
    if stuck:
        raise RuntimeError(
            f"program {program} of batch group {group} waited in vain for step {step - 1} of the others, in {kernel} "
            f"under {plan!r}"
        )
