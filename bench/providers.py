"""What is measured: each provider turns an nn.LSTM, or a Recurrent, into a module with the same weights and the same
call."""

import copy
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_lstm
from fused_lstm import route
from fused_lstm.chunks import CHUNK

from . import memory
from .cases import MEMORY, Case
from .timing import graphed

BASELINE = "nn.LSTM"
# torch's own modules of a cell.
OF_CELL = {"gru": ("nn.GRU", nn.GRU), "rnn_tanh": ("nn.RNN", nn.RNN)}

# Ours are the kernels, also where the model says that cuDNN would be faster.
route.LARGE = math.inf


def baseline_of(case: Case) -> str:
    """What stands beside a provider in the table: torch's own module of the cell, or where it has none nn.LSTM."""
    return OF_CELL[case.cell][0] if case.cell in OF_CELL else BASELINE


@dataclass(frozen=True)
class Provider:
    """build: makes a module of an nn.LSTM, called as module(x, hx) -> y, (hn, cn), with nn.LSTM's parameter names; or
    of a Recurrent, called as that.
    runs: whether it can run a case at all. package: what must be installed for it."""

    build: Callable[[nn.LSTM], nn.Module]
    runs: Callable[[Case], bool] = lambda case: True
    package: str | None = None

    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def copied(lstm: nn.RNNBase) -> nn.RNNBase:
    """A copy with its weights in one buffer: deepcopy() parts them, and cuDNN then copies all of them at each call."""
    module = copy.deepcopy(lstm)
    module.flatten_parameters()
    return module


def fused(lstm: nn.LSTM) -> nn.Module:
    """fused_lstm.LSTM with the weights of `lstm`; of a Recurrent a copy."""
    module = copied(lstm)
    fused_lstm.swap(module)
    return module


def recomputing(lstm: nn.LSTM) -> nn.Module:
    """The same, with its states kept between chunks of steps alone."""
    module = fused(lstm)
    module.recompute = True
    return module


def quantized(lstm: nn.LSTM) -> nn.Module:
    """The same with weights of int8."""
    module = fused(lstm)
    fused_lstm.quantize(module)
    return module


class Checkpointed(nn.LSTM):
    """nn.LSTM on one chunk of steps after the other, each under torch.utils.checkpoint; dense input."""

    recompute = CHUNK  # steps of a chunk

    def forward(self, x, hx):
        outputs = []
        for part in x.split(self.recompute):
            memory.holds(part, *hx)  # checkpoint() has its arguments itself
            y, hx = checkpoint(super().forward, part, hx, use_reentrant=False)
            outputs.append(y)
        return torch.cat(outputs), hx


def checkpointed(lstm: nn.LSTM) -> nn.Module:
    """nn.LSTM with the weights of `lstm`, Checkpointed."""
    module = copied(lstm)
    module.__class__ = Checkpointed
    return module


class Graphed(nn.Module):
    """One step of a module as a CUDA graph, which keeps the state from call to call; on the CPU the module itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.replay = module, None

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.replay is None:
            self.x, self.hx = x.clone(), (hx[0].clone(), hx[1].clone())
            self.step()  # compiles
            self.replay = graphed(self.step, x.device)
        if hx[0] is not self.hx[0]:
            self.keep(hx)
        self.x.copy_(x)
        self.replay()
        return self.y.clone(), self.hx

    def step(self) -> None:
        self.y, hx = self.module(self.x, self.hx)
        self.keep(hx)

    def keep(self, hx: tuple[Tensor, Tensor]) -> None:
        for place, state in zip(self.hx, hx, strict=True):
            place.copy_(state)


class InSession(nn.Module):
    """A module as a Session, which keeps the state from call to call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.session = module, None

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.session is None:
            self.session = fused_lstm.Session(self.module, x.shape[1])
        if hx is not self.hx:
            self.session.hx = hx
        y = self.session(x[0])[None].clone()
        self.hx = self.session.hx
        return y, self.hx

    hx: Any = None


def copy_parameters(module: nn.Module, of: nn.Module) -> None:
    """Gives a module parameters of the same names and values as another one's."""
    for name, parameter in of.named_parameters():
        module.register_parameter(name, nn.Parameter(parameter.detach().clone()))


class Stack(nn.Module):
    """Layers and directions over a recurrence of one layer, which each subclass has its own of; dense input."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.layers, self.directions = lstm.num_layers, 2 if lstm.bidirectional else 1
        copy_parameters(self, lstm)

    def layer(self, x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, B, I), h0 and c0 (B, H) and weight_ih, weight_hh, bias_ih, bias_hh to y (T, B, H), hn and cn (B, H)."""
        raise NotImplementedError

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        ends = []
        for layer in range(self.layers):
            outputs = []
            for direction in range(self.directions):
                suffix = f"_l{layer}" + "_reverse" * direction
                weights = [getattr(self, f"{kind}_{of}{suffix}") for kind in ("weight", "bias") for of in ("ih", "hh")]
                k = len(ends)
                y, *end = self.layer(x.flip(0) if direction else x, hx[0][k], hx[1][k], *weights)
                outputs.append(y.flip(0) if direction else y)
                ends.append(end)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        hn, cn = (torch.stack(states) for states in zip(*ends, strict=True))
        return x, (hn, cn)


def cell(input_gates: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (input_gates + h @ weight_hh.t()).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class CompiledCell(Stack):
    """What one writes who wants another cell: a Python loop over a cell that torch.compile has fused."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__(lstm)
        torch.compiler.reset()  # or it stops compiling after a few shapes, without a word
        self.cell = torch.compile(cell, fullgraph=True, dynamic=False)

    def layer(self, x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        h, c, y = h0, c0, []
        for input_gates in F.linear(x, weight_ih, bias_ih + bias_hh):
            h, c = self.cell(input_gates, h, c, weight_hh)
            y.append(h)
        return torch.stack(y), h, c


class Looped(nn.Module):
    """The same for any cell: a Python loop over the function of a Recurrent of one layer and direction."""

    def __init__(self, recurrent: fused_lstm.Recurrent, compiled: bool) -> None:
        super().__init__()
        self.cell, self.compiled = recurrent.cell, None
        copy_parameters(self, recurrent)
        if compiled:
            torch.compiler.reset()  # as above
            self.compiled = torch.compile(self.step, fullgraph=True, dynamic=False)

    def step(self, of_input: Tensor, states: tuple[Tensor, ...], weight_hh: Tensor, bias_hh: Tensor, vectors: Any):
        """h and the other states after a step."""
        parts = of_input, F.linear(states[0], weight_hh, bias_hh)
        x, r = (part.chunk(len(self.cell.gates), -1) for part in parts)
        return self.cell.on_flat(*x, *r, *states, *vectors)

    def forward(self, x: Tensor, hx: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        weight_ih, weight_hh, bias_ih, bias_hh, *vectors = self.parameters()
        step, y = self.compiled or self.step, []
        states = (hx[0],) if isinstance(hx, Tensor) else tuple(state[0] for state in hx)
        for of_input in F.linear(x, weight_ih, bias_ih):
            states = step(of_input, states, weight_hh, bias_hh, vectors)
            y.append(states[0])
        ends = tuple(state[None] for state in states)
        return torch.stack(y), ends if self.cell.states else ends[0]


def compiled_cell(module: nn.RNNBase) -> nn.Module:
    return Looped(module, True) if isinstance(module, fused_lstm.Recurrent) else CompiledCell(module)


class TorchRL(Stack):
    """The Triton kernels behind LSTMModule(recurrent_backend="triton"): batch first, a reset value for each step."""

    def layer(self, x, h0, c0, *weights):
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        x = x.transpose(0, 1).contiguous()
        h_reset, c_reset = (s[:, None].expand(-1, x.shape[1], -1).contiguous() for s in (h0, c0))
        never = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
        y, _, hn, cn = lstm_triton(x, h_reset, c_reset, *weights, never, input_precision="tf32" if tf32 else "ieee")
        return y.transpose(0, 1), hn, cn


class FlashRNN(Stack):
    """FlashRNN with one head, which is a plain LSTM; its fused CUDA kernels take the product of the input ready."""

    backend = "cuda_fused"

    def layer(self, x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
        from flashrnn import flashrnn

        B, H = h0.shape
        input_gates = F.linear(x, weight_ih).transpose(0, 1).reshape(B, -1, 4, 1, H)
        weight = weight_hh.view(4, 1, H, H)
        bias = (bias_ih + bias_hh).view(4, 1, H)
        state = torch.stack([h0, c0])[:, :, None, None]
        dtype = str(x.dtype).removeprefix("torch.")
        y, end = flashrnn(input_gates, weight, bias, state, "lstm", backend=self.backend, dtype=dtype)
        return y[0, :, :, 0].transpose(0, 1), end[0, :, 0, 0], end[1, :, 0, 0]


def _remembers(case: Case) -> bool:
    return case in MEMORY


def _step_on_cuda(case: Case) -> bool:
    return case.mode == "one step" and torch.cuda.is_available()


def _one_layer(case: Case) -> bool:
    return case.form == "dense" and case.layers == case.directions == 1 and not (case.proj or case.cell)


PROVIDERS = {
    "fused_lstm": Provider(fused),
    "fused_lstm, recompute": Provider(recomputing, runs=_remembers),
    "fused_lstm, int8": Provider(quantized, lambda case: case.weights == "int8"),
    "nn.LSTM, checkpointed": Provider(checkpointed, runs=_remembers),
    "fused_lstm, CUDA graph": Provider(lambda lstm: Graphed(fused(lstm)), _step_on_cuda),
    "fused_lstm, session": Provider(lambda lstm: InSession(fused(lstm)), lambda case: case.mode == "one step"),
    "nn.LSTM, CUDA graph": Provider(lambda lstm: Graphed(copied(lstm)), _step_on_cuda),
    "compiled cell": Provider(compiled_cell, lambda case: case.form == "dense" and not (case.proj or _remembers(case))),
    "TorchRL": Provider(TorchRL, lambda case: _one_layer(case) and case.torch_dtype == torch.float32, "torchrl"),
    "FlashRNN": Provider(FlashRNN, lambda case: _one_layer(case) and case.dtype != "tf32", "flashrnn"),
}
