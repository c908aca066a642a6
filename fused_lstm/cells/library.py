"""The cells that come with fused_lstm. Their equations are their code.

Greff, Srivastava, Koutník, Steunebrink & Schmidhuber 2017, "LSTM: A Search Space Odyssey" (https://arxiv.org/abs/1503.04069)
compare the vanilla LSTM with eight variants, each of which leaves out, couples or adds one thing: GREFF has all nine by
the paper's names. The paper's z is g here, its y is h.
"""

from typing import Any

import torch
from torch import sigmoid, tanh
from torch.nn.functional import logsigmoid

from .definition import Cell, cell


@cell(gates="ifgo", state="c", params="pi pf po")
def vanilla(x: Any, r: Any, s: Any, p: Any) -> Any:
    """The LSTM with peepholes: the input and the forget gate also see the cell before the step, the output gate the one
    after it. V of the paper; Gers & Schmidhuber 2000, "Recurrent nets that time and count"."""
    i, f = sigmoid(x.i + r.i + p.pi * s.c), sigmoid(x.f + r.f + p.pf * s.c)
    c = tanh(x.g + r.g) * i + s.c * f
    o = sigmoid(x.o + r.o + p.po * c)
    return tanh(c) * o, c


@cell(gates="fgo", state="c", params="pf po")
def nig(x: Any, r: Any, s: Any, p: Any) -> Any:
    """No input gate: i = 1. NIG of the paper."""
    f = sigmoid(x.f + r.f + p.pf * s.c)
    c = tanh(x.g + r.g) + s.c * f
    o = sigmoid(x.o + r.o + p.po * c)
    return tanh(c) * o, c


@cell(gates="igo", state="c", params="pi po")
def nfg(x: Any, r: Any, s: Any, p: Any) -> Any:
    """No forget gate: f = 1. NFG of the paper; the LSTM of Hochreiter & Schmidhuber 1997 had none."""
    i = sigmoid(x.i + r.i + p.pi * s.c)
    c = tanh(x.g + r.g) * i + s.c
    o = sigmoid(x.o + r.o + p.po * c)
    return tanh(c) * o, c


@cell(gates="ifg", state="c", params="pi pf")
def nog(x: Any, r: Any, s: Any, p: Any) -> Any:
    """No output gate: o = 1. NOG of the paper."""
    i, f = sigmoid(x.i + r.i + p.pi * s.c), sigmoid(x.f + r.f + p.pf * s.c)
    c = tanh(x.g + r.g) * i + s.c * f
    return tanh(c), c


@cell(gates="ifgo", state="c", params="pi pf po")
def niaf(x: Any, r: Any, s: Any, p: Any) -> Any:
    """No input activation: the cell's input is what it is, without a tanh. NIAF of the paper."""
    i, f = sigmoid(x.i + r.i + p.pi * s.c), sigmoid(x.f + r.f + p.pf * s.c)
    c = (x.g + r.g) * i + s.c * f
    o = sigmoid(x.o + r.o + p.po * c)
    return tanh(c) * o, c


@cell(gates="ifgo", state="c", params="pi pf po")
def noaf(x: Any, r: Any, s: Any, p: Any) -> Any:
    """No output activation: the output gate lets the cell out as it is, without a tanh. NOAF of the paper."""
    i, f = sigmoid(x.i + r.i + p.pi * s.c), sigmoid(x.f + r.f + p.pf * s.c)
    c = tanh(x.g + r.g) * i + s.c * f
    o = sigmoid(x.o + r.o + p.po * c)
    return c * o, c


@cell(gates="ifgo", state="c")
def lstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """nn.LSTM's cell, whose state_dict loads. NP of the paper: no peepholes."""
    i, f, g, o = sigmoid(x.i + r.i), sigmoid(x.f + r.f), tanh(x.g + r.g), sigmoid(x.o + r.o)
    c = f * s.c + i * g
    return o * tanh(c), c


@cell(gates="fgo", state="c", params="pf po")
def cifg(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Coupled input and forget gate: i = 1 - f, so that a cell takes in as much as it forgets. CIFG of the paper."""
    f = sigmoid(x.f + r.f + p.pf * s.c)
    c = tanh(x.g + r.g) * (1 - f) + s.c * f
    o = sigmoid(x.o + r.o + p.po * c)
    return tanh(c) * o, c


@cell(gates="ifgo", state="c i f o", params="pi pf po", feedback="ifo")
def fgr(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Full gate recurrence: each gate sees all three gates of the step before, through nine recurrent matrices more.
    FGR of the paper; Hochreiter & Schmidhuber 1997 had it."""
    i, f = sigmoid(x.i + r.i + p.pi * s.c), sigmoid(x.f + r.f + p.pf * s.c)
    c = tanh(x.g + r.g) * i + s.c * f
    o = sigmoid(x.o + r.o + p.po * c)
    return tanh(c) * o, c, i, f, o


@cell(gates="rzn")
def gru(x: Any, r: Any, s: Any, p: Any) -> Any:
    """torch.nn.GRU's cell, whose state_dict loads. Cho et al. 2014 (https://arxiv.org/abs/1406.1078), with the reset
    gate on the recurrent product, as torch has it."""
    reset, z = sigmoid(x.r + r.r), sigmoid(x.z + r.z)
    n = tanh(x.n + reset * r.n)
    return (1 - z) * n + z * s.h


@cell(gates="a")
def rnn_tanh(x: Any, r: Any, s: Any, p: Any) -> Any:
    """torch.nn.RNN's cell with tanh, whose state_dict loads. Elman 1990."""
    return tanh(x.a + r.a)


@cell(gates="ifgo", state="c n m")
def slstm(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Exponential input and forget gates, with a normaliser n and a stabiliser m that keeps them from overflow. sLSTM
    of Beck et al. 2024, "xLSTM" (https://arxiv.org/abs/2405.04517). A normaliser of zero is a first step: m = i."""
    i, f = x.i + r.i, logsigmoid(x.f + r.f) + s.m
    m = torch.where(s.n == 0, i, torch.maximum(f, i))
    i, f = torch.exp(i - m), torch.exp(f - m)
    c = f * s.c + i * tanh(x.g + r.g)
    n = torch.clamp(f * s.n + i, min=1.0)
    return sigmoid(x.o + r.o) * c / n, c, n, m


GREFF: dict[str, Cell] = {"V": vanilla, "NIG": nig, "NFG": nfg, "NOG": nog, "NIAF": niaf, "NOAF": noaf}
GREFF |= {"NP": lstm, "CIFG": cifg, "FGR": fgr}
