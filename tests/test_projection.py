"""The projection in the kernels, against nn.LSTM, in every form of input; when it is there, and when it is folded."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn.utils.rnn import pack_padded_sequence

from fused_lstm import LSTM, operators, route
from fused_lstm.kernels.model import step, terms_for
from fused_lstm.kernels.plan import choose_kernel, projects
from fused_lstm.kernels.tiles import A100, B200, H100, Problem
from fused_lstm.records import flatten

from .parity import WIDEST, assert_parity, assert_parity_of
from .test_sequences import DTYPES, LENGTHS, RESET, B, H, I, Loop, T, assert_oracle, given, module_and_input

BOTH = {"bidirectional": True, "proj_size": 2}
FORMS = ["", "lengths", "reset", "lengths and reset", "lengths and reset to hx"]


@pytest.fixture
def within(monkeypatch):
    """Has the kernels project, whatever it costs."""
    monkeypatch.setattr(route, "in_kernel", lambda *_: True)


@pytest.mark.parametrize("options", [{"batch_first": True}, {"batch_first": False}], ids=["rows first", "steps first"])
@pytest.mark.parametrize("form", FORMS)
def test_every_state_and_gradient(form, options, within, device):
    module, x, hx = module_and_input(BOTH | options, torch.float64, device)
    keywords = given(module, form) | ({"reset_to": "hx"} if "hx" in form else {})

    def loop(lstm):
        masks = (LENGTHS if "lengths" in form else None, RESET if "reset" in form else None)
        return Loop(lstm, *masks, keywords.get("reset_to", "zero"))

    assert_oracle(loop, module, x, hx, **keywords, return_states=True)


def test_the_kernels_get_both_weights(within, monkeypatch, device):
    module, x, hx = module_and_input(BOTH, torch.float32, device)
    of_pass = []
    for operator in (operators.forward, operators.backward):
        calls, launch = [], operator.run
        of_pass.append(calls)
        monkeypatch.setattr(
            operator,
            "run",
            lambda args, c=calls, launch=launch, **more: c.append(flatten(args)) or launch(args, **more),
        )
    y, _ = module(x, hx)
    y.sum().backward()
    for calls in of_pass:
        (args,) = calls
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
        assert (2, 4 * H, 2) in shapes and (2, 2, H) in shapes and (2, 4 * H, H) not in shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (5, 17, 36, 20), (4, 0, 20, 7)])
def test_parity(sizes, dtype, within, device):
    T, B, H, P = sizes
    module = LSTM(I, H, num_layers=2, proj_size=P, dtype=dtype, device=device)
    hx = torch.randn(2, B, P).to(device, dtype), torch.randn(2, B, H).to(device, dtype)
    assert_parity(module, torch.randn(T, B, I).to(device, dtype), hx)


def test_packed(within, device):
    module, x, hx = module_and_input(BOTH, torch.float32, device)
    assert_parity(module, pack_padded_sequence(x, [3, 6, 1, 4], enforce_sorted=False), hx)


@pytest.mark.parametrize("form", ["", "lengths and reset to hx"])
def test_recompute(form, within, device):
    module, x, hx = module_and_input({"proj_size": 2}, torch.float64, device)
    keywords = given(module, form) | ({"reset_to": "hx"} if "hx" in form else {})
    results = []
    for chunk in (4, False):
        module.recompute = chunk
        y, _ = module(x, hx, **keywords)
        results.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    torch.testing.assert_close(*results)


def test_in_one_graph_and_by_sample(within):
    module, x = LSTM(I, H, proj_size=2, batch_first=True).double(), torch.randn(B, T, I, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    results = [call(x)[0] for call in (compiled, module)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), list(module.parameters())) for y in results))
    weights = dict(module.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(module, weights, x)[0].square().sum()

    samples = torch.stack([x, -x])
    ours = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, samples)
    for name in weights:
        torch.testing.assert_close(
            ours[name], torch.stack([torch.func.grad(loss)(weights, one)[name] for one in samples])
        )


def test_higher_derivatives(within, device):
    def second(module, x):
        y, _ = module(x, tuple(s.to(x) for s in hx))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(module.parameters()))

    module, x, hx = module_and_input({"proj_size": 2}, WIDEST[device], device)
    assert_parity_of(second, module, x)


@pytest.mark.parametrize("H, P", [(2560, 128), (2560, 512), (4096, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_project_where_it_takes_less(H, P, dtype):
    kind, terms = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], terms_for(H100)

    def both_passes(proj):
        plan = choose_kernel(dtype, 16, H, H100, False, 1, 1, proj)
        assert bool(plan.forward.features) == bool(plan.backward.features) == (proj > 0)
        problem = Problem(kind, H, proj=proj)
        passes = (plan.forward, problem), (plan.backward, problem._replace(backward=True))
        return sum(step(terms, plan.mode, tiles, problem, 16).us for tiles, problem in passes)

    assert projects(dtype, 16, H, P, H100, False, 1) and both_passes(P) < both_passes(0)


def test_elsewhere_it_is_folded():
    for P in (512, 1024):
        found = [projects(torch.bfloat16, 16, units, P, H100, False, 1) for units in range(P + 8, 4224, 8)]
        assert found == [units >= 2120 for units in range(P + 8, 4224, 8)]  # as README says
    for sizes in ((64, 16), (1024, 512), (2044, 128), (2048, 129)):  # local, short, in narrow rows
        assert not projects(torch.bfloat16, 16, *sizes, H100, False, 1)
    for ieee in (False, True):
        assert not projects(torch.float32, 16, 4096, 256, A100, ieee, 1)
    assert projects(torch.bfloat16, 16, 4096, 256, B200, False, 1)


def test_the_plan_says_where_the_projection_is():
    module = LSTM(4, 2560, proj_size=128, dtype=torch.bfloat16)
    plan = module.plan(torch.randn(3, 2, 4).bfloat16())
    if plan.mode != "torch":
        assert plan.forward.features and "projection to 128 features" in plan.why
        assert not LSTM(4, 1024, proj_size=128).plan(torch.randn(3, 2, 4)).forward.features
