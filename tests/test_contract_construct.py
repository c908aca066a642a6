"""nn.LSTM's constructor, parameters, state_dict and attributes: what surrounds the numbers.

Each test runs the same lines on torch.nn.LSTM: where the two disagree, torch is right.
"""

import copy
import inspect
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, skip_init

from fused_lstm import LSTM

from .parity import assert_close, assert_parity, run

CONFIGS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 3},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "all without bias": {"num_layers": 2, "bias": False, "bidirectional": True, "proj_size": 3},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
directions = pytest.mark.parametrize(
    ("source", "target"), [(nn.LSTM, LSTM), (LSTM, nn.LSTM)], ids=["from nn.LSTM", "to nn.LSTM"]
)


def seeded(cls: type[nn.Module], *args, **kwargs) -> nn.Module:
    torch.manual_seed(1)
    return cls(*args, **kwargs)


def raised(call: Callable[[], object]) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def assert_same_error(call: Callable[[type[nn.Module]], object], kind: type, text: str) -> None:
    assert raised(lambda: call(LSTM)) == (kind, text)
    assert raised(lambda: call(nn.LSTM)) == (kind, text), "torch has another text by now"


def assert_agrees(build: Callable[..., nn.Module], x: Tensor) -> None:
    """The parity rule for a module that cannot be copied: build(class, dtype) makes each one anew."""
    gold = run(build(nn.LSTM, torch.float64), x.double(), None)
    theirs = run(build(nn.LSTM, torch.float32), x, None)
    ours = run(build(LSTM, torch.float32), x, None)
    assert ours.keys() == gold.keys()
    for name in gold:
        assert_close(name, ours[name], theirs[name], gold[name], torch.float32)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Constructor

DROPOUT = "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
REFUSED = {
    "dropout < 0": ({"dropout": -0.1}, ValueError, DROPOUT),
    "dropout > 1": ({"dropout": 1.1}, ValueError, DROPOUT),
    "dropout nan": ({"dropout": math.nan}, ValueError, DROPOUT),
    "dropout a bool": ({"dropout": True}, ValueError, DROPOUT),
    "bias": ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    "batch_first": ({"batch_first": 1}, TypeError, "batch_first should be of type bool, got: int"),
    "float input_size": ({"input_size": 4.0}, TypeError, "input_size should be of type int, got: float"),
    "float hidden_size": ({"hidden_size": 8.0}, TypeError, "hidden_size should be of type int, got: float"),
    "input_size 0": ({"input_size": 0}, ValueError, "input_size must be greater than zero"),
    "input_size < 0": ({"input_size": -4}, ValueError, "input_size must be greater than zero"),
    "hidden_size 0": ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
    "hidden_size < 0": ({"hidden_size": -8}, ValueError, "hidden_size must be greater than zero"),
    "num_layers 0": ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
    "num_layers < 0": ({"num_layers": -1}, ValueError, "num_layers must be greater than zero"),
    "proj_size < 0": (
        {"proj_size": -1},
        ValueError,
        "proj_size should be a positive integer or zero to disable projections",
    ),
    "proj_size = hidden_size": ({"proj_size": 8}, ValueError, "proj_size has to be smaller than hidden_size"),
    "proj_size > hidden_size": ({"proj_size": 9}, ValueError, "proj_size has to be smaller than hidden_size"),
}


@pytest.mark.parametrize(("given", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_constructor_refuses(given, kind, text):
    assert_same_error(lambda cls: cls(**{"input_size": 4, "hidden_size": 8} | given), kind, text)


@pytest.mark.parametrize("cls", [LSTM, nn.LSTM])
def test_dropout_with_one_layer_warns(cls):
    text = (
        "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers "
        "greater than 1, but got dropout=0.5 and num_layers=1"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$"):
        cls(4, 8, dropout=0.5)


@pytest.mark.filterwarnings("error")
def test_dropout_with_two_layers_does_not_warn():
    LSTM(4, 8, num_layers=2, dropout=0.5)


def test_bidirectional_may_be_an_int():
    lstm = LSTM(4, 5, bidirectional=1)
    assert repr(lstm) == repr(nn.LSTM(4, 5, bidirectional=1)) == "LSTM(4, 5, bidirectional=1)"
    assert len(lstm.all_weights) == 2


def test_dropout_of_one_is_legal_and_finite():
    # Everything between the layers is zeroed, so even in training there is nothing random in it.
    results = assert_parity(LSTM(4, 5, num_layers=2, dropout=1.0), torch.randn(3, 2, 4))
    assert all(value.isfinite().all() for value in results.values())


ARGUMENTS = {
    "input_size": 4,
    "hidden_size": 8,
    "num_layers": 2,
    "bias": False,
    "batch_first": True,
    "dropout": 0.1,
    "bidirectional": True,
    "proj_size": 3,
    "device": "meta",
    "dtype": torch.float64,
}


@pytest.mark.parametrize("by_position", range(len(ARGUMENTS) + 1))
def test_arguments_by_position_and_by_keyword(by_position):
    args = list(ARGUMENTS.values())[:by_position]
    kwargs = dict(list(ARGUMENTS.items())[by_position:])
    ours, theirs = LSTM(*args, **kwargs), nn.LSTM(*args, **kwargs)
    attributes = [name for name in ARGUMENTS if name not in ("device", "dtype")]
    for module in (ours, theirs):
        assert {name: getattr(module, name) for name in attributes} == {name: ARGUMENTS[name] for name in attributes}
    assert type(ours.dropout) is float
    assert all(p.dtype == torch.float64 and p.is_meta for p in ours.parameters())
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_signature_is_written_out():
    # nn.LSTM itself takes *args, **kwargs: its arguments are those of RNNBase after `mode`.
    def arguments(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]

    *given, own = arguments(LSTM)
    assert given == arguments(nn.RNNBase)[1:]
    assert [name for name, _, _ in given] == list(ARGUMENTS)
    assert own == ("recompute", inspect.Parameter.KEYWORD_ONLY, False)


def test_defaults_are_those_of_nn_lstm():
    def settings(module):
        return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | bool)}

    assert settings(LSTM(4, 8)) == settings(nn.LSTM(4, 8))


def test_unknown_argument_is_refused():
    for cls in (LSTM, nn.LSTM):
        with pytest.raises(TypeError, match="unexpected keyword argument 'nonlinearity'"):
            cls(4, 8, nonlinearity="tanh")


def test_skip_init():
    # nn.LSTM of torch 2.13 hides `device` behind *args, and skip_init refuses it.
    lstm = skip_init(LSTM, 4, 5, 2, bidirectional=True, dtype=torch.float64)
    assert not any(p.is_meta for p in lstm.parameters())
    lstm.load_state_dict(nn.LSTM(4, 5, 2, bidirectional=True, dtype=torch.float64).state_dict())
    assert_parity(lstm, torch.randn(3, 2, 4, dtype=torch.float64))


# Parameters


@configs
def test_parameter_names_order_and_shapes(config):
    H, P = 8, config.get("proj_size", 0)
    D = 2 if config.get("bidirectional") else 1
    expected = []
    for layer, direction in itertools.product(range(config.get("num_layers", 1)), range(D)):
        suffix = f"l{layer}" + "_reverse" * direction
        expected += [
            (f"weight_ih_{suffix}", (4 * H, D * (P or H) if layer else 4)),
            (f"weight_hh_{suffix}", (4 * H, P or H)),
        ]
        if config.get("bias", True):
            expected += [(f"bias_ih_{suffix}", (4 * H,)), (f"bias_hh_{suffix}", (4 * H,))]
        if P:
            expected += [(f"weight_hr_{suffix}", (P, H))]
    for cls in (LSTM, nn.LSTM):
        lstm = cls(4, H, **config)
        assert [(name, tuple(p.shape)) for name, p in lstm.named_parameters()] == expected
        assert [(name, tuple(p.shape)) for name, p in lstm.state_dict().items()] == expected


def test_gates_are_packed_i_f_g_o():
    lstm = LSTM(3, 4, dtype=torch.float64)
    x, h0, c0 = (torch.randn(1, 1, size, dtype=torch.float64) for size in (3, 4, 4))
    gates = x[0] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h0[0] @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
    i, f, g, o = gates.detach().chunk(4, dim=1)
    c = f.sigmoid() * c0[0] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    y, (hn, cn) = lstm(x, (h0, c0))
    for name, ours, gold in [("y", y, h), ("hn", hn, h), ("cn", cn, c)]:
        assert_close(name, ours[0], None, gold, torch.float64)


@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "stack"])
def test_bias_gradients_are_equal_bit_for_bit(config):
    # Not so for nn.LSTM with a projection on the CPU: there torch sums the two in different orders.
    lstm = LSTM(4, 5, **config)
    y, (hn, cn) = lstm(torch.randn(3, 2, 4))
    (y.square().sum() + hn.sum() + cn.sum()).backward()
    names = [name for name, _ in lstm.named_parameters() if name.startswith("bias_ih")]
    assert len(names) == len(lstm.all_weights)
    for name in names:
        assert torch.equal(getattr(lstm, name).grad, getattr(lstm, name.replace("_ih_", "_hh_")).grad), name


@configs
def test_same_seed_same_weights_bit_for_bit(config):
    ours, ours_rng = seeded(LSTM, 4, 8, **config), torch.get_rng_state()
    theirs, theirs_rng = seeded(nn.LSTM, 4, 8, **config), torch.get_rng_state()
    assert_same_state(ours, theirs)
    # The modules that are made next must get the same weights too.
    assert torch.equal(ours_rng, theirs_rng)
    for module in (ours, theirs):
        torch.manual_seed(2)
        module.reset_parameters()
    assert_same_state(ours, theirs)
    torch.manual_seed(2)
    stdv = 1 / math.sqrt(8)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, torch.empty_like(parameter).uniform_(-stdv, stdv)), name


# state_dict


@directions
@configs
def test_load_state_dict_in_place(source, target, config):
    state = source(4, 5, **config).state_dict()
    lstm = target(4, 5, **config)
    before = {name: (p, p.data_ptr()) for name, p in lstm.named_parameters()}
    lstm.load_state_dict(state, strict=True)
    for name, p in lstm.named_parameters():
        assert p is before[name][0] and p.data_ptr() == before[name][1]
        assert torch.equal(p, state[name])


@configs
def test_forward_uses_the_loaded_weights(config):
    theirs, lstm = nn.LSTM(4, 5, **config), LSTM(4, 5, **config)
    lstm.load_state_dict(theirs.state_dict())
    assert_parity(lstm, torch.randn(3, 2, 4))


@directions
def test_load_state_dict_assign_from_meta(source, target):
    state = source(4, 5, 2, bidirectional=True).state_dict()
    lstm = target(4, 5, 2, bidirectional=True, device="meta")
    lstm.load_state_dict(state, strict=True, assign=True)
    for name, p in lstm.named_parameters():
        assert isinstance(p, nn.Parameter) and p.data_ptr() == state[name].data_ptr()
    y, _ = lstm(torch.randn(3, 2, 4))
    assert y.device.type == "cpu" and y.isfinite().all()


def test_forward_uses_the_assigned_weights():
    state = nn.LSTM(4, 5).state_dict()
    meta, filled = LSTM(4, 5, device="meta"), LSTM(4, 5)
    for lstm in (meta, filled):
        lstm.load_state_dict(state, assign=True)
        assert_parity(lstm, torch.randn(3, 2, 4))


MISFITS = {
    "missing": lambda state: {k: v for k, v in state.items() if k != "bias_hh_l0"},
    "unexpected": lambda state: state | {"weight_hr_l0": torch.zeros(3, 8)},
    "shape": lambda state: state | {"weight_hh_l0": torch.zeros(32, 7)},
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_load_state_dict_refuses_misfits(misfit):
    state = misfit(nn.LSTM(4, 8).state_dict())
    ours, theirs = (raised(lambda cls=cls: cls(4, 8).load_state_dict(state)) for cls in (LSTM, nn.LSTM))
    assert ours == theirs
    assert ours[0] is RuntimeError


# Attributes and methods


def test_is_an_rnn_base_of_mode_lstm():
    lstm = LSTM(4, 8)
    assert lstm.mode == "LSTM"
    # torch.compile refuses every instance of nn.LSTM.
    assert isinstance(lstm, nn.RNNBase) and not isinstance(lstm, nn.LSTM)


def test_every_public_name_of_nn_lstm_exists():
    ours, theirs = LSTM(4, 8), nn.LSTM(4, 8)
    assert not [name for name in dir(theirs) if not hasattr(ours, name)]


@configs
def test_all_weights_and_flat_weights(config):
    lstm = LSTM(4, 8, **config)
    parameters = list(lstm.parameters())
    assert [len(w) for w in lstm.all_weights] == [len(w) for w in nn.LSTM(4, 8, **config).all_weights]
    for listed in (list(itertools.chain(*lstm.all_weights)), lstm._flat_weights):
        assert all(a is b for a, b in zip(listed, parameters, strict=True))


def test_flatten_parameters_changes_nothing():
    lstm = LSTM(4, 5, 2)
    before = copy.deepcopy(lstm.state_dict())
    parameters = list(lstm.parameters())
    assert lstm.flatten_parameters() is None
    assert all(a is b for a, b in zip(lstm.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in lstm.state_dict().items())
    assert_parity(lstm, torch.randn(3, 2, 4))


CHECKS = {
    "check_input, dimensions": lambda m: m.check_input(torch.zeros(2, 4), None),
    "check_input, packed dimensions": lambda m: m.check_input(torch.zeros(3, 2, 4), torch.tensor([2, 2, 2])),
    "check_input, features": lambda m: m.check_input(torch.zeros(3, 2, 6), None),
    "check_input, dtype": lambda m: m.check_input(torch.zeros(3, 2, 4, dtype=torch.float64), None),
    "check_hidden_size": lambda m: m.check_hidden_size(torch.zeros(4, 2, 8), (4, 2, 3)),
    "check_hidden_size, text": lambda m: m.check_hidden_size(torch.zeros(4, 2, 8), (4, 2, 3), "wanted {}, got {}"),
    "check_forward_args, hidden": lambda m: m.check_forward_args(
        torch.zeros(3, 2, 4), (torch.zeros(4, 3, 8), torch.zeros(4, 3, 8)), None
    ),
    "check_forward_args, cell": lambda m: m.check_forward_args(
        torch.zeros(3, 2, 4), (torch.zeros(4, 3, 3), torch.zeros(4, 2, 3)), None
    ),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check_methods_refuse_what_nn_lstm_refuses(check):
    ours, theirs = (
        raised(lambda cls=cls: check(cls(4, 8, 2, batch_first=True, bidirectional=True, proj_size=3)))
        for cls in (LSTM, nn.LSTM)
    )
    assert ours == theirs
    assert ours is not None


def test_check_methods_accept_what_fits():
    lstm = LSTM(4, 8, 2, batch_first=True, bidirectional=True, proj_size=3)
    x, hx = torch.zeros(3, 2, 4), (torch.zeros(4, 3, 3), torch.zeros(4, 3, 8))
    assert lstm.check_input(x, None) is None
    assert lstm.check_hidden_size(hx[0], (4, 3, 3)) is None
    assert lstm.check_forward_args(x, hx, None) is None


@pytest.mark.parametrize("batch_first", [False, True])
@configs
def test_expected_sizes(config, batch_first):
    L, D = config.get("num_layers", 1), 2 if config.get("bidirectional") else 1
    x, batch_sizes = torch.zeros(3, 2, 4), torch.tensor([5, 1])
    for cls in (LSTM, nn.LSTM):
        lstm = cls(4, 8, batch_first=batch_first, **config)
        for B, args in [(3 if batch_first else 2, (x, None)), (5, (torch.zeros(6, 4), batch_sizes))]:
            assert lstm.get_expected_hidden_size(*args) == (L * D, B, config.get("proj_size") or 8)
            assert lstm.get_expected_cell_size(*args) == (L * D, B, 8)


def test_permute_hidden():
    lstm, h, c = LSTM(4, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    permuted = lstm.permute_hidden((h, c), torch.tensor([2, 0, 1]))
    assert torch.equal(permuted[0], h[:, [2, 0, 1]]) and torch.equal(permuted[1], c[:, [2, 0, 1]])
    same = lstm.permute_hidden((h, c), None)
    assert same[0] is h and same[1] is c


REPRS = {
    "LSTM(4, 8)": {},
    "LSTM(4, 8, bias=False, dropout=0.1)": {"bias": False, "dropout": 0.1},
    "LSTM(4, 8, proj_size=3, num_layers=2, bias=False, batch_first=True, dropout=0.1, bidirectional=True)": {
        "proj_size": 3,
        "num_layers": 2,
        "bias": False,
        "batch_first": True,
        "dropout": 0.1,
        "bidirectional": True,
    },
}


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize(("text", "arguments"), REPRS.items(), ids=["sizes", "some", "all"])
def test_repr(text, arguments):
    assert repr(LSTM(4, 8, **arguments)) == repr(nn.LSTM(4, 8, **arguments)) == text


# Copies, files, devices


def saved(lstm: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(lstm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("config", [CONFIGS["plain"], CONFIGS["all"]], ids=["plain", "all"])
def test_copy_has_the_same_weights_and_shares_none(make, used, config):
    x = torch.randn(3, 2, 4)
    lstm = LSTM(4, 5, batch_first=True, **config).eval()
    if used:
        lstm(x)[0].sum().backward()
    other = make(lstm)
    assert type(other) is LSTM and repr(other) == repr(lstm) and not other.training
    assert_same_state(other, lstm)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
    assert all(w is p for w, p in zip(other._flat_weights, other.parameters(), strict=True))
    assert all(p.count_nonzero() for p in other.parameters())
    assert_parity(other, x)


def test_state_dict_through_a_file():
    theirs, file = nn.LSTM(4, 5, 2), io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    lstm = LSTM(4, 5, 2)
    lstm.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(lstm, theirs)


def test_old_pickle_without_proj_size():
    # torch before 1.8 had no proj_size.
    lstm = LSTM(4, 5, 2)
    state = pickle.loads(pickle.dumps(lstm.__getstate__()))
    del state["proj_size"]
    old = LSTM.__new__(LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    assert_same_state(old, lstm)
    assert_parity(old, torch.randn(3, 2, 4))


@configs
def test_meta_device(config):
    x = torch.empty(3, 2, 4, device="meta")
    (y, (hn, cn)), (y_, (hn_, cn_)) = (cls(4, 5, device="meta", **config)(x) for cls in (LSTM, nn.LSTM))
    for ours, theirs in [(y, y_), (hn, hn_), (cn, cn_)]:
        assert ours.is_meta and ours.shape == theirs.shape and ours.dtype == theirs.dtype


def test_to_empty():
    lstm = LSTM(4, 5, 2, device="meta").to_empty(device="cpu")
    assert not any(p.is_meta for p in lstm.parameters())
    lstm.load_state_dict(nn.LSTM(4, 5, 2).state_dict())
    assert_parity(lstm, torch.randn(3, 2, 4))


def test_dtype_conversion():
    lstm = LSTM(4, 5, 2).double()
    assert all(w is p and w.dtype == torch.float64 for w, p in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    assert_parity(lstm, torch.randn(3, 2, 4, dtype=torch.float64))


def test_share_memory():
    lstm = LSTM(4, 5)
    assert lstm.share_memory() is lstm
    assert all(p.is_shared() for p in lstm.parameters())
    assert all(w is p for w, p in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    assert_parity(lstm, torch.randn(3, 2, 4))


# Weights that are not plain parameters


def weight_norm(cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    lstm = seeded(cls, 4, 5, 2).to(dtype)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    return parametrizations.weight_norm(lstm, "weight_ih_l1", dim=None)


def test_weight_norm():
    ours, theirs = weight_norm(LSTM, torch.float32), weight_norm(nn.LSTM, torch.float32)
    assert repr(ours) == repr(theirs)
    assert_same_state(ours, theirs)
    assert_agrees(weight_norm, torch.randn(3, 2, 4))


def test_weight_norm_follows_its_parameters():
    def build(cls, dtype):
        lstm = weight_norm(cls, dtype)
        lstm(torch.zeros(1, 1, 4, dtype=dtype))
        with torch.no_grad():
            lstm.parametrizations.weight_hh_l0.original0.mul_(3)
        return lstm

    assert_agrees(build, torch.randn(3, 2, 4))


def test_weight_norm_removed():
    lstm = weight_norm(LSTM, torch.float32)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        parametrize.remove_parametrizations(lstm, name)
    assert type(lstm) is LSTM
    assert_parity(lstm, torch.randn(3, 2, 4))


def test_prune():
    def build(cls, dtype):
        return prune.l1_unstructured(seeded(cls, 4, 5).to(dtype), "weight_hh_l0", 0.5)

    ours = build(LSTM, torch.float32)
    assert_same_state(ours, build(nn.LSTM, torch.float32))
    assert (ours.weight_hh_l0 == 0).sum() == 50
    assert_agrees(build, torch.randn(3, 2, 4))


def test_tied_weights():
    def build(cls, dtype):
        lstm = seeded(cls, 5, 5, 2).to(dtype)
        lstm.weight_hh_l1 = lstm.weight_ih_l1 = lstm.weight_hh_l0
        return lstm

    assert len(list(build(LSTM, torch.float32).parameters())) == 6
    assert_agrees(build, torch.randn(3, 2, 5))


def replace_attribute(lstm: nn.Module, weight: Tensor) -> None:
    lstm.weight_hh_l0 = nn.Parameter(weight)


def replace_entry(lstm: nn.Module, weight: Tensor) -> None:
    lstm._parameters["weight_hh_l0"] = nn.Parameter(weight)


def replace_data(lstm: nn.Module, weight: Tensor) -> None:
    lstm.weight_hh_l0.data = weight


@pytest.mark.parametrize("replace", [replace_attribute, replace_entry, replace_data])
def test_replaced_parameter_is_used(replace):
    x, weight = torch.randn(3, 2, 4), torch.randn(20, 5)
    lstm = LSTM(4, 5)
    lstm(x)
    replace(lstm, weight.clone())
    results = assert_parity(lstm, x)
    fresh = nn.LSTM(4, 5)
    fresh.load_state_dict(lstm.state_dict() | {"weight_hh_l0": weight})
    y, _ = fresh(x)
    gold, _ = fresh.double()(x.double())
    assert_close("y", results["y"], y, gold.detach(), torch.float32)


def test_weight_drop():
    # The habit of AWD-LSTM: the parameter goes under another name, a plain tensor made from it takes its place.
    def build(cls, dtype):
        lstm = seeded(cls, 4, 5).to(dtype)
        raw = lstm.weight_hh_l0
        del lstm.weight_hh_l0
        lstm.register_parameter("weight_hh_l0_raw", raw)
        for scale in (0.5, 2.0):
            lstm.weight_hh_l0 = raw * scale
            lstm(torch.zeros(1, 1, 4, dtype=dtype))
        return lstm

    assert "weight_hh_l0_raw" in dict(build(LSTM, torch.float32).named_parameters())
    assert_agrees(build, torch.randn(3, 2, 4))


def test_weight_drop_uses_the_tensor_set_last():
    x, weight = torch.randn(3, 2, 4), torch.randn(20, 5)
    lstm, fresh = seeded(LSTM, 4, 5), seeded(nn.LSTM, 4, 5)
    fresh.load_state_dict(fresh.state_dict() | {"weight_hh_l0": weight})
    del lstm.weight_hh_l0
    for value in (torch.zeros(20, 5), weight):
        lstm.weight_hh_l0 = value
        y, _ = lstm(x)
    theirs, _ = fresh(x)
    gold, _ = fresh.double()(x.double())
    assert_close("y", y, theirs, gold.detach(), torch.float32)
