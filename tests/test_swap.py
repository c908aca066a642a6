"""swap(): every nn.LSTM of a model becomes fused_lstm.LSTM in place, and back."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fused_lstm import LSTM, LSTMCell, swap

from .parity import assert_close, assert_parity
from .test_contract_construct import COPIES

CONFIG = {"num_layers": 2, "batch_first": True, "dropout": 0.1, "bidirectional": True}


class Tagger(nn.Module):
    """An LSTM as a direct child, one two levels down, and other layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.lstm = nn.LSTM(4, 5, **CONFIG)
        self.blocks = nn.ModuleList([nn.ModuleDict({"rnn": nn.LSTM(10, 4, batch_first=True), "gru": nn.GRU(4, 3)})])

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.embed(x))
        y, _ = self.blocks[0]["rnn"](y)
        return self.blocks[0]["gru"](y)[0]


class Mine(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


@pytest.fixture
def model() -> Tagger:
    return Tagger()


def lstms(model: Tagger) -> list[nn.Module]:
    return [model.lstm, model.blocks[0]["rnn"]]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(2, 3, 3)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def assert_same_numbers(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    """The parity rule for the output of any model: `original` has the same weights in nn.LSTM."""
    # Copied first: torch cannot copy a parametrized LSTM that has run.
    double = copy.deepcopy(original).double()
    outputs = model(x), original(x), double(x.double())
    y, theirs, gold = (output if isinstance(output, Tensor) else output[0] for output in outputs)
    assert_close("y", y, theirs, gold.detach(), torch.float32)


# In place


def test_nested_lstms_are_swapped_in_place(model):
    original, modules = copy.deepcopy(model).eval(), list(model.modules())
    assert swap(model) == 2
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [type(m) for m in lstms(model)] == [LSTM, LSTM]
    assert type(model.blocks[0]["gru"]) is nn.GRU and type(model.embed) is nn.Linear
    assert repr(model) == repr(original)
    assert_same_numbers(model.eval(), original, torch.randn(2, 3, 3))


def test_the_model_itself_may_be_the_lstm():
    lstm = nn.LSTM(4, 5, **CONFIG)
    assert swap(lstm) == 1
    assert type(lstm) is LSTM
    assert_parity(lstm.eval(), torch.randn(2, 3, 4))


def test_a_used_lstm_may_be_swapped():
    lstm, x = nn.LSTM(4, 5), torch.randn(3, 2, 4)
    lstm(x)[0].sum().backward()
    grads = {name: p.grad for name, p in lstm.named_parameters()}
    assert swap(lstm) == 1
    assert all(p.grad is grads[name] for name, p in lstm.named_parameters())
    assert_parity(lstm, x)


def test_parameters_stay_the_same_objects(model):
    before = dict(model.named_parameters())
    swap(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    for lstm in lstms(model):
        assert all(w is p for w, p in zip(lstm._flat_weights, lstm.parameters(), strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_mode_and_settings_are_kept(model, training):
    model.train(training)
    for p in model.lstm.parameters():
        p.requires_grad_(False)
    before = [vars(m).copy() for m in lstms(model)]
    swap(model)
    assert [m.training for m in lstms(model)] == [training, training]
    assert [vars(m) for m in lstms(model)] == before
    assert not any(p.requires_grad for p in model.lstm.parameters())


def test_hooks_are_kept(model):
    fired = []

    def note(name):
        return lambda *args: fired.append(name)

    lstm = model.lstm
    lstm.register_forward_pre_hook(note("forward pre"))
    lstm.register_forward_hook(note("forward"))
    lstm.register_full_backward_pre_hook(note("backward pre"))
    lstm.register_full_backward_hook(note("backward"))
    lstm.register_state_dict_pre_hook(note("state_dict pre"))
    lstm.register_state_dict_post_hook(note("state_dict post"))
    lstm.register_load_state_dict_pre_hook(note("load pre"))
    lstm.register_load_state_dict_post_hook(note("load post"))
    lstm.weight_hh_l0.register_hook(note("gradient"))
    swap(model)
    model(torch.randn(2, 3, 3)).sum().backward()
    assert fired == ["forward pre", "forward", "backward pre", "gradient", "backward"]
    fired.clear()
    model.load_state_dict(model.state_dict())
    assert fired == ["state_dict pre", "state_dict post", "load pre", "load post"]


def test_the_optimizer_keeps_working(model):
    model = model.double().eval()
    swapped = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, swapped)]
    for m, optimizer in zip((model, swapped), optimizers, strict=True):
        steps(m, optimizer, 1)
    assert swap(swapped) == 2
    before = copy.deepcopy(model.state_dict())
    for m, optimizer in zip((model, swapped), optimizers, strict=True):
        steps(m, optimizer, 2)
    for (name, ours), gold in zip(swapped.state_dict().items(), model.state_dict().values(), strict=True):
        assert not torch.equal(gold, before[name])
        assert_close(name, ours, None, gold, torch.float64)


# What counts


def hook(module):
    """Puts a forward of its own on the instance and keeps the old one beside it, as accelerate does."""
    module._old_forward, calls = module.forward, []

    def forward(*args, **keywords):
        calls.append(type(module))
        return module._old_forward(*args, **keywords)

    module.forward = forward
    return calls


@pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell])
def test_a_forward_that_keeps_the_old_one_on_the_module_calls_the_new_one(cls):
    module, x = cls(4, 5), torch.randn(3, 4)
    calls = hook(module)
    assert swap(module) == 1
    module(x)
    assert type(module._old_forward.__self__) in (LSTM, LSTMCell)
    assert module._old_forward.__func__ is type(module).forward
    assert swap(module, back=True) == 1
    module(x)
    assert module._old_forward.__func__ is cls.forward
    assert len(calls) == 2


@pytest.mark.parametrize("back", [False, True])
def test_a_forward_that_hides_the_old_one_is_refused_by_name(back, model):
    if back:
        swap(model)
    inner = model.blocks[0]["rnn"]
    old = inner.forward
    inner.forward = lambda *args: old(*args)
    types = [type(module) for module in lstms(model)]
    with pytest.raises(RuntimeError, match=r"the forward of blocks\.0\.rnn has been replaced by <function .*<lambda>"):
        swap(model, back=back)
    assert [type(module) for module in lstms(model)] == types  # nothing is turned
    del inner.forward
    assert swap(model, back=back) == 2


def test_a_sharded_lstm_is_swapped(tmp_path):
    """fully_shard() gives a module a class of its own, as parametrizations do."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module, x = nn.LSTM(4, 5), torch.randn(3, 2, 4)
        before = module(x)
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert swap(module) == 1
        assert isinstance(module, FSDPModule) and isinstance(module, LSTM)
        torch.testing.assert_close(module(x), before)
        module(x)[0].sum().backward()
        assert all(weight.grad is not None for weight in module.parameters())
        assert swap(module, back=True) == 1
        assert isinstance(module, FSDPModule) and isinstance(module, nn.LSTM)
        torch.testing.assert_close(module(x), before)
    finally:
        torch.distributed.destroy_process_group()


def test_counts_nothing_without_an_lstm():
    assert swap(nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2), nn.RNN(2, 2), nn.GRUCell(2, 2))) == 0


def test_a_second_swap_does_nothing(model):
    assert (swap(model), swap(model)) == (2, 0)
    assert [type(m) for m in lstms(model)] == [LSTM, LSTM]


def test_a_shared_module_counts_once():
    lstm = nn.LSTM(4, 4)
    model = nn.ModuleList([lstm, nn.ModuleDict({"again": lstm}), nn.LSTM(4, 4)])
    assert swap(model) == 2
    assert model[0] is model[1]["again"] is lstm and type(lstm) is LSTM


def test_tied_parameters_stay_tied():
    a, b = nn.LSTM(4, 5), nn.LSTM(4, 5)
    b.weight_hh_l0 = a.weight_hh_l0
    model = nn.ModuleList([a, b])
    assert swap(model) == 2
    assert a.weight_hh_l0 is b.weight_hh_l0 and len(list(model.parameters())) == 7
    x = torch.randn(3, 2, 4)
    (a(x)[0].sum() + b(x)[0].sum()).backward()
    assert_parity(b, x)


def test_a_user_s_subclass_is_left_alone():
    mine, x = Mine(4, 5), torch.randn(3, 2, 4)
    y, _ = mine(x)
    assert swap(nn.ModuleList([mine, nn.LSTM(4, 5)])) == 1
    assert type(mine) is Mine
    assert torch.equal(mine(x)[0], y)


def test_a_user_s_parametrized_subclass_is_left_alone():
    mine = Mine(4, 5)
    parametrizations.weight_norm(mine, "weight_hh_l0")
    cls = type(mine)
    assert swap(mine) == 0
    assert type(mine) is cls


def test_a_subclass_of_ours_is_left_alone_on_the_way_back():
    class Ours(LSTM):
        pass

    model = nn.ModuleList([Ours(4, 5), LSTM(4, 5)])
    assert swap(model, back=True) == 1
    assert [type(m) for m in model] == [Ours, nn.LSTM]


# Back


def test_back_restores_exactly(model):
    before = [(type(m), id(m), vars(m).copy()) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    assert swap(model) == 2
    assert swap(model, back=True) == 2
    assert [(type(m), id(m), vars(m)) for m in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert swap(model, back=True) == 0


def test_back_takes_lstms_made_as_ours():
    lstm = LSTM(4, 5, 2)
    ours = copy.deepcopy(lstm)
    assert swap(lstm, back=True) == 1
    assert type(lstm) is nn.LSTM
    assert_same_numbers(ours, lstm, torch.randn(3, 2, 4))


# Parametrized


def parametrized() -> nn.Module:
    lstm = nn.LSTM(4, 5, 2)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    return parametrizations.orthogonal(lstm, "weight_hh_l1")


def test_a_parametrized_lstm_is_swapped():
    lstm = parametrized()
    original, before, parameters = copy.deepcopy(lstm), repr(lstm), dict(lstm.named_parameters())
    assert swap(lstm) == 1
    assert isinstance(lstm, LSTM) and not isinstance(lstm, nn.LSTM)
    assert repr(lstm) == before
    assert all(p is parameters[name] for name, p in lstm.named_parameters())
    assert swap(lstm) == 0
    assert_same_numbers(lstm, original, torch.randn(3, 2, 4))


def test_a_parametrized_lstm_keeps_training():
    lstm, x = parametrized(), torch.randn(3, 2, 4)
    swap(lstm)
    y = lstm(x)[0]
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in lstm.parameters())
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(3)
    assert not torch.allclose(lstm(x)[0], y)


def test_parametrizations_can_be_removed_after_the_swap():
    lstm = parametrized()
    swap(lstm)
    weight = lstm.weight_hh_l0.detach().clone()
    for name in ("weight_hh_l0", "weight_hh_l1"):
        parametrize.remove_parametrizations(lstm, name)
    assert type(lstm) is LSTM and torch.equal(lstm.weight_hh_l0, weight)
    assert_parity(lstm, torch.randn(3, 2, 4))


def test_parametrizations_can_be_added_after_the_swap():
    lstm, reference = nn.LSTM(4, 5), nn.LSTM(4, 5)
    reference.load_state_dict(lstm.state_dict())
    swap(lstm)
    for module in (lstm, reference):
        parametrizations.weight_norm(module, "weight_ih_l0")
    assert_same_numbers(lstm, reference, torch.randn(3, 2, 4))


def test_a_parametrized_lstm_swaps_back():
    lstm = parametrized()
    cls, attributes = type(lstm), vars(lstm).copy()
    assert swap(lstm) == swap(lstm, back=True) == 1
    assert type(lstm).__bases__ == (nn.LSTM,) and type(lstm).__name__ == cls.__name__
    assert vars(lstm) == attributes
    lstm(torch.randn(3, 2, 4))
    for name in ("weight_hh_l0", "weight_hh_l1"):
        parametrize.remove_parametrizations(lstm, name)
    assert type(lstm) is nn.LSTM


def test_a_copy_of_a_parametrized_lstm_is_not_swapped_with_it():
    # deepcopy keeps the class, so the two share one: swap must not change the class itself.
    lstm = parametrized()
    other = copy.deepcopy(lstm)
    assert type(other) is type(lstm)
    swap(lstm)
    assert isinstance(other, nn.LSTM)


# Copies of a swapped model


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_swapped_model_is_swapped(model, make):
    original, x = copy.deepcopy(model).eval(), torch.randn(2, 3, 3)
    swap(model.eval())
    other = make(model)
    assert [type(m) for m in lstms(other)] == [LSTM, LSTM]
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    for lstm in lstms(other):
        assert all(w is p for w, p in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    assert_same_numbers(other, original, x)


def test_a_copy_of_a_swapped_parametrized_lstm():
    lstm = parametrized()
    swap(lstm)
    other, x = copy.deepcopy(lstm), torch.randn(3, 2, 4)
    assert isinstance(other, LSTM) and repr(other) == repr(lstm)
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(3)
    assert not torch.equal(other.weight_hh_l0, lstm.weight_hh_l0)
    assert other(x)[0].isfinite().all()


def test_checkpoints_pass_both_ways(model):
    swapped = Tagger()
    swap(swapped)
    swapped.load_state_dict(model.state_dict())
    assert_same_numbers(swapped.eval(), model.eval(), torch.randn(2, 3, 3))
    restored = Tagger()
    restored.load_state_dict(swapped.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), model.parameters(), strict=True))


# Quantization


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_takes_a_model_swapped_back(model):
    swap(model)
    with pytest.raises(RuntimeError, match=r"torch quantizes nn.LSTM, not fused_lstm.LSTM: call fused_lstm.swap"):
        torch.ao.quantization.quantize_dynamic(model)
    with pytest.raises(RuntimeError, match="swap"):
        torch.ao.quantization.quantize_dynamic(model, {LSTM})
    with pytest.raises(RuntimeError, match="swap"):
        torch.ao.quantization.quantize_dynamic(nn.ModuleList([LSTMCell(3, 4)]), {nn.LSTMCell})
    linear_alone = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(linear_alone.lstm) is LSTM and type(linear_alone.embed) is not nn.Linear

    x = torch.randn(2, 3, 3)
    expected = model(x)
    swap(model, back=True)
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert isinstance(quantized.lstm, torch.ao.nn.quantized.dynamic.LSTM)
    assert (quantized(x) - expected).abs().max() < 0.1 * expected.abs().max()
