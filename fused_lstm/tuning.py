"""tune(): times the kernels' candidates and torch's own LSTM on the device at hand, and keeps which is the fastest."""

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, operators
from .call import Call
from .kernels import plan as kernels_plan
from .kernels.findings import CallForm, CallTime, Launch, Refused, findings_on, rounded
from .kernels.plan import Plan, alternatives, hardware_of
from .paths import RUN
from .route import Form, Route, call_form_of, form_of, on_layers, why_torch
from .tensors import prepared
from .weights import wide_weights

# How many of a form's candidates are timed in each pass, the best by the model.
MOST = 4
# Seconds that a timing takes at least.
SHORTEST = 0.1
# Of a result's largest value: a kernel that reads what is not yet written is off by far more.
TOLERANCE = {torch.bfloat16: 2**-4, torch.float16: 2**-7, torch.float32: 2**-7, torch.float64: 1e-9}

# Their place among the results of forward; backward has fewer.
GATES = 4


class Row(NamedTuple):
    """A line of a table: what was timed, its microseconds (a step of a kernel, or a whole call), None where it was
    refused, and a remark."""

    what: str
    us: float | None
    remark: str = ""


class Tuned(NamedTuple):
    """What tune() has found out; printed, a table. calls: the form of each call and what it takes from now on."""

    rows: list[Row]
    calls: dict[CallForm, CallTime]

    def __str__(self) -> str:
        def line(row: Row) -> str:
            time = "" if row.us is None else f"{row.us:,.2f}"
            return f"{time:>14}  {row.what}{f'  ({row.remark})' if row.remark else ''}"

        return "\n".join(["  microseconds", *map(line, self.rows)])


def tune(module: nn.Module, *args: Any, again: bool = False, progress: bool = True, **keywords: Any) -> Tuned:
    """Times what module(*args, **keywords) runs, and has every later call of its sizes take the fastest.

    For each fused_lstm.LSTM and LSTMCell in the module that the call reaches, with its own input: the best few
    candidates of the kernels by the model, forward and, where gradients are wanted, backward, each held to torch's
    operations first; then the whole call on the kernels and on torch's own LSTM. On a CUDA device the times are kept in
    a file beside Triton's cache, for the processes to come; what it has is not timed again, so that a run that was cut
    short goes on. module.plan(x) says what was measured. The module, its gradients and torch's generators stay as they
    are. The time of the day matters: tune on a device that does nothing else.

    Args:
        module: an LSTM, or a model that has some. args, keywords: of its call; with tensors that require gradients, or
            in training, both passes are timed, within torch.no_grad() forward alone.
        again: time also what is known.
        progress: show a bar and print the table.

    Returns:
        The times, as a Tuned.

    Raises:
        ValueError: the call reaches no LSTM of ours.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    calls: list[Call] = []
    with torch.random.fork_rng(devices), watching(calls.append):
        module(*args, **keywords)
        if not calls:
            raise ValueError("tune() found no fused_lstm.LSTM in this call; fused_lstm.swap(model) puts them there")
        tuned = Tuned([], {})
        for call in {form_of(call): call for call in calls}.values():
            rows, calls_of = tune_call(call, again, progress)
            tuned.rows.extend(rows)
            tuned.calls.update(calls_of)
    if progress:
        print(tuned)
    return tuned


@contextmanager
def watching(watch: Callable[[Call], object] | None) -> Iterator[None]:
    """Within it `watch` is shown every call of lstm() before it runs."""
    before, functional.watch = functional.watch, watch
    try:
        yield
    finally:
        functional.watch = before


def tune_call(call: Call, again: bool = False, progress: bool = False) -> Tuned:
    """tune() of one call."""
    from torch.hub import tqdm  # that of tqdm, or a plain one

    if call.scales is not None:  # what is timed are the kernels of wide weights
        call = call._replace(weights=wide_weights(call.weights, call.scales), scales=None)
    with watching(None):
        form = form_of(call)
        if not form.context.plain or why_torch(form.context, form.dtype, form.device) is not None:
            return Tuned([Row("torch's own LSTM", None, "the kernels do not serve such a call")], {})
        found, key = findings_on(hardware_of(form.device)), call_form_of(form)
        call = prepared(detached(call))
        work = launches_of(call, form)
        rows: list[Row] = []
        with tqdm(total=sum(len(plans) for _, plans in work) + 1, disable=not progress) as bar:
            for args, plans in work:
                for row in time_launch(args, plans, again):
                    rows.append(row)
                    bar.update(1)
            kernels_plan.forget_plans()
            if again or key not in found.calls:
                found.note_call(key, time_call(call, form))
                kernels_plan.forget_plans()
            bar.update(1)
        time = found.calls[key]
        rows += [Row("a call on the kernels", time.kernels), Row("a call on torch's own LSTM", time.torch)]
        return Tuned(rows, {key: time})


def detached(call: Call) -> Call:
    """A call on leaves of its own, whose gradients touch nobody else's."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    weights = [leaf(weight) for weight in call.weights]
    return call._replace(input=leaf(call.input), h0=leaf(call.h0), c0=leaf(call.c0), weights=weights, record=None)


def launches_of(call: Call, form: Form) -> list[tuple[operators.Launch, list[Plan]]]:
    """The arguments of each different launch of a call, with the plans to be timed for it."""
    seen: dict[Any, tuple[operators.Launch, list[Plan]]] = {}

    def noting(run: Callable[[Any], Any]) -> Callable[..., Any]:
        def noted(args: Any, **more: Any) -> Any:  # without them nothing is written over what is noted here
            dtype, B, *_ = operators.sizes_of(args)
            problem = operators.problem_of(args)
            if (problem, B) not in seen:
                seen[problem, B] = args, alternatives(dtype, B, problem, form.device, MOST)
            return run(args)

        return noted

    passes = operators.forward, operators.backward
    before = [operator.run for operator in passes]
    for operator in passes:
        operator.run = noting(operator.run)
    try:
        run(call, on_layers(form), form.context.saves)
    finally:
        for operator, own in zip(passes, before, strict=True):
            operator.run = own
    return list(seen.values())


def run(call: Call, route: Route, saves: bool) -> None:
    """A call, with its backward pass if there is one."""
    y, hn, cn, _ = RUN[route.path](call, route)
    if saves:
        tensors = [tensor for tensor in call.tensors() if tensor.requires_grad]
        torch.autograd.grad([y, hn, cn], tensors, [torch.ones_like(end) for end in (y, hn, cn)], allow_unused=True)


def time_launch(args: operators.Launch, plans: list[Plan], again: bool) -> Iterator[Row]:
    """Times a launch under each plan, unless it is known; refuses a kernel whose numbers are wrong."""
    problem, device, B = operators.problem_of(args), args.c0.device, args.c0.shape[1]
    found, steps = findings_on(hardware_of(device)), args.layout.steps(operators.gates_of(args).shape)
    run_pass, kernels, instead = operators.pass_of(args)
    right = None
    for plan in plans:
        launch = Launch(problem, rounded(B), plan.mode, plan.tiles(problem.backward))
        what, timed = str(launch.candidate), partial(run_pass, args, kernels, plan=plan)
        if launch.candidate in found.refused:
            yield Row(what, None, found.refused[launch.candidate])
        elif launch in found.times and not again:
            yield Row(what, found.times[launch], "known")
        else:
            right = right or run_pass(args, instead)
            try:
                if wrong := mismatch(timed(), right, args):
                    raise Refused(f"its numbers are wrong: {wrong}", lasts=True)
                found.note_time(launch, microseconds(timed) / steps)
                yield Row(what, found.times[launch])
            except Refused as refused:
                kernels_plan.refuse(device, launch.candidate, refused)
                yield Row(what, None, str(refused))


def mismatch(ours: Sequence[Tensor | None], right: Sequence[Tensor | None], args: operators.Launch) -> str:
    """By how much the results of a launch are off, in words; "" if they are right. Not looked at is what is not finite
    in torch's operations either, and what the kernels leave as the memory was: gates past a row's length."""
    for number, (result, gold) in enumerate(zip(ours, right, strict=True)):
        if result is None or gold is None or not gold.numel():
            continue
        looked_at = gold.isfinite()
        if args.layout.padded and number == GATES:
            looked_at &= ~args.layout.past(gold.shape)
        off = (result.double() - gold.double()).abs().nan_to_num(nan=torch.inf)[looked_at]
        largest = gold[looked_at].abs().max().item() if off.numel() else 0.0
        if off.numel() and (most := off.max().item()) > TOLERANCE[result.dtype] * max(1.0, largest):
            return f"result {number} is off by {most:.2e}"
    return ""


def time_call(call: Call, form: Form) -> CallTime:
    """Times a call on the kernels and on torch's own LSTM."""
    saves = form.context.saves
    kernels, on_torch = (microseconds(partial(run, call, route, saves)) for route in (on_layers(form), Route("torch")))
    return CallTime(kernels, on_torch, datetime.date.today().isoformat())


def microseconds(call: Callable[[], object]) -> float:
    """The median time of a call; on a CUDA device until its work is done."""
    from torch.utils.benchmark import Timer  # which takes long to import

    return 1e6 * Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=SHORTEST).median


def at_first_call(call: Call) -> None:
    """What FUSED_LSTM_TUNE=1 does before a call whose form has not been timed."""
    if torch.compiler.is_compiling() or (call.input.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    form = form_of(call)
    if not form.context.plain or why_torch(form.context, form.dtype, form.device) is not None:
        return
    if call_form_of(form) not in findings_on(hardware_of(form.device)).calls:
        with torch.random.fork_rng([call.input.device] if call.input.is_cuda else []):
            tune_call(call)


if os.environ.get("FUSED_LSTM_TUNE") == "1":
    functional.watch = at_first_call
