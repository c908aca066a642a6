"""Which way a call takes: decided once for each form of call, and looked up after that.

A Form holds all that a Route depends on: the same Form has the same Route for as long as the process runs, but when 256
others have been asked for since, it is decided again. Under torch.compile, torch.vmap and other transforms, and with
FakeTensors, it is decided at every call. Which plan a launch takes is no part of it: that is kernels/plan.py's.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import Call, Options
from .chunks import CHUNK, chunk_for, memory_of
from .context import Context, constant
from .kernels import plan as kernels_plan
from .kernels.choice import why_cudnn
from .kernels.findings import CallForm, CallTime, findings_on, rounded
from .kernels.plan import (
    Plan,
    choose,
    choose_one_step,
    hardware_of,
    in_kernel,
    kind_of,
    kind_of_weights,
    layers_together,
)
from .kernels.planned import on_torch, with_memory_estimate
from .kernels.tiles import Problem
from .recurrence import Recurrence
from .sequence import Sequence

# The switches of nn.LSTM's and of nn.LSTMCell's float32 products: on the way to the first torch.backends looks up a
# module at every step.
_OF_RNN: Any = torch.backends.cudnn.rnn
_OF_MATMUL: Any = torch.backends.cuda.matmul


class Form(NamedTuple):
    """All of a call that its route depends on.

    dtype: in which it runs, under autocast that one's. B: batch rows. P: proj_size.
    one_step: T is 1. cut: rows have lengths or resets, or are packed. record: all is asked for.
    time_first: the memory of the input has time in front, whatever batch_first says.
    ieee: float32 products in full precision.
    weights: "int8" or "fp8", of which weight_ih and weight_hh are; "" for the dtype, and under autocast.
    """

    options: Options
    context: Context
    device: torch.device
    dtype: torch.dtype
    B: int
    H: int
    P: int
    one_step: bool = False
    cut: bool = False
    record: bool = False
    time_first: bool = True
    ieee: bool = True
    weights: str = ""


class Route(NamedTuple):
    """How a call runs.

    path: "kernels"; "one step", a kernel of its own; "torch", its own LSTM; "in graph", the same as an operator; or
        "composed", torch operations step by step, where the others lack something.
    groups: how many layers each launch has, the first launch first.
    how: they run, where no row has an end or a reset of its own. Its sequence is batch first where the input runs as it
        lies, (B, T, I); otherwise the input is transposed if the call is batch_first.
    narrow: weights of 8 bits are multiplied as they are: in one step all, on the kernels' path weight_hh. Otherwise
        they are made wide first.
    """

    path: str
    groups: tuple[int, ...] = ()
    how: Recurrence = Recurrence(Sequence())
    narrow: bool = False


def form_of(call: Call) -> Form:
    """The Form of a call, under what it is made under here and now."""
    input, options, context = call.input, call.options, Context.of(*call.tensors())
    _, B, H = call.c0.shape
    return Form(
        options,
        context,
        input.device,
        autocast_dtype(input),
        B,
        H,
        call.P,
        # While a call is recorded sizes are tensors, at which nobody may look.
        not context.recorded and call.batch_sizes is None and call.steps == 1,
        call.cut,
        call.record is not None,
        not options.batch_first or input.transpose(0, 1).is_contiguous(),
        full_precision() if call.ieee is None else call.ieee,
        unless_autocast(kind_of_weights(call.weights[0].dtype)),
    )


def unless_autocast(weights: str) -> str:
    """Form.weights: under autocast those of 8 bits are made wide, which then has all tensors in its dtype."""
    return "" if torch._C._is_any_autocast_enabled() else weights


def route_of(call: Call) -> Route:
    """The Route of a call."""
    form = form_of(call)
    # FakeTensors have sizes that no dictionary takes.
    if form.context.plain and type(form.B) is int:
        return known_route(form)
    return decide(form)


def decide(form: Form) -> Route:
    path = path_of(form)
    return on_layers(form, path) if path in ("kernels", "composed") else Route(path)


def on_layers(form: Form, path: str = "kernels") -> Route:
    """The Route of a path that runs layer by layer, or several in a launch."""
    options, save = form.options, form.record or form.context.saves
    if path == "kernels" and takes_one_step(form):
        return Route("one step", how=Recurrence(Sequence(), ieee=form.ieee), narrow=form.weights != "")
    # Without gradients nothing is kept, with record all is asked for.
    chunk = chunk_of(form) if save and not form.record else 0
    one_by_one = bool(options.bidirectional or options.return_states or form.record or form.P or chunk)
    narrow = path == "kernels" and plan_of_layer(form).weights != ""
    groups = groups_of(form, one_by_one or path == "composed" or options.reset_to_hx or narrow)
    # The kernels take both orders; of chunks, cut in time, each is copied.
    batch_first = options.batch_first and not (path == "composed" or chunk or form.time_first)
    how = Recurrence(
        Sequence(reset_to_hx=options.reset_to_hx, batch_first=batch_first),
        project_in_kernel=form.P > 0 and projects_in_kernel(form),
        save=save,
        states=options.return_states,
        ieee=form.ieee,
        chunk=chunk,
        direct=True,
    )
    return Route(path, groups, how, narrow)


known_route = lru_cache(256)(decide)
kernels_plan.follow(known_route.cache_clear)


def path_of(form: Form) -> str:
    context, options = form.context, form.options
    if context.forward_mode:
        return "composed"
    if torch_plan(form) is None:
        return "kernels"
    if context.compiled and not (context.recorded or form.record):
        return "in graph"
    # torch.vmap has no rule for torch's own LSTM, and other transforms wrap the lengths that it reads.
    if options.return_states or form.record or context.batched or (context.transformed and form.cut):
        return "composed"
    return "torch"


def why_torch(context: Context, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's own LSTM serves a call, whatever its sizes; None where the kernels may."""
    if context.recorded:
        return "torch.jit.trace and torch.onnx.export know torch's operators alone: torch's own LSTM"
    return kernels_plan.why_torch(dtype, device)


def torch_plan(form: Form) -> Plan | None:
    """The plan that says why torch's own LSTM serves a call; None where the kernels do."""
    if (why := why_torch(form.context, form.dtype, form.device)) is not None:
        return on_torch(why)
    plan = plan_of_layer(form)
    if plan.mode == "torch":
        return plan
    asks_more = form.cut or form.record or form.options.return_states or chunk_of(form) or plan.weights
    if asks_more or not form.context.plain or type(form.B) is not int:
        return None  # torch's own LSTM lacks it, or has it slowly, or the call is made for every B
    if (known := measured(form)) is not None:
        time, evidence = known
        why = f"torch's own LSTM is faster here: {time.torch:,.0f} us a call, the kernels {time.kernels:,.0f}"
        return replace(on_torch(why), measured=evidence) if time.torch < time.kernels else None
    if form.device.type == "cuda" and form.B >= LARGE and not form.P:
        problem = Problem(kind_of(form.dtype, form.ieee), form.H, directions=form.options.directions)
        why = why_cudnn(plan, problem, form.B, hardware_of(form.device), form.context.saves)
        return None if why is None else on_torch(f"{why}: torch's own LSTM; fused_lstm.tune() measures which is faster")
    return None


def plan_of_layer(form: Form) -> Plan:
    """The plan of a single layer, its projection folded."""
    options = form.options
    several = options.directions, 1, 0, narrow_weights(form)
    if form.context.compiled:
        return compiled_plan(form.dtype, form.H, form.device, *several)
    B = form.B if type(form.B) is int else COMPILED_B
    return choose(form.dtype, B, form.H, form.device, form.ieee, *several)


def narrow_weights(form: Form) -> str:
    """The weights of 8 bits that the recurrence's kernels may multiply as they are, for what is asked of a call."""
    options = form.options
    asked = form.context.saves or form.record or options.return_states or options.reset_to_hx or form.P
    return "" if asked else form.weights


# Batch rows from which on cuDNN is estimated: with fewer it has forms of which the model says nothing.
LARGE: float = 256


def call_form_of(form: Form) -> CallForm:
    """What of a Form counts for the time of a call."""
    options, kind = form.options, kind_of(form.dtype, form.ieee)
    sizes = rounded(form.B), form.H, form.P, options.num_layers, options.directions
    return CallForm(kind, *sizes, form.context.saves, form.one_step, form.cut)


def measured(form: Form) -> tuple[CallTime, str] | None:
    """What tune() has measured for a call, and that in words; None for nothing, and in a graph, which is the same for
    every B."""
    if not form.context.plain or type(form.B) is not int:
        return None
    here = findings_on(hardware_of(form.device))
    for found in here.measured():
        if (time := found.calls.get(call_form_of(form))) is not None:
            device = found.device or form.device.type
            where = f"on this device, {device}," if found is here else f"on an {device} of ours"
            times = f"{time.kernels:,.0f} us a call, torch's own LSTM {time.torch:,.0f}"
            return time, f"measured {where} on {time.date}: {times}"
    return None


# A graph is to be the same for every B: what is decided for it is decided for a middling one.
COMPILED_B = 16


@constant
def compiled_plan(dtype: torch.dtype, H: int, device: torch.device, *several: Any) -> Plan:
    """The plan of a layer in a graph."""
    return choose(dtype, COMPILED_B, H, device, full_precision(), *several)


def takes_one_step(form: Form) -> bool:
    """Whether the kernel of one step serves a call on the kernels' path."""
    options = form.options
    if not form.one_step or options.use_dropout or form.context.saves or form.cut or form.record:
        return False
    return not options.return_states and one_step_plan(form).mode != "torch"


def one_step_plan(form: Form) -> Plan:
    """The plan of one step; in a graph that for a middling B."""
    B = form.B if type(form.B) is int and not form.context.compiled else COMPILED_B
    directions, layers = form.options.directions, form.options.num_layers
    sizes = directions, layers, form.P, form.weights
    return known_one_step(form.dtype, B, form.H, form.device, form.ieee, *sizes)


@constant
def known_one_step(*form: Any) -> Plan:
    """choose_one_step()."""
    return choose_one_step(*form)


def chunk_of(form: Form) -> int:
    """The steps of a chunk, 0 for none. In a graph they follow no memory: it would be compiled for one B."""
    if form.options.recompute is not None:
        return form.options.recompute
    memory = None if form.context.compiled else memory_of(form.device)
    return CHUNK if memory is None else chunk_for(form.dtype, form.B, form.H, memory)


def groups_of(form: Form, one_by_one: bool) -> tuple[int, ...]:
    """How many layers each launch has. one_by_one: each layer has one, whatever they cost."""
    num_layers = form.options.num_layers
    if one_by_one or num_layers == 1:
        return (1,) * num_layers
    if form.context.compiled:
        return compiled_groups(form.dtype, form.H, num_layers, form.device)
    return tuple(layers_together(form.dtype, form.B, form.H, num_layers, form.device, form.ieee))


@constant
def compiled_groups(dtype: torch.dtype, H: int, num_layers: int, device: torch.device) -> tuple[int, ...]:
    """groups_of() for a graph."""
    return tuple(layers_together(dtype, COMPILED_B, H, num_layers, device, full_precision()))


def projects_in_kernel(form: Form) -> bool:
    """Whether the kernels project, by the model."""
    directions = form.options.directions
    if form.context.compiled:
        return compiled_projects(form.dtype, form.H, form.P, form.device, directions)
    return in_kernel(form.dtype, form.B, form.H, form.P, form.device, form.ieee, directions)


@constant
def compiled_projects(dtype: torch.dtype, H: int, P: int, device: torch.device, directions: int) -> bool:
    """projects_in_kernel() for a graph."""
    return in_kernel(dtype, COMPILED_B, H, P, device, full_precision(), directions)


def plan_of(form: Form) -> Plan:
    """The plan of a call, as the module shows it."""
    if (plan := torch_plan(form)) is not None:
        return plan
    if takes_one_step(form):
        return one_step_plan(form)
    if (plan := plan_of_layer(form)).weights:
        return plan
    options, chunk = form.options, chunk_of(form)
    groups = groups_of(form, bool(form.P or chunk or options.bidirectional))
    proj = form.P if form.P and projects_in_kernel(form) else 0
    several = options.directions, groups[0], proj, "" if groups[0] > 1 or proj else narrow_weights(form)
    plan = choose(form.dtype, form.B, form.H, form.device, form.ieee, *several)
    if groups[0] > 1 and len(groups) > 1:
        plan = replace(plan, why=f"{plan.why}; the launches have {', '.join(map(str, groups))} layers")
    if (known := measured(form)) is not None:
        plan = replace(plan, measured=known[1])
    return with_memory_estimate(plan, form.dtype, form.H, form.P, chunk)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast, where it is on, has a tensor used."""
    if not torch._C._is_any_autocast_enabled():  # a look at a device's name takes longer
        return tensor.dtype
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)


@constant
def full_precision() -> bool:
    """Whether float32 products are not to be TF32: cuDNN's own switch says so, which is the one nn.LSTM follows."""
    return _OF_RNN.fp32_precision != "tf32"


@constant
def full_precision_of_cell() -> bool:
    """The same of nn.LSTMCell, whose products are torch's own: not TF32, unless torch is told so."""
    return _OF_MATMUL.fp32_precision != "tf32"
