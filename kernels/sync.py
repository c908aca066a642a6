"""Step flags: how the programs of one batch group hand h (or dgates) of a step to each other.

One counter per (batch group, step), zero at launch. Each program of the group adds one when its slice of the step's
tensor is written; a step is complete when the counter has reached the number of programs. Only the programs of one
group wait for each other, and a cooperative launch guarantees that all of them run.
"""

import triton
import triton.language as tl


@triton.jit
def publish(flag):
    """Counts this program's slice in, after all of its threads have written it."""
    # The barrier orders every thread's stores before the one thread that performs the release: Triton itself puts
    # none between them.
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit
def wait(flag, programs):
    """Returns when all `programs` slices have been counted in, with their data visible."""
    # The spin is relaxed, because an acquire in it would empty the L1 cache each turn.
    while tl.atomic_add(flag, 0, sem="relaxed", scope="gpu") < programs:
        pass
    # One acquire follows it; its result must be used, or the compiler drops it as a dead load.
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < programs:
        pass
    # No thread may read ahead of the one that performed the acquire.
    tl.debug_barrier()
