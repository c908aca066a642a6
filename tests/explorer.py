"""Runs grid-mode kernels in Triton's interpreter under a scheduler of ours, to show that no schedule breaks them.

Triton's interpreter runs the programs of a launch one after another, so a program that waits for another waits for
ever. Here each program has a thread of its own, one of which runs at a time; it gives way before and after every
atomic and before every turn of a wait (with `strict` also around each load and store of exchanged data, and in the
midst of a store), and a seeded schedule chooses who goes on. So a failure is repeated by its schedule and seed.

Memory is checked apart from the schedule, by happens-before: each program has a vector clock, a release leaves it at
the flag, an acquire takes it from there. A load of exchanged data whose store does not happen before it is a race, even
where this run happened to see the right value; so a relaxed publish and a missing acquire are found at once. Volatile
loads are free of this: who polls data takes it for there by its value, and a wrong one shows in the result.
"""

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

BUILDER = interpreter.interpreter_builder
# Turns a program that may pass without a store, a publish or a program's end. Far more than any fair schedule needs.
PATIENCE = 3000


class Broken(Exception):
    """What the explorer found: a deadlock, a race, a second store to the same place, or flags left from before."""


class Abandoned(BaseException):
    """Ends the threads of a launch that broke."""


# A schedule chooses who runs next among the programs that have not ended.
Choose = Callable[[list[int], int, bool], int]


def round_robin(programs: int, seed: int) -> Choose:
    return lambda alive, current, waits: min(alive, key=lambda p: (p - current - 1) % programs)


def reverse(programs: int, seed: int) -> Choose:
    return lambda alive, current, waits: min(alive, key=lambda p: (current - p - 1) % programs)


def uniform(programs: int, seed: int) -> Choose:
    rng = random.Random(seed)
    return lambda alive, current, waits: rng.choice(alive)


def starve_one(programs: int, seed: int) -> Choose:
    """One program hardly ever runs: the others get as far ahead of it as the flags let them."""
    rng = random.Random(seed)
    victim = rng.randrange(programs)

    def choose(alive: list[int], current: int, waits: bool) -> int:
        others = [p for p in alive if p != victim]
        return rng.choice(others) if others and rng.random() < 0.98 else rng.choice(alive)

    return choose


def priorities(programs: int, seed: int) -> Choose:
    """The program of highest priority runs; now and then, and when it waits for a flag, it falls to the lowest."""
    rng = random.Random(seed)
    order = rng.sample(range(programs), programs)

    def choose(alive: list[int], current: int, waits: bool) -> int:
        if waits or rng.random() < 0.03:
            order.remove(current)
            order.append(current)
        return next(p for p in order if p in alive)

    return choose


SCHEDULES = {f.__name__: f for f in (round_robin, reverse, uniform, starve_one, priorities)}


class Exchanged:
    """One tensor of a launch that programs exchange, element by element: who wrote it last, and the times of that, of
    the writer's clock, and of every program's last read since, of the reader's."""

    def __init__(self, tensor: torch.Tensor, programs: int) -> None:
        self.begin, self.size = tensor.data_ptr(), tensor.element_size()
        self.writer = np.full(tensor.numel(), -1)
        self.time = np.zeros(tensor.numel(), dtype=np.int64)
        self.read = np.zeros((tensor.numel(), programs), dtype=np.int64)

    def elements(self, pointers: np.ndarray) -> np.ndarray:
        at = (pointers - self.begin) // self.size
        return at[(pointers >= self.begin) & (at < len(self.writer))]


Places = list[tuple[Exchanged, np.ndarray]]


class Memory:
    """The exchanged tensors of a launch, and the programs' clocks."""

    def __init__(self, tensors: list[torch.Tensor], programs: int) -> None:
        self.tensors = [Exchanged(tensor, programs) for tensor in tensors]
        self.clocks = np.eye(programs, dtype=np.int64)
        self.flags: dict[int, np.ndarray] = {}

    def places(self, pointers: np.ndarray, mask: np.ndarray) -> Places:
        """The exchanged elements among these addresses."""
        # A mask that a scalar has gone into holds integers, which would be taken for indices.
        pointers = pointers[np.broadcast_to(mask.astype(bool), pointers.shape)].astype(np.int64)
        places = [(tensor, tensor.elements(pointers)) for tensor in self.tensors]
        return [(tensor, at) for tensor, at in places if len(at)]

    def load(self, program: int, places: Places) -> None:
        for tensor, at in places:
            writers = tensor.writer[at]
            if (writers < 0).any():
                raise Broken(f"program {program} read exchanged data that nobody has written")
            unseen = tensor.time[at] > self.clocks[program][writers]
            if unseen.any():
                raise Broken(f"race: program {program} read what program {writers[unseen][0]} has not published to it")
            tensor.read[at, program] = self.clocks[program][program]

    def store(self, program: int, places: Places) -> None:
        for tensor, at in places:
            clock, writers = self.clocks[program], tensor.writer[at]
            known = np.where(writers < 0, 0, tensor.time[at] - clock[writers]) <= 0
            if not known.all() or (tensor.read[at] > clock).any():
                raise Broken(f"program {program} overwrote exchanged data that others may still read")
            tensor.writer[at], tensor.time[at], tensor.read[at] = program, clock[program], 0

    def atomic(self, program: int, flag: int, semantics: str) -> None:
        published = self.flags.setdefault(flag, np.zeros(len(self.clocks), dtype=np.int64))
        if "acquire" in semantics or "acq_rel" in semantics:
            np.maximum(self.clocks[program], published, out=self.clocks[program])
        if "release" in semantics or "acq_rel" in semantics:
            np.maximum(published, self.clocks[program], out=published)
            self.clocks[program][program] += 1


class Launch:
    """One launch: its programs, whose turn it is, and its memory."""

    def __init__(
        self, explorer: "Explorer", exchanged: list[torch.Tensor], programs: list[tuple[int, int, int]]
    ) -> None:
        self.explorer, self.programs = explorer, programs
        self.choose = SCHEDULES[explorer.schedule](len(programs), explorer.seed)
        self.memory = Memory(exchanged, len(programs))
        self.rng = np.random.default_rng(explorer.seed)
        self.turns = [threading.Semaphore(0) for _ in programs]
        self.alive = list(range(len(programs)))
        self.current, self.idle, self.writes = -1, 0, 0
        self.seen: dict[tuple[int, int], list[int]] = {}  # by program and address, the writes before its last looks
        self.ended = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.patched: set[str] = set()

    def run(self, body: Callable[[], None]) -> None:
        threads = [threading.Thread(target=self._program, args=(p, body), daemon=True) for p in self.alive]
        for thread in threads:
            thread.start()
        self._hand_on(self.choose(self.alive, 0, False))
        self.ended.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _program(self, program: int, body: Callable[[], None]) -> None:
        self._await(program)
        try:
            if self.failure is None:
                body()
        except Abandoned:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        self.alive.remove(program)
        self.idle = 0
        if not self.alive:
            self.ended.release()
        else:
            self._hand_on(self.alive[0] if self.failure else self.choose(self.alive, program, False))

    def _hand_on(self, program: int) -> None:
        self.current = program
        self.turns[program].release()

    def _await(self, program: int) -> None:
        self.turns[program].acquire()
        BUILDER.set_grid_idx(*self.programs[program])

    def switch(self, waits: bool = False) -> None:
        """The running program gives way."""
        program = self.current
        self.explorer.switches += 1
        self.idle += 1
        if self.idle > PATIENCE * len(self.programs):
            self.failure = self.failure or Broken(f"deadlock: programs {self.alive} wait for flags that nobody sets")
        if self.failure is None:
            chosen = self.choose(self.alive, program, waits)
            if chosen != program:
                self._hand_on(chosen)
                self._await(program)
        if self.failure is not None:
            raise Abandoned

    def look(self, address: int, again: bool) -> None:
        """The running program is about to read what it waits for: a flag, or the data itself. Not `again`: where two
        looks have found nothing that was written since, the third waits for something."""
        place = self.current, address
        self.switch(waits=True)
        while not again and self.seen.get(place) == [self.writes] * 2:
            self.switch(waits=True)
        self.seen[place] = [*self.seen.get(place, []), self.writes][-2:]

    def progress(self) -> None:
        self.idle = 0
        self.writes += 1


class Programs:
    """Stands in for a kernel's function: takes the interpreter's calls, one a program; the last one runs them all."""

    def __init__(self, kernel: Callable[..., None], start: Callable[[list, Callable[[], None]], None]) -> None:
        self.kernel, self.start = kernel, start
        # What the interpreter looks up on a function.
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__
        self.__annotations__ = kernel.__annotations__
        self.__signature__ = inspect.signature(kernel)
        self.called: list[tuple[int, int, int]] = []

    def __call__(self, **arguments: Any) -> None:
        self.called.append(BUILDER.grid_idx)
        if len(self.called) == int(np.prod(BUILDER.grid_dim)):
            self.start(self.called, lambda: self.kernel(**arguments))


@dataclass
class Explorer:
    """One exploration; `switches` counts how often a program gave way. Without `memory`, races pass unseen."""

    schedule: str
    seed: int
    strict: bool
    memory: bool = True
    bounded: bool = False
    switches: int = 0
    launch: Launch | None = None

    def execute(self, original: Callable[..., Any], executor: Any, *tensors: Any, **options: Any) -> Any:
        """In place of GridExecutor.__call__, for a kernel whose programs wait for one another."""
        named = dict(zip(executor.arg_names, tensors, strict=False))
        of_step = named.get("exchange")  # of the kernel of one step
        if options.get("MODE") != "grid" and (of_step is None or of_step.own is None):
            return original(executor, *tensors, **options)
        self.bounded = options["MAX_SPINS"] > 0
        if of_step is not None:
            return self.together(original, executor, [of_step.own], tensors, options)
        names = "y", "dropped", "dgates", "products", "dr"
        exchanged = [named[name] for name in names if named.get(name) is not None]
        exchanged += [named["steps"][0]] if "ends" in named else []  # the forward kernel of any cell
        first, group = named["first_recurrence"], named["row_begin"] // options["TILES"].batch
        _, groups, count = executor.grid
        for flags in (named["sync"].flags, named.get("team_flags")):
            own = () if flags is None else flags.view(-1, *flags.shape[-2:])[first : first + count]
            if len(own) and own[:, group : group + groups].any():
                raise self._named(Broken("the flags are not zero at launch"))
        return self.together(original, executor, exchanged, tensors, options)

    def together(
        self, original: Callable[..., Any], executor: Any, exchanged: list[torch.Tensor], tensors: Any, options: Any
    ) -> Any:
        """Runs the programs of a launch by turns; exchanged: the tensors by which they hand data on."""

        def start(programs: list[tuple[int, int, int]], body: Callable[[], None]) -> None:
            self.launch = Launch(self, exchanged, programs)
            try:
                self.launch.run(body)
            finally:
                self.launch = None

        executor.fn = Programs(executor.fn, start)
        try:
            return original(executor, *tensors, **options)
        except interpreter.InterpreterError as error:
            raise self._named(error) from None

    def patch(self, original: Callable[..., Any], function: Any) -> Any:
        """The interpreter prepares triton.language at each call of a device function: once a module will do."""
        if self.launch is None:
            return original(function)
        module = function.__globals__["__name__"]
        if module not in self.launch.patched:
            self.launch.patched.add(module)
            original(function)
        return None

    def _named(self, error: Exception) -> Broken:
        return Broken(f"{error} [schedule={self.schedule!r}, seed={self.seed}, strict={self.strict}]")

    def atomic(self, original: Callable[..., Any], operation: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any):
        launch = self.launch
        if launch is None:
            return original(operation, ptr, val, mask, sem, scope)
        waits = not val.data.any()
        launch.switch(waits)
        if not waits:
            launch.progress()
        result = original(operation, ptr, val, mask, sem, scope)
        launch.memory.atomic(launch.current, int(ptr.data.flat[0]), str(sem).lower())
        launch.switch()
        return result

    def load(self, original: Callable[..., Any], pointers: Any, mask: Any, *rest: Any) -> Any:
        launch = self.launch
        volatile = rest[-1]
        if launch and volatile:
            launch.look(int(pointers.data.flat[0]), again=pointers.data.size == 1 or self.bounded)
        at = launch.memory.places(pointers.data, mask.data) if launch and self.memory and not volatile else ()
        if not at:
            return original(pointers, mask, *rest)
        if self.strict:
            launch.switch()
        launch.memory.load(launch.current, at)
        return original(pointers, mask, *rest)

    def store(self, original: Callable[..., Any], pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch = self.launch
        at = launch.memory.places(pointers.data, mask.data) if launch and self.memory else ()
        if not at:
            return original(pointers, value, mask, *rest)
        launch.memory.store(launch.current, at)
        if not self.strict:
            launch.progress()
            return original(pointers, value, mask, *rest)
        # Element by element in any order: here one half before the other.
        first = launch.rng.random(mask.data.shape) < 0.5
        for half in (first, ~first):
            launch.switch()
            part = interpreter.TensorHandle(mask.data.astype(bool) & half, mask.dtype)
            original(pointers, value, part, *rest)
            launch.progress()
        launch.switch()
        return None


@contextmanager
def explore(schedule: str, seed: int = 0, strict: bool = False, memory: bool = True) -> Iterator[Explorer]:
    """Runs every grid-mode launch inside the block under a schedule; raises Broken at what it finds."""
    explorer = Explorer(schedule, seed, strict, memory)
    execute, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    hooks = {"create_atomic_rmw": explorer.atomic, "create_masked_load": explorer.load}
    hooks["create_masked_store"] = explorer.store
    try:
        interpreter._patch_lang = lambda function: explorer.patch(patch, function)
        interpreter.GridExecutor.__call__ = lambda self, *a, **k: explorer.execute(execute, self, *a, **k)
        for name, hook in hooks.items():
            setattr(BUILDER, name, partial(hook, getattr(BUILDER, name)))
        yield explorer
    finally:
        interpreter.GridExecutor.__call__, interpreter._patch_lang = execute, patch
        for name in hooks:
            delattr(BUILDER, name)
