"""The operators under torch.library's own checks, and the module under torch.compile and torch.export."""

import io

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

from fused_lstm import LSTM, LSTMCell, operators

T, B, I, H = 4, 3, 5, 6  # noqa: E741
LENGTHS, RESET = torch.tensor([2, 0, 4]), torch.tensor([[False, True, False]] * T)


def tensors(*shapes):
    return [torch.randn(shape) for shape in shapes]


# With every row full: the operator leaves gates as they are past a row's end, and opcheck compares them.
FORWARD = {
    "dense": (None, None, None, None),
    "lengths and resets": (torch.zeros(B, H), torch.full((B,), T), None, RESET),
}


@pytest.mark.parametrize("form", FORWARD)
def test_opcheck_of_the_recurrence(form):
    inputs = tensors((T, B, 4 * H), (4 * H, H), (B, H), (B, H))
    arguments = (*inputs, *FORWARD[form], False, True, True)
    opcheck(torch.ops.fused_lstm.forward.default, arguments)
    _, _, c, gates = operators.forward(*arguments)
    dy, dhn, dcn, dc_steps = tensors((T, B, H), (B, H), (B, H), (T, B, H))
    saved = (inputs[1], inputs[3], c, gates, dc_steps, *FORWARD[form])
    opcheck(torch.ops.fused_lstm.backward.default, (dy, dhn, dcn, *saved, False, True))


def test_opcheck_of_one_step():
    x, h0, c0, *weights = tensors((B, I), (1, B, H), (1, B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    opcheck(torch.ops.fused_lstm.one_step.default, (x, h0, c0, weights, True, True))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_one_graph_serves_every_length_and_batch(options):
    module = LSTM(I, H, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for sizes in [(7, 3), (4, 3), (9, 2), (8, 11)]:
        x = torch.randn(*sizes, I, requires_grad=True)
        grads = []
        for call in (compiled, module):
            y, (hn, cn) = call(x)
            grads.append(torch.autograd.grad(y.sum() + hn.sum() + cn.sum(), [x, *module.parameters()]))
        torch.testing.assert_close(*grads)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and set(counts) == {counts[0]}, "recompiled"


@pytest.mark.parametrize("keywords", [{"lengths": LENGTHS}, {"reset": RESET}, {"return_states": True}], ids=str)
def test_keywords_in_one_graph(keywords):
    module, x = LSTM(I, H, bidirectional=True), torch.randn(T, B, I)
    results = [call(x, **keywords) for call in (torch.compile(module, backend="aot_eager", fullgraph=True), module)]
    torch.testing.assert_close(results[0][0], results[1][0])


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_export_with_dynamic_sizes_runs_after_save_and_load(cls):
    module = cls(I, H)
    dims = {k: torch.export.Dim(name, min=2, max=64) for k, name in enumerate("TB" if cls is LSTM else "B")}
    example = torch.randn(*[3, 2][: len(dims)], I)
    with torch.no_grad():
        exported = torch.export.export(module, (example,), dynamic_shapes=(dims,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    x = torch.randn(*[9, 5][: len(dims)], I)
    torch.testing.assert_close(torch.export.load(file).module()(x), module(x))


def test_aot_inductor(tmp_path):
    module, dims = LSTM(I, H, num_layers=2), {k: torch.export.Dim(name, min=2, max=64) for k, name in enumerate("TB")}
    with torch.no_grad():
        exported = torch.export.export(module, (torch.randn(3, 2, I),), dynamic_shapes=(dims,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "lstm.pt2"))
        x = torch.randn(9, 5, I)
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), module(x))
