"""What makes a graph of a model: torch.compile, export, AOTInductor, torch.jit, ONNX, torch.fx; on the kernels' path
and, with `-p tests.without_triton`, on torch's."""

import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fused_lstm import LSTM, LSTMCell, swap

from .parity import twin

T, B, I, H = 4, 3, 5, 6  # noqa: E741
LENGTHS, RESET = torch.tensor([2, 0, 4]), torch.tensor([[False, True, False]] * T)


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


@pytest.mark.parametrize(
    "keywords", [{}, {"lengths": LENGTHS}, {"reset": RESET}, {"return_states": True}], ids=lambda given: "".join(given)
)
def test_keywords_in_one_graph(keywords):
    """Every output, and every gradient through all of them: torch 2.11 can lose that of one output among several."""
    L = 2 if keywords else 1
    module, results = LSTM(I, H, L, bidirectional=True), []
    x, *hx = (torch.randn(size, requires_grad=True) for size in ((T, B, I), (2 * L, B, H), (2 * L, B, H)))
    for call in (torch.compile(module, backend="aot_eager", fullgraph=True), module):
        y, hidden, *states = call(x, tuple(hx), **keywords)
        outputs = [y, *hidden, *(tensor for given in states for of_layer in given for tensor in of_layer)]
        loss = sum((k + 1) * output.sin().sum() for k, output in enumerate(outputs))
        results.append((outputs, torch.autograd.grad(loss, [x, *hx, *module.parameters()])))
    torch.testing.assert_close(*results)


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


@pytest.mark.parametrize("dynamo", [False, True], ids=["recorded", "exported"])
def test_onnx(dynamo, tmp_path):
    """torch's own LSTM is recorded; of an exported one T is fixed, as torch fixes nn.LSTM's."""
    import onnxruntime

    module, x = LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True).eval(), torch.randn(B, T, I)
    file, options = tmp_path / "lstm.onnx", {"dynamic_shapes": ({0: torch.export.Dim("B")},)}
    if not dynamo:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "B"}}}
    # Of a model that holds it: the recorder hands a model's own keywords on by position.
    model = torch.nn.Sequential(module)
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False, **options)
    session = onnxruntime.InferenceSession(file)
    for example in (x, torch.randn(7, T, I)):
        results = session.run(None, {session.get_inputs()[0].name: example.numpy()})
        y, (hn, cn) = module(example)
        torch.testing.assert_close(tuple(map(torch.from_numpy, results)), (y, hn, cn))


class Model(nn.Module):
    """One of ours within a model, of which it gives the output alone."""

    def __init__(self, cls=LSTM, **options):
        super().__init__()
        self.inner = cls(I, H, **options)

    def forward(self, x):
        return self.inner(x)[0]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5}, {"proj_size": 2}], ids=lambda o: "".join(o))
@pytest.mark.parametrize("keywords", [{}, {"lengths": LENGTHS}, {"reset": RESET}], ids=lambda given: "".join(given))
def test_a_compiled_training_step_without_a_gradient_of_the_input(options, keywords):
    """As of a first layer; by dropout the loss is another, so then only that every weight has a gradient."""
    module, grads = LSTM(I, H, **options), []
    for call in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        y, (hn, cn) = call(torch.linspace(-1, 1, T * B * I).view(T, B, I), **keywords)
        grads.append(torch.autograd.grad(y.sin().sum() + hn.sum() + cn.sum(), list(module.parameters())))
    if "dropout" in options:
        assert all(grad.isfinite().all() and grad.any() for grad in grads[0])
    else:
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step_with_a_frozen_weight(frozen, backend):
    module, x = LSTM(I, H), torch.randn(T, B, I)
    module.get_parameter(frozen).requires_grad_(False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    grads = []
    for call in (torch.compile(module, fullgraph=True, backend=backend), module):
        grads.append(torch.autograd.grad(call(x)[0].sin().sum(), trained))
    torch.testing.assert_close(*grads)


def test_a_compiled_step_on_packed_rows():
    module = LSTM(I, H, bidirectional=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I), torch.tensor([4, 2, 1]))
    results = []
    for call in (torch.compile(module, backend="aot_eager"), module):
        y, (hn, cn) = call(packed)
        loss = y.data.sin().sum() + hn.sum() + cn.sum()
        results.append((y.data, hn, cn, torch.autograd.grad(loss, list(module.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_jit_trace(cls):
    """It records torch's own operators, for every T and B."""
    module = cls(I, H)
    traced = torch.jit.trace(module, (torch.randn(*[T, B][: 2 if cls is LSTM else 1], I),))
    x = torch.randn(*[9, 7][: 2 if cls is LSTM else 1], I)
    torch.testing.assert_close(traced(x), getattr(nn, cls.__name__).forward(swapped_back(module), x))


def swapped_back(module):
    other = twin(module, next(module.parameters()).dtype)
    swap(other, back=True)
    return other


def test_the_plan_says_that_a_trace_takes_torch_s_own():
    modes = []

    class Asks(Model):
        def forward(self, x):
            modes.append(self.inner.plan(x).why)
            return super().forward(x)

    torch.jit.trace(Asks(), (torch.randn(T, B, I),), check_trace=False)
    assert modes and all("torch.jit.trace" in why or "not installed" in why for why in modes)


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_jit_script_takes_a_model_swapped_back(cls):
    model, x = Model(cls), torch.randn(*[T, B][: 2 if cls is LSTM else 1], I)
    before = model(x)
    with pytest.raises(RuntimeError, match=rf"compiles nn\.{cls.__name__}, .*swap\(model, back=True\)"):
        torch.jit.script(model)
    swap(model, back=True)
    torch.testing.assert_close(torch.jit.script(Wrapped(model.inner))(x), before)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_fx_takes_it_for_a_leaf(cls):
    model, x = Model(cls), torch.randn(*[T, B][: 2 if cls is LSTM else 1], I)
    graph = torch.fx.symbolic_trace(model)
    assert ("call_module", "inner") in [(node.op, node.target) for node in graph.graph.nodes]
    torch.testing.assert_close(graph(x), model(x))
    with pytest.raises(torch.fx.proxy.TraceError, match="a model that has it as a submodule"):
        torch.fx.symbolic_trace(cls(I, H))


def test_fx_hands_on_what_it_is_called_with():
    class Padded(Model):
        def forward(self, x, hx, lengths):
            return self.inner(x, hx, lengths=lengths, reset_to="zero")[0]

    model, hx = Padded(), (torch.randn(1, B, H), torch.randn(1, B, H))
    x = torch.randn(T, B, I)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, hx, LENGTHS), model(x, hx, LENGTHS))
