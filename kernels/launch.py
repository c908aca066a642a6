"""What the launchers share: what is prepared once for all launches of a form, and the launch itself."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompilationError, CompiledKernel
from triton.runtime.errors import OutOfResources, PTXASError

from . import plan_of_cell
from .environment import DEBUG
from .equations import Equations
from .findings import Candidate, Refused
from .layout import Layout, words
from .plan import cuda_device, kind_of, note_spills
from .planned import Plan
from .sync import Sync, raise_if_stuck
from .tiles import Problem, Tiles, ceil_div, in_turn, max_coresident, programs_of

# Of every kernel: later Tritons have another default, and other sums.
OPTIONS = {"enable_fp_fusion": True}

# Turns that a wait for a step flag may take under FUSED_LSTM_DEBUG=1, some seconds; without it a wait has no bound.
MAX_SPINS = 10_000_000 if DEBUG else 0


# The integers that both kernels take. None is a constant of theirs: no size but H compiles anything.
SIZES = ["T", "B", "total_rows", "step_stride", "row_stride", "first_recurrence", "row_begin", "step_begin", "step_end"]

# The interpreter keeps the program's position in globals: two threads cannot be in it at once.
_INTERPRETER = threading.RLock()


class on_device:
    """Within it kernels are launched on a device, or one thread at a time has the interpreter.

    Raises:
        Refused: for an error within it that another kernel may not have.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.context: AbstractContextManager = torch.cuda.device(device) if device.type == "cuda" else _INTERPRETER

    def __enter__(self) -> None:
        self.context.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.context.__exit__(kind, error, traceback)
        if error is not None and (refused := refusal(error, self.device)) is not None:
            raise refused from error


def refusal(error: BaseException, device: torch.device) -> Refused | None:
    """The Refused that an error of a launch is; None where no other kernel would do better."""
    text = next(iter(str(error).splitlines()), "")
    if not isinstance(error, Exception) or "out of memory" in text:
        return None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # nothing can be loaded then, whichever it is
            return None
        torch.cuda.synchronize(device)  # raises what is the error of something that ran before
    if isinstance(error, OutOfResources):
        return Refused(f"takes {error.required} of {error.limit} ({error.name})", lasts=True)
    if isinstance(error, CompilationError | PTXASError):
        return Refused(f"does not compile ({type(error).__name__}: {text})", lasts=True)
    # Other errors may not come again. In the interpreter they are ours.
    if device.type == "cuda" or "Triton Error" in text:
        return Refused(f"{type(error).__name__}: {text}", cooperative="cooperative" in text)
    return None


def alloc_exchange_buffer(like: Tensor, shape: tuple[int, ...], tiles: Tiles, layout: Layout) -> Tensor:
    """The buffer of h or dgates of all steps: zero past the rows' lengths, and elsewhere SENTINEL if it is polled."""
    if not tiles.poll:
        return like.new_zeros(shape) if layout.padded else like.new_empty(shape)
    buffer = like.new_empty(shape)
    words(buffer).fill_(-1)
    return buffer.masked_fill_(layout.past(buffer.shape), 0) if layout.padded else buffer


def weight_in_registers(mode: str, tiles: Tiles) -> bool:
    """Whether a pass runs in a kernel that has W_hh in registers: of a file with `latency` in its name."""
    return tiles.poll or mode == "local"


def compares_pairs(capability: tuple[int, int]) -> bool:
    """Whether a device has an instruction for the larger of two pairs of 16 bits."""
    return capability >= (9, 0)


def specialization(plan: Plan, tiles: Tiles, H: int, out: int, **form: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments, of which a kernel takes those that it has, and the compile options of a plan.

    out: features of h. form: further constexpr arguments.
    """
    constants = {
        "H": H,
        "OUT": out,
        "MODE": plan.mode,
        "PHASE": "",
        "PRECISION": plan.precision,
        "TILES": tiles,
        "MAX_SPINS": MAX_SPINS if plan.mode == "grid" else 0,
        **form,
    }
    # num_stages=1: software pipelining would prefetch the next step's h before its flag has been waited for.
    options = {"num_warps": tiles.warps, "num_stages": 1, **OPTIONS}
    if plan.mode == "grid":
        options["launch_cooperative_grid"] = True
    return constants, options


Args = tuple[Tensor | tuple[Tensor | None, ...] | None, ...]
Launches = dict[Any, "Prepared | Specialized"]


class Specialized:
    """A kernel with its constexpr arguments and compile options.

    compiled: what Triton has made of it so far, by arguments_key(). found: is told of each.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.found: Callable[[CompiledKernel], None] | None = None
        self.kernel, self.options = kernel, options
        # In the kernel's order, which does not have all of them.
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.values = tuple(self.constants.values())
        self.compiled: dict[Any, CompiledKernel] = {}

    def launch(self, programs: tuple[int, int, int], args: Args, sizes: tuple[int, ...], key: Any) -> None:
        """Launches it on the current device; args, sizes: all that are no constants, in the kernel's order.

        Triton finds out at every call, from all of them, which machine code is meant: here it is asked once for a key.
        """
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[programs](*args, *sizes, *self.values)
            return
        compiled = self.kernel[programs](*args, *sizes, **self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.compiled[key] = compiled
            if self.found is not None:
                self.found(compiled)


def arguments_key(args: Args, sizes: tuple[int, ...]) -> Any:
    """What Triton distinguishes in arguments: of tensors, in records too, the dtype and whether they are aligned to 16
    bytes, or that there is none; of integers whether 32 bits hold them."""
    key: list[Any] = []
    addresses = 0
    for arg in args:
        if arg is None:
            key.append(None)
        elif isinstance(arg, tuple):
            for tensor in arg:
                if tensor is None:
                    key.append(None)
                else:
                    key.append(tensor.dtype)
                    addresses |= tensor.data_ptr()
        else:
            key.append(arg.dtype)
            addresses |= arg.data_ptr()
    if addresses & 15:  # hardly ever
        key += [tensor is None or tensor.data_ptr() % 16 == 0 for tensor in flat(args)]
    if max(sizes) >= 2**31:
        key.append(tuple(size < 2**31 for size in sizes))
    return tuple(key)


def aligned(key: Any) -> bool:
    """Whether all tensors of an arguments_key() are aligned to 16 bytes."""
    return type(key[-1]) is not bool


def flat(args: Args) -> Iterator[Tensor | None]:
    """The tensors of arguments, and of the records among them."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from arg
        else:
            yield arg


class Part(NamedTuple):
    """A launch of a step that has so many recurrences and batch groups at once."""

    kernel: Specialized
    programs: tuple[int, int, int]
    first_recurrence: int
    row_begin: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that launches of one form have in common.

    The form is the key under which launch() keeps it with the plan: the kernel, the states' shape and device, the
    features of h, the direction, what of the layout and the stack is there, and MAX_SPINS, which tests set. It holds as
    long as its plan. A device that refuses a kernel gets another plan, so nothing has to be thrown away.

    kernel: held, because the key has only its id. parts: each with the launches of a step, of which a projection has
        two.
    """

    kernel: Any
    parts: tuple[tuple[Part, ...], ...]
    recurrences: int
    flags: tuple[int, int] | None  # of the step flags, all but T
    zeros: bool
    bounded: bool

    @classmethod
    def of(
        cls,
        kernel: Any,
        plan: Plan,
        candidate: Candidate,
        states: Tensor,
        out: int,
        reverse: bool,
        stacked: bool,
        ragged: bool,
        cell: Equations | None = None,
    ) -> "Prepared":
        """Args as launch() takes them; ragged: rows may begin or end within the sequence, or be reset."""
        device, (B, H) = states.device, states.shape[-2:]
        tiles = plan.tiles(candidate.problem.backward)
        recurrences = states.shape[0] if states.dim() == 3 else 1
        unit_blocks, batch_groups = programs_of(tiles, H, B)
        form: dict[str, Any] = {"DIRECTIONS": 1 if stacked else recurrences, "REVERSE": reverse, "CELL": cell}
        in_registers = weight_in_registers(plan.mode, tiles)
        if in_registers:
            form["PAIRS"] = device.type == "cuda" and compares_pairs(cuda_device(device).capability)
        blocks = {"": unit_blocks}
        if out < H:
            of_phase = {"cell": unit_blocks, "projection": ceil_div(out, tiles.features)}
            blocks = dict(reversed(of_phase.items())) if candidate.problem.backward else of_phase
        at_once = recurrences, batch_groups
        if tiles.in_turn:
            # Step by step, in the interpreter, two each.
            slots = plan.resident // unit_blocks if plan.mode == "grid" else recurrences * ceil_div(batch_groups, 2)
            at_once = in_turn(slots, recurrences, batch_groups)
        elif plan.mode == "grid":
            at_once = max_coresident(plan.resident // unit_blocks, recurrences, batch_groups, stacked)
        kernels = [specialized(kernel, plan, tiles, H, out, PHASE=phase, **form) for phase in blocks]
        if device.type == "cuda":
            found = partial(note_spills, device, candidate)
            if cell is not None:
                use = plan_of_cell.Use.of(cell, candidate.problem, plan.mode, tiles)
                found = partial(plan_of_cell.note_spills, device, use)
            for each in kernels:
                each.found = found

        def launches_of(first: int, group: int) -> tuple[Part, ...]:
            others = min(at_once[1], batch_groups - group), min(at_once[0], recurrences - first)
            each = zip(kernels, blocks.values(), strict=True)
            return tuple(Part(of_phase, (n, *others), first, group * tiles.batch) for of_phase, n in each)

        begins = [0] if tiles.in_turn else range(0, batch_groups, at_once[1])
        return cls(
            kernel,
            tuple(launches_of(first, group) for first, group in product(range(0, recurrences, at_once[0]), begins)),
            recurrences,
            (recurrences, batch_groups) if plan.mode == "grid" and not tiles.poll else None,
            in_registers and (ragged or stacked or plan.mode == "step"),
            plan.mode == "grid" and MAX_SPINS > 0,
        )


def specialized(kernel: Any, plan: Plan, tiles: Tiles, H: int, out: int, **form: Any) -> Specialized:
    """A kernel as a plan runs it; args as specialization() takes them."""
    return Specialized(kernel, *specialization(plan, tiles, H, out, **form))


def prepared_for(plan: Plan) -> Launches:
    """What has been prepared for a plan. It is kept on the plan, because hashing a plan at every call takes longer than
    launching a kernel."""
    return plan.__dict__.setdefault("_launches", {})


def launch(
    kernel: Any,
    args: Args,
    plan: Plan,
    layout: Layout,
    states: Tensor,
    out: int,
    backward: bool,
    reverse: bool,
    stacked: bool,
    cell: Equations | None = None,
) -> None:
    """Launches a kernel over all recurrences, steps and batch rows, in the plan's mode, on the tensors' device.

    Args:
        args: in the kernel's order, all before its Sync; the first one is a tensor that lies as `layout` says.
        states: (R, B, H), or (B, H) of a single recurrence. out: features of h.
        backward: the pass, which has its tiles, and of a step with a projection the projection before the cell.
        stacked: the recurrences are layers.
        cell: of a kernel that has no cell of its own.

    Raises:
        Refused: the device or Triton does not take the kernel.
        RuntimeError: under FUSED_LSTM_DEBUG=1, a program that waited in vain for another, and at which step.
    """
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]  # type: ignore[index]
    shape, device = states.shape, states.device
    ragged = layout.lengths is not None or layout.starts is not None
    key = id(kernel), shape, device, out, reverse, stacked, ragged, MAX_SPINS, cell
    prepared = prepared_for(plan).get(key)
    if prepared is None:
        kind, H = kind_of(first.dtype, plan.precision != "tf32"), shape[-1]
        problem = Problem(kind, H, backward, 1, plan.layers, out if out < H else 0, plan.weights)
        candidate = Candidate.of(problem, plan.mode, plan.tiles(backward))
        prepared = Prepared.of(kernel, plan, candidate, states, out, reverse, stacked, ragged, cell)
        prepared_for(plan)[key] = prepared
    T, B = layout.steps(first.shape), shape[-2]
    flags = timeout_info = zeros = None
    if prepared.flags is not None:
        flags = torch.zeros((*prepared.flags, T), dtype=torch.int32, device=device)
    if prepared.zeros:
        zeros = first.new_empty((4 if cell is None else cell.gates) * shape[-1])
    if prepared.bounded:
        timeout_info = torch.zeros(4, dtype=torch.int32, device=device)
    args_and_sync = *args, Sync(flags, timeout_info, zeros)
    sizes = T, B, T * B if layout.offsets is None else first.shape[0], *layout.strides(T, B)
    last = T + prepared.recurrences - 1 if stacked else T  # each layer is a step behind the one that it takes from
    steps = [(step, step + 1) for step in range(last)] if plan.mode == "step" else ((0, last),)
    code = arguments_key(args_and_sync, (*sizes, last))
    with on_device(device):
        for part in prepared.parts:
            for begin, end in steps:
                for of_phase, programs, first_recurrence, row_begin in part:
                    numbers = *sizes, first_recurrence, row_begin, begin, end
                    of_phase.launch(programs, args_and_sync, numbers, code)
    if timeout_info is not None:
        raise_if_stuck(timeout_info, kernel.__name__, plan)
