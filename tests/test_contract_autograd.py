"""nn.LSTM under autograd, torch.func and torch.compile.

nn.LSTM in float64 is the gold of every gradient; parity.py has the rule.
"""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from fused_lstm import LSTM

from .parity import assert_close, assert_parity, twin
from .test_contract_construct import configs

T, B, H = 4, 3, 5
Results = dict[str, Tensor]


def inputs(rows: int = 1) -> dict[str, Tensor]:
    return {"x": torch.randn(T, B, 4), "h0": torch.randn(rows, B, H), "c0": torch.randn(rows, B, H)}


def loss(y: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    # Not linear, so that the gradient that reaches each result depends on its value.
    return y.square().sum() + state[0].sin().sum() + state[1].cos().sum()


def assert_agrees(compute: Callable[..., Results], lstm: nn.Module, tensors: dict[str, Tensor]) -> Results:
    """Holds all that compute(module, **tensors) returns for `lstm` to the parity rule; returns it."""
    modules, dtypes = (lstm, twin(lstm), twin(lstm, torch.float64)), (torch.float32, torch.float32, torch.float64)
    ours, theirs, gold = (
        compute(module, **{name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()})
        for module, dtype in zip(modules, dtypes, strict=True)
    )
    assert ours.keys() == theirs.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name].detach(), theirs[name].detach(), gold[name].detach(), torch.float32)
    return ours


def gradients(output: Tensor, module: nn.Module, **tensors: Tensor) -> Results:
    wanted = dict(module.named_parameters()) | tensors
    return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values())), strict=True))


# Which gradients


@configs
def test_gradients_of_everything(config):
    lstm = LSTM(4, H, **config)
    rows = len(lstm.all_weights)
    hx = torch.randn(rows, B, lstm.proj_size or H), torch.randn(rows, B, H)
    results = assert_parity(lstm, torch.randn(T, B, 4), hx)
    assert {"dx", "dh0", "dc0"} | {f"d{name}" for name, _ in lstm.named_parameters()} <= results.keys()


FROZEN = {
    "weight_ih": lambda name: "weight_ih" in name,
    "weight_hh": lambda name: "weight_hh" in name,
    "weights": lambda name: "weight" in name,
    "biases": lambda name: "bias" in name,
    "one bias of two": lambda name: "bias_hh" in name,
    "layer 0": lambda name: "_l0" in name,
    "layer 1": lambda name: "_l1" in name,
    "reverse": lambda name: "_reverse" in name,
    "all": lambda name: True,
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_get_no_gradient(frozen):
    lstm = LSTM(4, H, 2, bidirectional=True)
    for name, p in lstm.named_parameters():
        p.requires_grad_(not frozen(name))

    def compute(module, x, h0, c0):
        loss(*module(x, (h0, c0))).backward()
        tensors = dict(module.named_parameters()) | {"x": x, "h0": h0, "c0": c0}
        return {name: t.grad for name, t in tensors.items() if t.grad is not None}

    results = assert_agrees(compute, lstm, inputs(4))
    assert results.keys() == {"x", "h0", "c0"} | {n for n, _ in lstm.named_parameters() if not frozen(n)}


@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_gradient_of_one_tensor_alone(wanted):
    def compute(module, **tensors):
        everything = dict(module.named_parameters()) | tensors
        for name, t in everything.items():
            t.requires_grad_(name == wanted)
        x, h0, c0 = tensors.values()
        loss(*module(x, (h0, c0))).backward()
        return {name: t.grad for name, t in everything.items() if t.grad is not None}

    assert assert_agrees(compute, LSTM(4, H), inputs()).keys() == {wanted}


@pytest.mark.parametrize("output", ["y", "hn", "cn", "y and cn", "one step"])
def test_gradient_from_one_output_alone(output):
    def compute(module, x, h0, c0):
        y, (hn, cn) = module(x, (h0, c0))
        outputs = {"y": (y,), "hn": (hn,), "cn": (cn,), "y and cn": (y, cn), "one step": (y[1],)}[output]
        return gradients(sum(t.square().sum() for t in outputs), module, x=x, h0=h0, c0=c0)

    assert_agrees(compute, LSTM(4, H, bidirectional=True), inputs(2))


def test_input_without_gradient():
    def compute(module, x):
        return gradients(loss(*module(x.detach())), module)

    assert_agrees(compute, LSTM(4, H), {"x": torch.randn(T, B, 4)})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(mode):
    lstm = LSTM(4, H)
    with mode():
        y, (hn, cn) = lstm(torch.randn(T, B, 4))
    assert not any(t.requires_grad for t in (y, hn, cn))
    y, (hn, cn) = lstm.requires_grad_(False)(torch.randn(T, B, 4))
    assert not any(t.requires_grad for t in (y, hn, cn))


@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}], ids=["plain", "all"])
def test_backward_in_eval_mode(config):
    # cuDNN refuses: "cudnn RNN backward can only be called in training mode".
    assert_parity(LSTM(4, H, **config).eval(), torch.randn(T, B, 4))


# The life of a graph


def test_states_carried_across_calls():
    def compute(module, x, h0, c0):
        y, state = module(x[:2], (h0, c0))
        return gradients(loss(*module(x[2:], state)) + y.sum(), module, x=x, h0=h0, c0=c0)

    results = assert_agrees(compute, LSTM(4, H, 2), inputs(2))
    assert results["x"][:2].count_nonzero() and results["h0"].count_nonzero() and results["c0"].count_nonzero()


def test_two_calls_equal_one():
    lstm = LSTM(4, H)

    def compute(module, x):
        y1, state = module(x[:2])
        y2, state = module(x[2:], state)
        return gradients(loss(torch.cat([y1, y2]), state), module, x=x)

    def whole(module, x):
        return gradients(loss(*module(x)), module, x=x)

    tensors = {"x": torch.randn(T, B, 4)}
    parts = assert_agrees(compute, lstm, tensors)
    double = {"x": tensors["x"].double().requires_grad_()}
    gold = whole(twin(lstm, torch.float64), **double)
    theirs = whole(twin(lstm), tensors["x"].requires_grad_())
    for name in gold:
        assert_close(name, parts[name], theirs[name], gold[name], torch.float32)


def test_detached_states_cut_the_graph():
    def compute(module, x, h0, c0):
        _, state = module(x[:2], (h0, c0))
        return gradients(loss(*module(x[2:], tuple(s.detach() for s in state))), module, x=x)

    assert assert_agrees(compute, LSTM(4, H), inputs())["x"][:2].count_nonzero() == 0


def test_retain_graph_twice_sums_exactly():
    lstm, x = LSTM(4, H, 2, bidirectional=True), torch.randn(T, B, 4, requires_grad=True)
    total = loss(*lstm(x))
    total.backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, *lstm.parameters())]
    total.backward(retain_graph=True)
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((x, *lstm.parameters()), once, strict=True))


def test_second_backward_without_retain_graph_raises():
    for cls in (LSTM, nn.LSTM):
        y, _ = cls(4, H)(torch.randn(T, B, 4))
        y.sum().backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            y.sum().backward()


@pytest.mark.parametrize("config", [{}, {"num_layers": 2}, {"batch_first": True}], ids=["", "stack", "batch_first"])
@pytest.mark.parametrize("cls", [LSTM, nn.LSTM])
def test_output_edited_in_place_raises(cls, config):
    y, _ = cls(4, H, **config)(torch.randn(T, B, 4))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("edited", ["y, bidirectional", "x", "h0", "c0", "hn", "cn", "weight_ih_l0", "weight_hh_l0"])
def test_tensor_edited_in_place_is_right_or_raises(edited):
    bidirectional = "bidirectional" in edited

    def compute(module, edit, x, h0, c0):
        # Copies: a leaf that requires a gradient cannot be edited.
        x, h0, c0 = x.clone(), h0.clone(), c0.clone()
        weights = {name: p.clone() for name, p in module.named_parameters()}
        y, (hn, cn) = functional_call(module, weights, (x, (h0, c0)))
        results = {name: t.clone() for name, t in [("y", y), ("hn", hn), ("cn", cn)]}
        if edit:
            tensors = {"x": x, "h0": h0, "c0": c0, "hn": hn, "cn": cn} | weights
            with torch.no_grad():
                tensors.get(edited, y).mul_(3)
        total = loss(results["y"], (results["hn"], results["cn"]))
        wanted = {"x": x, "h0": h0, "c0": c0} | weights
        return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))

    lstm, tensors = LSTM(4, H, bidirectional=bidirectional), inputs(1 + bidirectional)

    def edit_ours_only(module, **tensors):
        return compute(module, module is lstm, **tensors)

    try:
        assert_agrees(edit_ours_only, lstm, tensors)
    except RuntimeError as error:
        assert "has been modified by an inplace operation" in str(error)


def test_graph_is_freed_with_its_outputs():
    # Without the garbage collector: a graph that holds its own output would wait for it, and so would its memory.
    lstm, x = LSTM(4, H, 2), torch.randn(T, B, 4, requires_grad=True) * 1
    input_of_graph = weakref.ref(x)
    gc.disable()
    try:
        y, state = lstm(x)
        del x
        assert input_of_graph() is not None
        del y, state
        assert input_of_graph() is None
    finally:
        gc.enable()


def test_double_backward_is_right_or_raises():
    # Right on the CPU with nn.LSTM, an error with cuDNN.
    def second_order(module, tensors, dtype):
        tensors = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        wanted = list((dict(module.named_parameters()) | tensors).values())
        x, h0, c0 = tensors.values()
        grads = torch.autograd.grad(loss(*module(x, (h0, c0))), wanted, create_graph=True)
        return lambda: gradients(sum(g.square().sum() for g in grads), module, **tensors)

    lstm, tensors = LSTM(4, H, 2), inputs(2)
    gold = second_order(twin(lstm, torch.float64), tensors, torch.float64)()
    theirs = second_order(twin(lstm), tensors, torch.float32)()
    compute = second_order(lstm, tensors, torch.float32)
    try:
        ours = compute()
    except RuntimeError:
        return
    for name in gold:
        assert_close(name, ours[name], theirs[name], gold[name], torch.float32)


# torch.func


def test_functional_call_uses_the_given_weights():
    lstm = LSTM(4, H, 2)

    def compute(module, x, h0, c0):
        given = {name: p.detach() * 2 + 0.1 for name, p in module.named_parameters()}
        for t in given.values():
            t.requires_grad_()
        # Given as results of an operation too, as a hypernetwork would.
        y, state = functional_call(module, {name: t * 1 for name, t in given.items()}, (x, (h0, c0)))
        wanted = given | {"x": x}
        grads = torch.autograd.grad(loss(y, state), list(wanted.values()))
        own, _ = module(x, (h0, c0))
        return dict(zip(wanted, grads, strict=True)) | {"y": y, "own weights' y": own}

    results = assert_agrees(compute, lstm, inputs(2))
    assert not torch.allclose(results["y"], results["own weights' y"])


def test_functional_call_with_some_of_the_weights():
    def compute(module, x):
        y, state = functional_call(module, {"weight_hh_l0": module.weight_hh_l0 * 2}, (x,))
        return gradients(loss(y, state), module, x=x)

    assert_agrees(compute, LSTM(4, H), {"x": torch.randn(T, B, 4)})


def loss_of(module: nn.Module) -> Callable[..., Tensor]:
    return lambda weights, *args: loss(*functional_call(module, weights, args))


@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "stack"])
def test_func_grad(config):
    lstm = LSTM(4, H, **config)

    def compute(module, x, h0, c0):
        call = grad(loss_of(module), argnums=(0, 1, 2))
        weights, dx, (dh0, dc0) = call(dict(module.named_parameters()), x, (h0, c0))
        return weights | {"x": dx, "h0": dh0, "c0": dc0}

    assert_agrees(compute, lstm, inputs(len(lstm.all_weights)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch", [(), (2,)], ids=["unbatched", "batched"])
def test_vmap_of_grad_gives_the_gradient_of_each_sample(batch):
    lstm, samples = LSTM(4, H), torch.randn(3, T, *batch, 4)
    ours = vmap(grad(loss_of(lstm)), in_dims=(None, 0))(dict(lstm.named_parameters()), samples)

    def each_alone(module, x):
        grads = [gradients(loss(*module(sample)), module) for sample in x]
        return {name: torch.stack([g[name] for g in grads]) for name in grads[0]}

    theirs, gold = each_alone(twin(lstm), samples), each_alone(twin(lstm, torch.float64), samples.double())
    assert ours.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name].detach(), theirs[name], gold[name], torch.float32)


# Checkpointing, hooks, averages


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint(use_reentrant):
    def compute(module, x, h0, c0):
        y, state = checkpoint(module, x, (h0, c0), use_reentrant=use_reentrant)
        # The reentrant form allows only backward(), and passes no gradient to tensors inside a tuple.
        loss(y, state).backward()
        return {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}

    assert_agrees(compute, LSTM(4, H, 2), inputs(2))


def test_checkpoint_repeats_dropout():
    lstm, x = LSTM(4, H, 2, dropout=0.5), torch.randn(T, B, 4)

    def run(call):
        torch.manual_seed(1)
        return gradients(loss(*call(x)), lstm)

    plain, checkpointed = run(lstm), run(lambda x: checkpoint(lstm, x, use_reentrant=False))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_forward_hooks():
    def compute(module, x, h0, c0):
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda module, args, output: (output[0] * 3, output[1]))
        y, (hn, cn) = module(x, (h0, c0))
        return gradients(loss(y, (hn, cn)), module, x=x) | {"y": y, "hn": hn, "cn": cn}

    results = assert_agrees(compute, LSTM(4, H), inputs())
    assert torch.equal(results["y"][-1], 3 * results["hn"][0])


def test_forward_hooks_with_keywords():
    def compute(module, x, h0, c0):
        module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"hx": (h0, c0)}), with_kwargs=True)
        y, (hn, cn) = module(input=x, hx=None)
        return {"y": y, "hn": hn, "cn": cn}

    assert_agrees(compute, LSTM(4, H), inputs())


def test_backward_hooks():
    seen = {}

    def compute(module, x, h0, c0):
        def note(name):
            def hook(module, *grads):
                events.append((name, [[None if g is None else tuple(g.shape) for g in group] for group in grads]))

            return hook

        events = seen.setdefault(type(module), [])
        module.register_full_backward_pre_hook(note("before"))
        module.register_full_backward_hook(note("after"))
        module.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))
        y, _ = module(x)
        y.square().sum().backward()
        return {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}

    assert_agrees(compute, LSTM(4, H), inputs())
    assert [name for name, _ in seen[LSTM]] == ["before", "after"]
    assert seen[nn.LSTM] == 2 * seen[LSTM]


def test_gradient_hooks_on_outputs_and_parameters():
    def compute(module, x, h0, c0):
        y, (hn, cn) = module(x, (h0, c0))
        for t in (y, hn, cn):
            t.retain_grad()
        hn.register_hook(lambda g: 2 * g)
        counts = dict.fromkeys(dict(module.named_parameters()), 0)
        for name, p in module.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name: counts.update({name: counts[name] + 1}))
        loss(y, (hn, cn)).backward()
        assert set(counts.values()) == {1}
        tensors = dict(module.named_parameters()) | {"y": y, "hn": hn, "cn": cn, "x": x, "h0": h0, "c0": c0}
        return {name: t.grad for name, t in tensors.items()}

    assert_agrees(compute, LSTM(4, H), inputs())


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "exponential"])
def test_averaged_model(average):
    def compute(module, x):
        averaged = AveragedModel(module, multi_avg_fn=average)
        averaged.update_parameters(module)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(3)
        averaged.update_parameters(module)
        assert type(averaged.module) is type(module)
        y, (hn, cn) = averaged(x)
        # The mean of w and 3 w: exact in binary, however it is computed.
        fresh = twin(module)
        with torch.no_grad():
            for p in fresh.parameters():
                p.mul_(2 / 3)
        assert all(torch.allclose(a, b) for a, b in zip(averaged.module.parameters(), fresh.parameters(), strict=True))
        return {"y": y, "hn": hn, "cn": cn}

    assert_agrees(compute, LSTM(4, H, 2), {"x": torch.randn(T, B, 4)})


# torch.compile: Dynamo refuses every instance of nn.LSTM ("Attempted to wrap RNN, GRU, or LSTM")


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "stack"])
def test_compile_in_one_graph(config, batch_first):
    lstm = LSTM(4, H, batch_first=batch_first, **config)

    def compute(module, x, h0, c0):
        call = torch.compile(module, fullgraph=True, backend="eager") if module is lstm else module
        y, state = call(x, (h0, c0))
        y2, (hn, cn) = call(x, state)
        return gradients(loss(y, (hn, cn)) + y2.sum(), module, x=x, h0=h0, c0=c0) | {"y": y, "hn": hn, "cn": cn}

    tensors = inputs(len(lstm.all_weights))
    assert_agrees(compute, lstm, tensors | {"x": tensors["x"].transpose(0, 1) if batch_first else tensors["x"]})


@pytest.mark.usefixtures("dynamo")
def test_compiled_sees_new_weights():
    lstm = LSTM(4, H)

    def compute(module, x):
        call = torch.compile(module, fullgraph=True, backend="eager") if module is lstm else module
        call(x)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(2)
        return {"y": call(x)[0]}

    assert_agrees(compute, lstm, {"x": torch.randn(T, B, 4)})


class Tagger(nn.Module):
    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.lstm = lstm
        self.out = nn.Linear(2 * H, 3, dtype=lstm.weight_hh_l0.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y, (hn, _) = self.lstm(x)
        return self.out(y) + self.out(torch.cat([hn[-2], hn[-1]], dim=-1))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("batch", [(), (B,)], ids=["unbatched", "batched"])
def test_compile_a_model_around_it(batch):
    lstm = LSTM(4, H, bidirectional=True)
    out = nn.Linear(2 * H, 3).state_dict()

    def compute(module, x):
        model = Tagger(module)
        model.out.load_state_dict(out)
        call = torch.compile(model, fullgraph=True, backend="eager") if module is lstm else model
        return gradients(call(x).square().sum(), model, x=x)

    assert_agrees(compute, lstm, {"x": torch.randn(T, *batch, 4)})
