"""One row: a provider on a case, held to the parity rule first and then timed beside nn.LSTM, or torch's own module of
the case's cell."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_lstm
from tests import parity

from . import memory, store
from .cases import Case
from .providers import OF_CELL, PROVIDERS, Looped, baseline_of
from .timing import Call, alternate, on_host

# Gold is float64 on the CPU: at the full T it would take longer than the measurement.
CHECKED_STEPS = 8
COPY = "weight copy"


class Refused(Exception):
    """A result that breaks the parity rule."""


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Sets cuDNN's float32 switch to TF32 for "tf32", to IEEE for every other dtype.

    torch reads the switch under two names, cudnn.rnn.fp32_precision and the older cudnn.allow_tf32, which must agree.
    The one for matrix products outside cuDNN stays as it is: what a user of nn.LSTM gets hangs on cuDNN's alone.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.rnn.fp32_precision == "tf32"

    def switch(tf32: bool) -> None:
        cudnn.allow_tf32 = tf32  # first: it sets the new name too, and to "none" where IEEE is meant
        cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"

    switch(dtype == "tf32")
    try:
        yield
    finally:
        switch(before)


class Alternating(nn.Module):
    """A stack of modules of one layer, of which the first goes back in time, the next forward, and so on by turns;
    called as nn.LSTM with as many layers."""

    def __init__(self, layers: list[nn.LSTM]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def flatten_parameters(self) -> None:
        for layer in self.layers:
            layer.flatten_parameters()

    def plan(self, x: Tensor) -> Any:
        """The plan of the first layer; for layers of fused_lstm."""
        return self.layers[0].plan(x)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        ends = []
        for layer, *state in zip(self.layers, *(s.split(1) for s in hx), strict=True):
            x, end = layer(x.flip(0), tuple(state))
            ends.append(end)
        hn, cn = (torch.cat(states) for states in zip(*ends, strict=True))
        return x.flip(0) if len(self.layers) % 2 else x, (hn, cn)


def build(
    case: Case, device: torch.device, drawn: torch.device | None = None
) -> tuple[nn.Module, Tensor | PackedSequence, tuple[Tensor, ...]]:
    """Returns nn.LSTM, Alternating or Recurrent, with the case's weights, the input x (T, B, I), packed if the case is,
    and hx = (h0, c0) or the states of its cell, the same at every call.

    drawn: where the random numbers come from; the CPU by default, whose numbers gold has too.
    """
    torch.manual_seed(0)
    drawn = drawn or torch.device("cpu")
    options = {"bidirectional": case.directions == 2, "proj_size": case.proj, "device": drawn}
    if case.form == "alternating":
        features = [case.I, *[case.H] * (case.layers - 1)]
        lstm = Alternating([nn.LSTM(columns, case.H, **options) for columns in features])
    elif case.cell:
        lstm = fused_lstm.Recurrent(getattr(fused_lstm.cells, case.cell), case.I, case.H, device=drawn)
    else:
        lstm = nn.LSTM(case.I, case.H, case.layers, **options)
    # In training mode cuDNN would write in the forward what only a backward reads.
    lstm = lstm.to(device, case.torch_dtype).train(case.mode == "forward+backward")
    if case.weights:  # to what 8 bits hold, and once more quantized they stay so
        fused_lstm.swap(lstm)
        fused_lstm.quantize(lstm, case.weights)
        fused_lstm.swap(lstm, back=True)
    rows = case.layers * case.directions, case.B
    sizes = [(case.T, case.B, case.I), (*rows, case.out)]
    sizes += [(*rows, case.H)] * (len(lstm.cell.states) if case.cell else 1)
    x, h0, *others = (torch.randn(size, device=drawn).to(device, case.torch_dtype) for size in sizes)
    if case.cell:  # of which one may be a normaliser, and is above zero
        others = [state.abs() + 0.5 for state in others]
    if case.form == "packed":
        return lstm, pack_padded_sequence(x, lengths_of(case), enforce_sorted=False), (h0, *others)
    return lstm, x, (h0, *others)


def placed(module: nn.Module, like: nn.Module) -> nn.Module:
    """A module in the dtype and mode and on the device of another."""
    weight = next(like.parameters())
    return module.to(weight.device, weight.dtype).train(like.training)


def theirs(case: Case, module: nn.Module) -> nn.Module:
    """What a provider is held to, with the weights of a module of build(): nn.LSTM, torch's own module of a cell, or a
    loop over it in torch operations."""
    if not case.cell:
        return module
    if case.cell not in OF_CELL:
        return Looped(module, False)
    own = placed(OF_CELL[case.cell][1](case.I, case.H), module)
    own.load_state_dict(module.state_dict())
    return own


def baseline(case: Case, module: nn.Module, hx: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What a provider is timed beside, and its hx: baseline_of(case), with the weights of a module of build() where it
    can have them."""
    if not case.cell or case.cell in OF_CELL:
        return theirs(case, module), hx
    return placed(nn.LSTM(case.I, case.H), module), (hx[0], torch.zeros_like(hx[0]))


def lengths_of(case: Case) -> Tensor:
    """(B,) int64 on the CPU, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(case.B, generator=generator)
    if case.lengths == "uniform":
        return torch.randint(1, case.T + 1, (case.B,), generator=generator)
    if case.lengths == "one long":
        return torch.where(order == 0, case.T, max(1, case.T // 50))
    return torch.linspace(case.T, max(1, case.T // 8), case.B).long()[order]


def resets_of(case: Case) -> Tensor:
    """(T, B) bool on the CPU, the same at every call."""
    return torch.rand(case.T, case.B, generator=torch.Generator().manual_seed(0)) < 1 / 50


@lru_cache(maxsize=4)
def _gold(case: Case) -> dict[str, Tensor]:
    lstm, x, hx = build(case, torch.device("cpu"))
    twin = parity.twin(theirs(case, lstm), torch.float64)
    return parity.run(called(case, twin), x.double(), tuple(s.double() for s in hx))


def gold(case: Case) -> dict[str, Tensor]:
    """Every output and gradient of theirs() in float64, computed once for each shape and torch dtype."""
    dtype = "fp32" if case.dtype == "tf32" else case.dtype
    mode = case.mode if case.mode == "one step" else "forward+backward"
    return _gold(replace(case, mode=mode, dtype=dtype))


class Called(nn.Module):
    """A module called in another way than on a whole sequence; each subclass says how."""

    def __init__(self, module: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.module, self.keywords = module, keywords


class OneByOne(Called):
    """On one step after the other, as a server or an agent does that has only the past; reset: (T, B) bool, if any."""

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, reset = [], self.keywords.get("reset")
        for k in range(len(x)):
            if reset is not None:
                hx = tuple(torch.where(reset[k][:, None], 0, state) for state in hx)  # type: ignore[assignment]
            y, hx = self.module(x[k : k + 1], hx)
            outputs.append(y)
        return torch.cat(outputs), hx


class Packing(Called):
    """On padded rows, which are packed for it and padded again; lengths: (B,) int64 on the input's device."""

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        packed = pack_padded_sequence(x, self.keywords["lengths"].cpu(), enforce_sorted=False)
        y, hx = self.module(packed, hx)
        return pad_packed_sequence(y, total_length=len(x))[0], hx


class Keywords(Called):
    """With the keywords, which fused_lstm.LSTM takes."""

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.module(x, hx, **self.keywords)


class States(Called):
    """With all states in a tuple, h alone too, as nn.LSTM has them."""

    def forward(self, x: Tensor | PackedSequence, hx: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        y, ends = self.module(x, hx if len(hx) > 1 else hx[0])
        return y, (ends,) if isinstance(ends, Tensor) else ends


def called(case: Case, module: nn.Module) -> nn.Module:
    """The module as the case's mode, form and cell have it called."""
    device = next(module.parameters()).device
    ours = isinstance(module, fused_lstm.LSTM)
    if case.cell:
        return States(module)
    if case.mode == "one step":
        return OneByOne(module)
    if case.form == "lengths":
        return (Keywords if ours else Packing)(module, lengths=lengths_of(case).to(device))
    if case.form == "reset":
        return (Keywords if ours else OneByOne)(module, reset=resets_of(case).to(device))
    return module


def check(case: Case, provider: str, device: torch.device) -> None:
    """Holds a provider to the parity rule on the first steps of a case.

    Raises:
        Refused: with the result that breaks it, its error and the error that the rule allows.
    """
    case = replace(case, T=min(case.T, CHECKED_STEPS))
    lstm, x, hx = build(case, device)
    module = PROVIDERS[provider].build(lstm)
    if getattr(module, "recompute", False):
        module.recompute = CHECKED_STEPS // 2  # what goes by chunks is checked in a second one too
    backward = case.mode == "forward+backward"
    with torch.set_grad_enabled(backward):
        other = parity.run(called(case, theirs(case, lstm)), x, hx, backward=backward)
        ours = parity.run(called(case, module), x, hx, backward=backward)
    try:
        assert ours.keys() == other.keys(), f"results {sorted(ours)}, nn.LSTM's are {sorted(other)}"
        for name in other:
            parity.assert_close(name, ours[name], other[name], gold(case)[name], case.torch_dtype)
    except AssertionError as broken:
        raise Refused(str(broken)) from None


def step(case: Case, module: nn.Module, x: Tensor | PackedSequence, hx: tuple[Tensor, ...]) -> Call:
    """Returns the call to time, as the case's mode has it."""
    if case.mode != "forward+backward":
        return torch.no_grad()(lambda: module(x, hx))
    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    leaves = [leaf, *module.parameters()]
    dy = torch.randn((*leaf.shape[:-1], case.directions * case.out), device=leaf.device).to(leaf.dtype)

    def both() -> tuple[Tensor, ...]:
        y, _ = module(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf, hx)
        y = y.data if isinstance(y, PackedSequence) else y
        memory.holds(leaf, y)  # whoever calls has them
        return torch.autograd.grad(y, leaves, dy)

    return both


def copies_weights(case: Case, device: torch.device) -> bool:
    """Whether nn.LSTM copies all of its weights at each call: cuDNN takes them in one buffer, where torch lays those of
    bfloat16 never."""
    return device.type == "cuda" and case.dtype == "bf16"


def weight_copy(lstm: nn.LSTM) -> Call:
    """Returns that copy alone, as torch makes it: a buffer is cleared, then filled weight by weight."""
    weights = [weight.detach() for weight in lstm.parameters()]
    buffer = torch.empty(sum(weight.numel() for weight in weights)).to(weights[0])
    places = buffer.split([weight.numel() for weight in weights])

    def copy() -> Tensor:
        buffer.zero_()
        for place, weight in zip(places, weights, strict=True):
            place.view_as(weight).copy_(weight)
        return buffer

    return copy


class Steps(NamedTuple):
    """What is timed on one case: the calls of the provider and of the baseline on the same input, by name, and the
    modules which they call, with the same weights but for baseline(); the provider's Plan as a dict, None if it has
    none. Where the baseline copies its weights, the copy is timed with them, as COPY."""

    baseline: str
    calls: dict[str, Call]
    modules: dict[str, nn.Module]
    plan: dict[str, Any] | None

    def memory(self, provider: str, device: torch.device) -> dict[str, int | None]:
        """The part of a row that says what both take of memory."""
        found: dict[str, int | None] = {}
        for prefix, name in (("", provider), ("baseline_", self.baseline)):
            call, weights = self.calls[name], list(self.modules[name].parameters())
            found[f"{prefix}memory"] = memory.peak(call, device)
            found[f"{prefix}kept"] = memory.beside(memory.kept(call)[0], weights)
        return found


def steps(case: Case, provider: str, device: torch.device) -> Steps:
    """Returns the Steps of a provider on a case."""
    # For a time any numbers will do, and on a CPU those of a long case take longer to draw than the row may last.
    lstm, x, hx = build(case, device, drawn=device)
    module = PROVIDERS[provider].build(lstm)
    plan = asdict(module.plan(x)) if hasattr(module, "plan") else None
    name, (other, other_hx) = baseline_of(case), baseline(case, lstm, hx)
    calls = {provider: step(case, called(case, module), x, hx), name: step(case, called(case, other), x, other_hx)}
    if copies_weights(case, device):
        calls[COPY] = weight_copy(other)
    return Steps(name, calls, {provider: module, name: other}, plan)


def row(
    case: Case, provider: str, environment: dict[str, Any], status: str, why: str = "", **measured: Any
) -> dict[str, Any]:
    """Returns one row of a results file.

    status is "ok", or "refused" (broke the parity rule) or "failed", then with the reason in why. A row that is ok, and
    a refused one unless its why says that it was not timed, holds plan; ms and baseline_ms, the Times of the provider
    and of the baseline in milliseconds, side by side; host_ms and baseline_host_ms, the medians of on_host(), which
    are not in them (None on a CPU); copy_ms, the median of one copy of nn.LSTM's weights (None where it makes none);
    memory and baseline_memory, their peaks in bytes (None on a CPU); kept and baseline_kept, the bytes that their
    forward pass keeps for backward, input and output included and weights not; and clock, the GPU's in MHz after the
    last round.
    """
    key = {"case": asdict(case), "provider": provider, "baseline": baseline_of(case), "environment": environment}
    return key | {"status": status, "why": why} | measured


def measure(
    case: Case, provider: str, device: torch.device, environment: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Checks, then times for about `seconds`; returns the row. An exception becomes a row that says so.

    What breaks the parity rule is timed all the same: the row says both, and the time is worth what its reason allows.
    """
    status, why = "ok", ""
    try:
        with precision(case.dtype):
            try:
                check(case, provider, device)
            except Refused as broken:
                status, why = "refused", str(broken)
            timed = steps(case, provider, device)
            hosts = on_host(timed.calls, device)
            times = alternate(timed.calls, device, seconds, hosts)
            clock = store.clock() if device.type == "cuda" else None
            taken = timed.memory(provider, device)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"[:2000]
        if why:
            return row(case, provider, environment, status, f"{why}; not timed: {failure}")
        return row(case, provider, environment, "failed", failure)
    measured = {"ms": asdict(times[provider]), "baseline_ms": asdict(times[timed.baseline])}
    measured |= {"host_ms": hosts.get(provider), "baseline_host_ms": hosts.get(timed.baseline)}
    measured["copy_ms"] = times[COPY].median if COPY in times else None
    return row(case, provider, environment, status, why, plan=timed.plan, **measured, **taken, clock=clock)
