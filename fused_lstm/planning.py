"""Which plan a call takes: what kernels/plan.py is asked about its tensors, under autocast and in a graph."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .context import PLAIN, Context, constant
from .kernels import plan as kernels_plan
from .kernels.plan import (
    CHUNK,
    Plan,
    choose,
    choose_one_step,
    chunk_for,
    in_kernel,
    layers_together,
    memory_of,
    on_torch,
    with_memory_estimate,
)

# The switches of nn.LSTM's and of nn.LSTMCell's float32 products: on the way to the first torch.backends looks up a
# module at every step.
_OF_RNN: Any = torch.backends.cudnn.rnn
_OF_MATMUL: Any = torch.backends.cuda.matmul


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast, where it is on, has a tensor used."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


def why_torch(input: Tensor, context: Context) -> str | None:
    """Why torch's own LSTM serves a call; None where the kernels do."""
    if context.recorded:
        return "torch.jit.trace and torch.onnx.export know torch's operators alone: torch's own LSTM"
    return kernels_plan.why_torch(autocast_dtype(input), input.device)


def path_of(input: Tensor, context: Context, states: bool, record: bool, cut: bool) -> str:
    """Which code runs a call: "kernels"; "torch", its own LSTM; "operator", the same as one of a graph; or "composed",
    torch operations step by step, where the others lack something.

    states, record: it gives those of all steps, or the gates too. cut: its rows have lengths or resets, or are packed.
    """
    if context.forward_mode:
        return "composed"
    if why_torch(input, context) is None:
        return "kernels"
    if context.compiled and not (context.recorded or record):
        return "operator"
    # torch.vmap has no rule for torch's own LSTM, and other transforms wrap the lengths that it reads.
    if states or record or context.batched or (context.transformed and cut):
        return "composed"
    return "torch"


@constant
def full_precision() -> bool:
    """Whether float32 products are not to be TF32: cuDNN's own switch says so, which is the one nn.LSTM follows."""
    return _OF_RNN.fp32_precision != "tf32"


@constant
def full_precision_of_cell() -> bool:
    """The same of nn.LSTMCell, whose products are torch's own: not TF32, unless torch is told so."""
    return _OF_MATMUL.fp32_precision != "tf32"


def check_recompute(recompute: bool | int) -> None:
    """Raises TypeError: not a bool or an integer. ValueError: below 0."""
    if not isinstance(recompute, int):
        raise TypeError(f"recompute must be a bool or a number of steps, got {type(recompute).__name__}")
    if recompute < 0:
        raise ValueError(f"recompute must be a bool or a number of steps, got {recompute}")


def chunk_of(recompute: bool | int, input: Tensor, B: int, H: int) -> int:
    """The steps of a chunk, 0 for none. In a graph they follow no memory: it would be compiled for one B.

    Raises:
        TypeError, ValueError: as check_recompute().
    """
    check_recompute(recompute)
    memory = memory_of(input.device) if recompute is True and not torch.compiler.is_compiling() else None
    if memory is not None:
        return chunk_for(autocast_dtype(input), B, H, memory)
    return CHUNK if recompute is True else int(recompute)


def takes_one_step(T: int, bidirectional: bool, projects: bool, saves: bool, drops: bool) -> bool:
    """Whether the kernel of one step serves a dense call of T steps; saves: for backward; drops: in dropout."""
    return T == 1 and not (bidirectional or projects or saves or drops)


def groups_of(input: Tensor, states: tuple[int, int], num_layers: int, alone: bool) -> list[int]:
    """How many layers each launch of a stack has; states: (B, H). alone: one, whatever they cost."""
    if alone or num_layers == 1:
        return [1] * num_layers
    B, H = states
    if torch.compiler.is_compiling():
        return compiled_groups(autocast_dtype(input), H, num_layers, input.device)
    return layers_together(autocast_dtype(input), B, H, num_layers, input.device, full_precision())


@constant
def compiled_groups(dtype: torch.dtype, H: int, num_layers: int, device: torch.device) -> list[int]:
    """groups_of() for a graph, which is to be the same for every B: the groups of a middling one."""
    return layers_together(dtype, 16, H, num_layers, device, full_precision())


def projects_in_kernel(input: Tensor, states: tuple[int, int, int], directions: int) -> bool:
    """Whether the kernels project, by the model; states: (B, H, P)."""
    B, H, P = states
    if torch.compiler.is_compiling():
        return compiled_projects(autocast_dtype(input), H, P, input.device, directions)
    return in_kernel(autocast_dtype(input), B, H, P, input.device, full_precision(), directions)


@constant
def compiled_projects(dtype: torch.dtype, H: int, P: int, device: torch.device, directions: int) -> bool:
    """projects_in_kernel() for a graph, as compiled_groups()."""
    return in_kernel(dtype, 16, H, P, device, full_precision(), directions)


def plan_for(
    input: Tensor,
    B: int,
    H: int,
    P: int = 0,
    recompute: bool | int = False,
    num_layers: int = 1,
    bidirectional: bool = False,
    context: Context = PLAIN,
) -> Plan:
    """The plan of a call, in the dtype that autocast gives it; P: proj_size."""
    if (why := why_torch(input, context)) is not None:
        return on_torch(why)
    dtype, chunk = autocast_dtype(input), chunk_of(recompute, input, B, H)
    groups = groups_of(input, (B, H), num_layers, bool(P or chunk or bidirectional))
    directions = 2 if bidirectional else 1
    proj = P if P and projects_in_kernel(input, (B, H, P), directions) else 0
    plan = choose(dtype, B, H, input.device, full_precision(), directions, groups[0], proj)
    if groups[0] > 1 and len(groups) > 1:
        plan = replace(plan, why=f"{plan.why}; the launches have {', '.join(map(str, groups))} layers")
    return with_memory_estimate(plan, dtype, H, P, chunk)


def plan_for_one_step(input: Tensor, ieee: bool, context: Context = PLAIN) -> Plan:
    """The plan of a call with one step and without gradients. ieee: float32 products in full precision."""
    if (why := why_torch(input, context)) is not None:
        return on_torch(why)
    return choose_one_step(autocast_dtype(input), input.device, ieee)
