"""Session: one step after another with the state inside, as the model itself takes them; also as CUDA graphs, for which
on the CPU a stand-in repeats what was captured."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_map

import fused_lstm
from fused_lstm import LSTM, LSTMCell, Recurrent, Session, cells, session
from fused_lstm.kernels.environment import interpreted

I, H = 5, 20  # noqa: E741


class Policy(nn.Module):
    """Two recurrent layers with layers around them; its state is nested as no layer's is."""

    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.cell = nn.Linear(I, 7), LSTM(7, H), LSTMCell(H, 3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(3, 2)

    def forward(self, x, hx=None):
        of_lstm, of_cell = (None, None) if hx is None else (hx["lstm"], hx["cell"][0])
        y, of_lstm = self.lstm(self.first(x)[None], of_lstm)
        h, c = self.cell(y[0], of_cell)
        return {"mean": self.head(self.drop(h)), "h": h}, {"lstm": of_lstm, "cell": [(h, c)]}


MODELS = {
    "LSTM": lambda: LSTM(I, H, 2),
    "LSTM, both directions, batch first": lambda: LSTM(I, H, bidirectional=True, batch_first=True),
    "LSTM with a projection": lambda: LSTM(I, H, 2, proj_size=3),
    "LSTMCell": lambda: LSTMCell(I, H),
    "Recurrent": lambda: Recurrent(cells.slstm, I, H),
    "nn.LSTM": lambda: nn.LSTM(I, H, 2, dropout=0.5),
    "nn.GRUCell": lambda: nn.GRUCell(I, H),
    "Policy": Policy,
}


@pytest.fixture(params=["no graph", "graph"])
def graph(request, monkeypatch):
    """Whether calls replay what was captured. On the CPU capturing and replaying are those of a stand-in: it repeats a
    step and copies its results to where those of the capture lie."""
    if request.param == "graph":
        monkeypatch.setattr(session, "captured", captured)
        monkeypatch.setattr(session, "has_graphs", lambda device: True)
    return request.param == "graph"


def captured(steps, device):
    outputs = [step() for step in steps]

    def replay_of(step, output):
        def replay():
            with torch.no_grad():
                for own, new in zip(leaves(output), leaves(step()), strict=True):
                    own.copy_(new)

        return replay

    return outputs, [replay_of(*each) for each in zip(steps, outputs, strict=True)], None


def module_steps(model, xs, hx, resets):
    """What a model gives step by step; resets: by step, the rows that begin anew, from zero."""
    step, outputs = session.step_of(model), []
    for t, x in enumerate(xs):
        for rows in resets.get(t, ()):
            hx = tree_map(
                partial(torch.Tensor.index_fill, dim=-2, index=torch.tensor(rows, device=x.device), value=0.0), hx
            )
        y, hx = step(x, hx)
        outputs.append(y)
    return outputs


def leaves(values):
    return tree_flatten(values)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("graph")
def test_equals_the_model_step_by_step(name, device):
    torch.manual_seed(0)
    model, B = MODELS[name]().to(device), 3
    example = torch.zeros(B, I, device=device) if name == "Policy" else None
    running = Session(model, B, example=example)
    assert (running.why is None) == session.has_graphs(running.x.device) and model.training
    xs, resets = torch.randn(9, B, I, device=device), {3: [[0]], 5: [[0, 2]], 7: [[0, 1, 2]]}
    ours = []
    for t, x in enumerate(xs):
        for rows in resets.get(t, ()):
            running.reset(rows if t != 3 else torch.tensor([True, False, False]))
        ours.append([y.clone() for y in leaves(running(x))])
    model.eval()
    with torch.no_grad():
        theirs = module_steps(model, xs, None, resets)
    for y, gold in zip(ours, theirs, strict=True):
        assert_close(y, leaves(gold))


def test_many_steps(graph, device):
    T = 50 if interpreted() else 1000
    model = LSTM(2, 3, 2, device=device).eval()
    running = Session(model, 2)
    xs = torch.randn(T, 2, 2, device=device)
    resets = {t: [[t % 2]] for t in range(0, T, 37)}
    with torch.no_grad():
        theirs = module_steps(model, xs, (torch.zeros(2, 2, 3, device=device),) * 2, resets)
    for t, x in enumerate(xs):
        for rows in resets.get(t, ()):
            running.reset(rows)
        assert_close(running(x), theirs[t])


def test_the_state(graph, device):
    model, x = LSTM(I, H, device=device).eval(), torch.randn(2, I, device=device)
    begin = torch.randn(1, 2, H, device=device), torch.randn(1, 2, H, device=device)
    running = Session(model, 2, hx=begin)
    with torch.no_grad():
        y, after = model(x[None], begin)
    running.x.copy_(x)
    assert_close(running(), y[0])
    assert_close(running.hx, after)
    running.reset(1)
    assert torch.equal(running.hx[0][:, 1], begin[0][:, 1])
    assert_close(running.hx[0][:, 0], after[0][:, 0])
    running.hx = begin
    assert_close(running(x), y[0])
    running.reset()
    assert all(map(torch.equal, running.hx, begin))
    kept = [state.clone() for state in running.hx]
    running(x)
    assert torch.equal(kept[0], begin[0])  # the state at the beginning is not written over


def test_sees_what_is_written_into_the_weights(graph, device):
    model, x = LSTM(I, H, device=device), torch.randn(1, I, device=device)
    running = Session(model, 1)
    with torch.no_grad():
        model.weight_hh_l0.mul_(0.5)
        model.bias_ih_l0.add_(1)
        for _ in range(2):
            running(x)
        running.reset()
        assert_close(running(x), model(x[None])[0][0])


def test_says_what_it_cannot_do():
    lstm = LSTM(I, H)
    with pytest.raises(ValueError, match="at least one batch row, got batch=0"):
        Session(lstm, 0)
    with pytest.raises(
        ValueError, match=r"what Policy takes for a step is not known: Session\(model, batch, example=x\)"
    ):
        Session(Policy(), 1)
    with pytest.raises(ValueError, match=r"the batch rows, 2 of this session; got a state of \(1, 3, 20\)"):
        Session(lstm, 2, example=torch.zeros(3, I))
    running = Session(lstm, 2)
    with pytest.raises(ValueError, match=r"takes torch.float32 of shape \(2, 5\), got torch.float32 of \(1, 2, 5\)"):
        running(torch.zeros(1, 2, I))
    with pytest.raises(ValueError, match=r"takes torch.float32 of shape \(2, 5\), got torch.float64"):
        running(torch.zeros(2, I, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"rows as bool have shape \(2,\), got \(3,\)"):
        running.reset([True, False, True])
    with pytest.raises(ValueError, match=r"rows are bool or integers, got torch.float32"):
        running.reset(0.5)
    with pytest.raises(IndexError, match="index 2"):
        running.reset([2])
    with pytest.raises(ValueError, match="the state of this session"):
        running.hx = torch.zeros(1, 2, H)


def test_a_model_that_cannot_be_captured_runs_at_each_call(monkeypatch):
    def refusing(steps, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(session, "captured", refusing)
    monkeypatch.setattr(session, "has_graphs", lambda device: True)
    model, x = LSTM(I, H).eval(), torch.randn(1, I)
    with pytest.warns(
        UserWarning, match="no CUDA graph of this model .operation not permitted when stream is capturing.:"
    ):
        running = Session(model, 1)
    assert "each call runs it" in running.why
    with torch.no_grad():
        y, hx = model(x[None])
        assert_close(running(x), y[0])
        assert_close(running(x), model(x[None], hx)[0][0])


@pytest.mark.parametrize("name", ["LSTM", "Policy"])
def test_what_a_graph_reads_stays_with_the_session(name, monkeypatch):
    stay = []

    def capturing(steps, device):
        memory = torch.zeros(1)
        stay.extend(map(weakref.ref, [*steps, memory]))
        return [step() for step in steps], [lambda: None] * 2, memory

    monkeypatch.setattr(session, "captured", capturing)
    monkeypatch.setattr(session, "has_graphs", lambda device: True)
    running = Session(MODELS[name](), 1, example=torch.zeros(1, I))
    gc.collect()
    assert running.why is None and len(stay) == 3 and all(reference() is not None for reference in stay)


def test_asked_for_no_graph():
    assert Session(fused_lstm.LSTM(I, H), 1, graph=False).why == "graph=False: each call runs the model"
