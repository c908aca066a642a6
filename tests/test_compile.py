"""The kernels' operators under torch.library's own checks; how often torch.vmap launches them; and that a call never
looks at its data, which a CUDA graph could not capture."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lstm import LSTM, LSTMCell, checks
from fused_lstm.kernels import backward, forward, one_step

T, B, I, H = 4, 3, 5, 6  # noqa: E741
LENGTHS, RESET = torch.tensor([2, 0, 4]), torch.tensor([[False, True, False]] * T)


def tensors(*shapes):
    return [torch.randn(shape) for shape in shapes]


# With every row full: the operator leaves gates as they are past a row's end, and opcheck compares them.
FORWARD = {
    "dense": (None, None, None, None, False),
    "lengths and resets": (torch.zeros(1, B, H), torch.full((B,), T), None, RESET, False),
    "rows first": (torch.zeros(1, B, H), torch.full((B,), T), None, RESET.T.contiguous(), True),
}


@pytest.mark.parametrize("form, projects", [*((form, False) for form in FORWARD), ("rows first", True)])
def test_opcheck_of_the_recurrence(form, projects):
    lead, P = (B, T) if FORWARD[form][-1] else (T, B), 3
    out = P if projects else H
    *inputs, weight_hr = tensors((*lead, 4 * H), (1, 4 * H, out), (1, B, out), (1, B, H), (1, P, H))
    projection = weight_hr.detach() if projects else None
    arguments = (*inputs, *FORWARD[form], projection, *[None] * 4, False, True, True, None)
    opcheck(torch.ops.fused_lstm.forward.default, arguments)
    *_, c, gates = torch.ops.fused_lstm.forward(*arguments)
    dy, dhn, dcn, dc_steps = tensors((*lead, out), (1, B, out), (1, B, H), (*lead, H))
    saved = (inputs[1], inputs[3], c, gates, dc_steps, *FORWARD[form], projection)
    opcheck(torch.ops.fused_lstm.backward.default, (dy, dhn, dcn, *saved, *[None] * 4, False, True))


def test_opcheck_of_weights_of_8_bits():
    input_gates, h0, c0, scale = tensors((T, B, 4 * H), (1, B, H), (1, B, H), (1, 4 * H))
    q = torch.randint(-127, 128, (1, 4 * H, H), dtype=torch.int8)
    arguments = (input_gates, q, h0, c0, *FORWARD["dense"], None, *[None] * 4, False, False, True, scale)
    opcheck(torch.ops.fused_lstm.forward.default, arguments)


def test_opcheck_of_one_step():
    x, h0, c0, *weights = tensors((B, I), (1, B, H), (1, B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    opcheck(torch.ops.fused_lstm.one_step.default, (x, h0, c0, weights, [], True, 1, True))


@pytest.fixture
def launches(monkeypatch):
    """The launchers that were called, by name: one for each layer and direction."""
    calls = []

    def counted(name, launcher):
        def call(*args, **options):
            calls.append(name)
            return launcher(*args, **options)

        return call

    for module, name in ((forward, "forward"), (backward, "backward"), (one_step, "one_step")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


def scalar(module, parameters, x, **keywords):
    y, (hn, cn) = functional_call(module, parameters, (x,), keywords)
    return y.sin().sum() + hn.square().sum() + cn.sum()


MAPPED = {
    "": {},
    "lengths": {"lengths": torch.tensor([[3, 4], [0, 1], [2, 2]])},
    "resets": {"reset": torch.arange(3 * T * 2).view(3, T, 2) % 3 == 1, "reset_to": "hx"},
}


@pytest.mark.parametrize("form", MAPPED)
def test_gradients_of_each_sample_in_one_launch(form, launches):
    module, samples = LSTM(I, H, num_layers=2, bidirectional=True).double(), torch.randn(3, T, 2, I).double()
    parameters, keywords = dict(module.named_parameters()), MAPPED[form]
    mapped = {name: value for name, value in keywords.items() if isinstance(value, torch.Tensor)}

    def of_sample(x, given):
        return grad(lambda p: scalar(module, p, x, **keywords | given))(parameters)

    grads = vmap(of_sample)(samples, mapped)
    assert sorted(launches) == ["backward"] * 2 + ["forward"] * 2
    for k in range(3):
        alone = of_sample(samples[k], {name: value[k] for name, value in mapped.items()})
        torch.testing.assert_close({name: value[k] for name, value in grads.items()}, alone)


def test_vmap_over_another_dimension_and_over_states(launches):
    module, x, hx = LSTM(I, H).double(), torch.randn(T, B, 3, I).double(), torch.randn(2, 3, 1, B, H).double()
    with torch.no_grad():
        y, (hn, cn) = vmap(module, in_dims=(2, (0, 0)))(x, tuple(hx))
        one, (h1, c1) = vmap(module, in_dims=(2, (0, None)))(x[:1], (hx[0], hx[1, 0]))
        assert launches == ["forward", "one_step"]
        for k in range(3):
            torch.testing.assert_close((y[k], (hn[k], cn[k])), module(x[:, :, k], (hx[0, k], hx[1, k])))
            torch.testing.assert_close((one[k], (h1[k], c1[k])), module(x[:1, :, k], (hx[0, k], hx[1, 0])))


class NoLook(TorchDispatchMode):
    """Refuses what waits for the device or takes something from the host: a CUDA graph cannot repeat it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.name(), kwargs or {}
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"), name
        takes_device = any(argument.name == "device" for argument in function._schema.arguments)
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert not takes_device or tensors or kwargs.get("device") is not None, f"{name} makes a tensor on the host"
        return function(*args, **kwargs)


CAPTURED = {
    "": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"reset": RESET},
    "resets to hx": {"reset": RESET, "reset_to": "hx"},
    "states": {"return_states": True},
    "masks": {"mask": RESET.logical_not(), "mask_to": "hold", "lengths": LENGTHS, "reset": RESET},
}


@pytest.mark.parametrize("form", CAPTURED)
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"proj_size": 2}], ids=["dropout", "projection"])
def test_a_training_step_never_looks_at_its_data(form, options, monkeypatch):
    """The CPU twin of test_device's captured steps. Fake tensors have no data; the real ones reach the launchers."""
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)  # as of tensors on CUDA
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), nullcontext()):
        with mode:
            module = LSTM(I, H, num_layers=2, bidirectional=True, **options)
            x, keywords = torch.randn(T, B, I, requires_grad=True), dict(CAPTURED[form])
            with NoLook():
                y, (hn, cn), *_ = module(x, **keywords)
                torch.autograd.grad(y.sum() + hn.sum() + cn.sum(), list(module.parameters()))


def test_a_step_of_inference_never_looks_at_its_data():
    with torch.no_grad():
        for cls in (LSTM, LSTMCell):
            module, x = cls(I, H), torch.randn(*[1, B][: 2 if cls is LSTM else 1], I)
            with NoLook():
                module(x)
