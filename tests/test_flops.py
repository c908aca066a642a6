"""torch.utils.flop_counter on the kernels' path: as many operations as the same layers composed of torch's products."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from fused_lstm import LSTM, LSTMCell, Recurrent, cells
from fused_lstm.cells import route
from fused_lstm.kernels.planned import composed as on_torch_operations

T, B, I, H = 5, 3, 7, 8  # noqa: E741


def composed(lstm, x, hx):
    """A loop over linear()."""
    D, each = 2 if lstm.bidirectional else 1, len(lstm._flat_weights) // len(lstm.all_weights)
    for layer in range(lstm.num_layers):
        outputs = []
        for d in range(D):
            k = layer * D + d
            w_ih, w_hh = lstm._flat_weights[k * each : k * each + 2]
            gates, h, c, steps = linear(x, w_ih), hx[0][k], hx[1][k], [None] * T
            for t in reversed(range(T)) if d else range(T):
                i, f, g, o = (gates[t] + linear(h, w_hh)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                steps[t] = h = o.sigmoid() * c.tanh()
            outputs.append(torch.stack(steps))
        x = torch.cat(outputs, -1)
    return x


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


OPTIONS = {
    "one layer": {},
    "without biases": {"bias": False},
    "both directions": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("wanted", [False, True], ids=["weights", "input and hx, too"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_many_as_composed(options, wanted):
    module = LSTM(I, H, **options)
    states = module.num_layers * (2 if module.bidirectional else 1)
    x, *hx = (torch.randn(size, requires_grad=wanted) for size in ((T, B, I), (states, B, H), (states, B, H)))

    def ours():
        return module(x, tuple(hx))[0]

    def theirs():
        return composed(module, x, hx)

    forward = 2 * T * B * sum(w.numel() for name, w in module.named_parameters() if "weight" in name)
    assert counted(ours) == counted(theirs) == forward
    assert counted(lambda: ours().sum().backward()) == counted(lambda: theirs().sum().backward())


@torch.no_grad()
def test_a_step():
    module, cell = LSTM(I, H, num_layers=2), LSTMCell(I, H)
    assert counted(lambda: module(torch.randn(1, B, I))) == 2 * B * 4 * H * (I + H + H + H)
    assert counted(lambda: cell(torch.randn(B, I))) == 2 * B * 4 * H * (I + H)


def test_recomputed_gates_count_again():
    counts = []
    for recompute in (0, 2):
        module, x = LSTM(I, H, recompute=recompute), torch.randn(T, B, I)
        counts.append(counted(lambda module=module, x=x: module(x)[0].sum().backward()))
    # And the first chunk's gradient of h0, which leads nowhere.
    assert counts[1] - counts[0] == 2 * 4 * H * (T * B * (I + H) + B * H)


def test_any_cell(monkeypatch):
    layer = Recurrent(cells.gru, I, H, bidirectional=True)
    x, h0 = torch.randn(T, B, I, requires_grad=True), torch.randn(2, B, H, requires_grad=True)

    def both_passes():
        sum(result.sum() for result in layer(x, h0)).backward()

    assert layer.plan(x).mode == "local"
    of_kernels = counted(both_passes)
    monkeypatch.setattr(route, "plan_of", lambda *args: on_torch_operations("to compare"))
    assert of_kernels == counted(both_passes) > 0
