"""Session: a model that is called one step at a time, with its state inside and, on CUDA, as a replayed CUDA graph."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .kernels.environment import WHY_NO_TRITON
from .kernels.layout import StepWeights
from .lstm import LSTM, LSTMCell
from .quantized import QuantizedLSTM
from .route import autocast_dtype
from .weights import weights_of

if WHY_NO_TRITON is None:
    from .kernels import exchange, one_step

Step = Callable[[Tensor, Any], tuple[Any, Any]]


class Session:
    """Runs a model one step after another and keeps its state.

        session = fused_lstm.Session(lstm, batch=1)
        for x in stream:  # (1, I)
            y = session(x)  # (1, D*Hout)
        session.reset()

    A call on CUDA replays a CUDA graph, which was captured when the session was made: it allocates nothing, waits for
    nothing, and costs the host the replay and one copy of the input, or none if `session.x` is filled in place. The
    step is made without gradients and in evaluation mode. On the CPU, and where a model cannot be captured, each call
    runs the model; session.why says so.

    The graph reads the weights where they lie: it sees what is written into them, and nothing of a module that is moved
    or given others.

    Args:
        model: an LSTM, an LSTMCell, a Recurrent, torch.nn's of the kind, or any module that is called as
            `model(x, hx)`, with hx None at first, and returns (y, hx); x and y are those of one step. The states in hx,
            tensors nested as the model likes, have the batch rows in their last dimension but one.
        batch: B, rows of every call.
        example: x of one step. Of torch.nn's kinds and ours it is (B, I), of the weights' dtype and device, if it is
            left out; another model needs it.
        hx: the state at the beginning and after a reset, as the model takes it; None: what is zero everywhere.
        graph: False runs the model at each call on CUDA, too.

    Raises:
        ValueError: a batch below 1, a model without an example, or an example or hx of other rows.
    """

    def __init__(
        self, model: nn.Module, batch: int, *, example: Tensor | None = None, hx: Any = None, graph: bool = True
    ) -> None:
        if batch < 1:
            raise ValueError(f"a session has at least one batch row, got batch={batch}")
        self.model, self.batch, self.turn = model, batch, 0
        self.x = example_of(model, batch) if example is None else example.detach().clone()
        self.step = step_of(model)
        with evaluating(model):
            _, after = self.step(self.x, hx)
        tensors, self.structure = tree_flatten(after if hx is None else hx)
        self.initial = [torch.zeros_like(t) if hx is None else t.detach().clone() for t in tensors]
        for state in self.initial:
            if state.dim() < 2 or state.shape[-2] != batch:
                raise ValueError(
                    f"the last dimension but one of a state is the batch rows, {batch} of this session; got a state of "
                    f"{tuple(state.shape)}"
                )
        # Of a graph there are two, by turns read and written; otherwise one.
        self.states = [[state.clone() for state in self.initial]]
        self.why: str | None = None
        if not graph:
            self.why = "graph=False: each call runs the model"
        elif not has_graphs(self.x.device):
            self.why = f"{self.x.device.type} tensors have no CUDA graphs: each call runs the model"
        else:
            self.capture()

    def __call__(self, x: Tensor | None = None) -> Any:
        """Runs a step.

        Args:
            x: as the example; None: what has been written into `session.x`.

        Returns:
            y of the step. With a graph it lies in the session's own memory, which the call after the next overwrites.

        Raises:
            ValueError: x of another shape or dtype.
        """
        own = self.x
        if x is not None and x is not own:
            if x.shape != own.shape or x.dtype != own.dtype:
                raise ValueError(
                    f"the session takes {own.dtype} of shape {tuple(own.shape)}, got {x.dtype} of {tuple(x.shape)}"
                )
            own.copy_(x, non_blocking=True)
        if self.why is not None:
            with evaluating(self.model):
                y, after = self.step(own, self.hx)
            self.states = [tree_flatten(after)[0]]
            return y
        turn = self.turn
        self.replays[turn]()
        self.turn = 1 - turn
        return self.outputs[turn]

    @property
    def hx(self) -> Any:
        """The state, as the model takes it; with a graph the session's own memory."""
        return tree_unflatten(self.states[self.turn], self.structure)

    @hx.setter
    def hx(self, hx: Any) -> None:
        given, structure = tree_flatten(hx)
        shapes = [tuple(state.shape) for state in self.initial]
        if structure != self.structure or [tuple(state.shape) for state in given] != shapes:
            raise ValueError(f"the state of this session is {self.structure} of shapes {shapes}")
        self.write(given)

    def reset(self, rows: Any = None) -> None:
        """Sets the state of batch rows to that of the beginning.

        Args:
            rows: which, as (B,) bool, as a list or a tensor of numbers, or as one number; None: all. Numbers on a CUDA
                device are looked at, which waits for it; bool is not.

        Raises:
            ValueError, IndexError: rows that there are not.
        """
        which = rows_of(rows, self.batch, self.x.device)[:, None]
        states = self.states[self.turn]
        self.write([torch.where(which, initial, state) for initial, state in zip(self.initial, states, strict=True)])

    def write(self, states: list[Tensor]) -> None:
        """Makes these tensors the state."""
        if self.why is not None:
            self.states = [[state.detach().clone() for state in states]]
            return
        with torch.no_grad():
            for own, state in zip(self.states[self.turn], states, strict=True):
                own.copy_(state)

    def capture(self) -> None:
        """Captures a step twice: from the first state to the second, and back."""
        self.states.append([state.clone() for state in self.initial])
        first, second = self.states
        steps = [self.step_between(*both) for both in ((first, second), (second, first))]
        try:
            self.outputs, self.replays, memory = captured(steps, self.x.device)
            self.kept = steps, memory  # what the graphs read and write, beside the states, stays with the session
        except RuntimeError as error:
            self.why = f"no CUDA graph of this model ({str(error).partition(chr(10))[0]}): each call runs it"
            warnings.warn(f"fused_lstm.Session: {self.why}", stacklevel=3)
        self.write(self.initial)

    def step_between(self, states: list[Tensor], to: list[Tensor]) -> Callable[[], Any]:
        """A step of the model that takes and leaves its state where it is said, and returns y."""
        if (step := in_place(self.model, self.x, states, to)) is not None:
            return step

        def step_and_copy() -> Any:
            with evaluating(self.model):
                y, after = self.step(self.x, tree_unflatten(states, self.structure))
                for own, state in zip(to, tree_flatten(after)[0], strict=True):
                    own.copy_(state)
            return y

        return step_and_copy


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def captured(steps: list[Callable[[], Any]], device: torch.device) -> tuple[list[Any], list[Callable[[], None]], Any]:
    """What steps on a device return, as CUDA graphs, the replays of these, which have to be called in turn, and memory
    that they take, which must stay as long."""
    kept: exchange.Kept = {}
    graphs, outputs = [], []
    with torch.cuda.device(device), exchange.owned(kept):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Before the capture, which can load no kernel. Between captures nothing may run: launches take turns in the
        # memory by which they exchange.
        with torch.cuda.stream(stream):
            for step in steps * 2:
                step()
        torch.cuda.current_stream().wait_stream(stream)
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append(step())
            graphs.append(graph)
    return outputs, [graph.replay for graph in graphs], kept


def in_place(model: Any, x: Tensor, states: list[Tensor], to: list[Tensor]) -> Callable[[], Tensor] | None:
    """The step of an LSTM or an LSTMCell as the launch of its kernel alone, which leaves its results where they are to
    be; None for any other model, or where another way runs it."""
    if type(model) not in (LSTM, QuantizedLSTM, LSTMCell) or model._forward_hooks or model._forward_pre_hooks:
        return None
    cell = isinstance(model, LSTMCell)
    with torch.no_grad():
        plan = model.plan(x if cell else x.unsqueeze(int(model.batch_first)))
    if plan.mode != "one step" or autocast_dtype(x) != x.dtype:
        return None
    h0, c0, hn, cn = (state[None] if cell else state for state in (*states, *to))
    flat, scales = ([*model._parameters.values()], None) if cell else model._weights()
    of_all = weights_of([weight.detach() for weight in flat if weight is not None], bool(model.bias), len(h0))
    weights = StepWeights.of(of_all, scales or ())
    y = x.new_empty(len(x), plan.directions * h0.shape[2])

    def step() -> Tensor:
        one_step.one_step(x, h0, c0, weights, plan=plan, out=(y, hn, cn))
        return y

    return step


def step_of(model: nn.Module) -> Step:
    """A model's step as (x, hx) -> (y, hx), x and y without a dimension of time."""
    if isinstance(model, nn.RNNBase):
        time = int(model.batch_first)

        def step(x: Tensor, hx: Any) -> tuple[Any, Any]:
            y, after = model(x.unsqueeze(time), hx)
            return y.squeeze(time), after

        return step
    if isinstance(model, nn.RNNCellBase):

        def step_of_cell(x: Tensor, hx: Any) -> tuple[Any, Any]:
            after = model(x, hx)
            return after[0] if isinstance(after, tuple) else after, after

        return step_of_cell
    return model


def example_of(model: nn.Module, batch: int) -> Tensor:
    """Zeros as x of one step."""
    if not isinstance(model, nn.RNNBase | nn.RNNCellBase):
        raise ValueError(
            f"what {type(model).__name__} takes for a step is not known: Session(model, batch, example=x) with an x of "
            f"one step"
        )
    weight = next(model.parameters())
    return torch.zeros(batch, model.input_size, dtype=weight.dtype, device=weight.device)


def rows_of(rows: Any, batch: int, device: torch.device) -> Tensor:
    """(B,) bool of rows as Session.reset() takes them."""
    if rows is None:
        return torch.ones(batch, dtype=torch.bool, device=device)
    rows = torch.as_tensor(rows)
    if rows.dtype == torch.bool:
        if rows.shape != (batch,):
            raise ValueError(f"rows as bool have shape ({batch},), got {tuple(rows.shape)}")
        return rows.to(device)
    if rows.is_floating_point() or rows.is_complex():
        raise ValueError(f"rows are bool or integers, got {rows.dtype}")
    # On the host: a number that is out of range would end the CUDA context.
    which = torch.zeros(batch, dtype=torch.bool)
    which[rows.flatten().cpu()] = True
    return which.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it a model is in evaluation mode, and nothing has a gradient."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
