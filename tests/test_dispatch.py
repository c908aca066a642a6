"""Which form a call takes, that the plan says so, and what each form saves."""

from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lstm import LSTM, LSTMCell, route
from fused_lstm.call import Call, Options
from fused_lstm.context import SAVES, Context
from fused_lstm.kernels import launch, plan
from fused_lstm.kernels.limits import why_not
from fused_lstm.kernels.plan import choose, choose_kernel, choose_one_step, grouped, in_kernel, layers_together
from fused_lstm.kernels.tiles import A100, AMD, DEVICES, H100, Device, Problem, Tiles
from fused_lstm.tensors import check_tensors

from .parity import twin

KERNEL_DTYPES = [(torch.float16, False), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setattr(plan, "interpreted", lambda: False)


def test_on_a_plain_cpu_the_class_is_torch_own_lstm(no_interpreter):
    module = LSTM(5, 8, num_layers=2, bidirectional=True, dropout=0.5)
    x = torch.randn(4, 3, 5)
    assert module.plan(x).mode == "torch" and "cpu" in module.plan(x).why
    torch.manual_seed(1)
    ours = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(ours, twin(module)(x)[0])


def test_the_interpreter_runs_the_kernels():
    assert LSTM(5, 8).plan(torch.randn(4, 3, 5)).mode == "local"
    big = LSTM(5, 130).plan(torch.randn(4, 3, 5))
    assert big.mode == "step" and "interpreter" in big.why and "multiprocessors" in big.why


def test_dropout_draws_the_masks_of_nn_lstm():
    module = LSTM(5, 8, num_layers=3, dropout=0.5, bidirectional=True)
    x, theirs = torch.randn(4, 3, 5), twin(module)
    torch.manual_seed(1)
    ours = module(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(ours, theirs(x)[0])


def test_float64_on_a_gpu_is_torch_own_lstm():
    chosen = choose(torch.float64, 3, 8, torch.device("cuda"), ieee=False)
    assert chosen.mode == "torch" and "float64" in chosen.why


@pytest.mark.parametrize("dtype,ieee", KERNEL_DTYPES)
@pytest.mark.parametrize("device", [A100, H100])
def test_modes_follow_the_size_of_the_weights(device, dtype, ieee):
    order = ["local", "grid", "step"]
    modes = [choose_kernel(dtype, 16, H, device, ieee).mode for H in range(8, 4800, 8)]
    assert modes == sorted(modes, key=order.index) and set(modes) == set(order)
    # Rows that no wide load divides are not streamed, but by backward in TF32.
    odd = [choose_kernel(dtype, 16, H, device, ieee) for H in range(1, 2049, 2)]
    assert [plan.mode for plan in odd] == sorted((plan.mode for plan in odd), key=order.index)
    assert all(plan.forward.kept == 0 and (plan.precision == "tf32" or plan.backward.kept == 0) for plan in odd)


@pytest.mark.parametrize("dtype,ieee", KERNEL_DTYPES)
@pytest.mark.parametrize("device", [A100, H100])
@pytest.mark.parametrize("B", [1, 16, 17, 64, 1024])
def test_a_batch_group_is_always_resident_together(device, dtype, ieee, B):
    for H in range(1, 2049):
        chosen = choose_kernel(dtype, B, H, device, ieee)
        for tiles in (chosen.forward, chosen.backward):
            programs, _ = launch.programs_of(tiles, H, B)
            assert programs >= -(-H // tiles.units)
            assert chosen.mode != "local" or programs == 1
            assert chosen.mode != "grid" or programs <= chosen.resident <= device.multiprocessors


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_a_plan_for_every_size(device):
    for (dtype, ieee), H, B in product(KERNEL_DTYPES, (1, 20, 130, 513, 1500, 4096), (1, 64, 4096)):
        chosen = choose_kernel(dtype, B, H, DEVICES[device], ieee)
        assert chosen.mode != "torch" and chosen.forward.chunk > 0
        for tiles, backward in ((chosen.forward, False), (chosen.backward, True)):
            problem = Problem("fp32" if ieee else "tf32" if dtype == torch.float32 else "bf16", H, backward)
            assert not why_not(tiles, chosen.mode, problem, DEVICES[device])


def test_a_device_without_room_runs_step_by_step():
    """Where not one chunk of W_hh fits, none is kept: and no program keeps all."""
    small = Device(16, 16 * 1024, (8, 6))
    chosen = choose_kernel(torch.bfloat16, 16, 1024, small, False)
    assert chosen.mode == "step" and "does not fit on 16 multiprocessors" in chosen.why


def test_what_keeps_tiles_from_a_device_is_said_in_words():
    problem, tiles = Problem("bf16", 384), Tiles(32, 16, 64, 4)
    assert why_not(tiles, "grid", problem, Device(20, 227 * 1024, (9, 0))) == ["24 programs, 20 multiprocessors"]
    (why,) = why_not(tiles, "grid", problem, Device(132, 32 * 1024, (9, 0)))
    assert why == "W_hh takes 53248 of 32768 bytes of shared memory"
    (why,) = why_not(Tiles(8, 128, 128, 8, split=8), "local", problem._replace(H=130), H100)
    assert why == "H 130, a program has 128 units"
    t4 = choose_kernel(torch.float16, 16, 512, Device(40, 64 * 1024, (7, 5)), False)
    assert t4.mode == "torch" and "compute capability 7.5: Triton has no matrix instructions for it" in t4.why
    assert grouped(torch.float16, 16, 512, 3, Device(40, 64 * 1024, (7, 5)), False) == [1, 1, 1]


@pytest.mark.parametrize("device", AMD)
def test_amd_is_asked_for_and_runs_step_by_step(device, monkeypatch, request):
    request.addfinalizer(plan.forget_plans)
    cuda = torch.device("cuda", 0)  # as torch calls AMD's devices
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(plan, "cuda_device", lambda asked: AMD[device])
    for dtype, ieee in KERNEL_DTYPES:
        why = choose(dtype, 16, 512, cuda, ieee).why
        assert "FUSED_LSTM_ROCM=1" in why and "no AMD GPU has run" in why
    choose.cache_clear()
    monkeypatch.setattr(plan, "ROCM", True)
    for (dtype, ieee), H, B in product(KERNEL_DTYPES, (1, 20, 37, 512, 1027, 2048), (1, 64)):
        chosen = choose(dtype, B, H, cuda, ieee)
        assert chosen.mode == "step" and chosen.precision == "ieee" and chosen.forward.batch >= 16
        step = choose_one_step(dtype, B, H, cuda, ieee, layers=2)
        assert step.precision == "ieee" and step.layers == 1 and step.forward.batch >= 16
        assert layers_together(dtype, B, H, 2, cuda, ieee) == [1, 1] and not in_kernel(dtype, B, H, 8, cuda, ieee, 1)


def test_plan_takes_every_form_of_input():
    module = LSTM(5, 8, batch_first=True)
    forms = [torch.randn(3, 4, 5), torch.randn(4, 5), pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])]
    assert all(module.plan(x).mode == "local" for x in forms)


def test_nothing_is_saved_where_no_gradient_is_wanted():
    module, x = LSTM(5, 8), torch.randn(4, 3, 5)
    saved = []

    def run():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            module(x)
        return len(saved)

    assert run() > 0
    with torch.no_grad():
        assert run() == 0
    module.requires_grad_(False)
    assert run() == 0


def test_gradients_nobody_wants_are_not_computed():
    module, x = LSTM(5, 8, proj_size=3), torch.randn(4, 3, 5, requires_grad=True)
    module.weight_hh_l0.requires_grad_(False)
    module(x)[0].sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_hr_l0.grad is not None and x.grad is not None


@pytest.mark.parametrize("kind", ["hidden", "parameter"])
def test_tensors_on_different_devices(kind):
    x, far = torch.randn(2, 3, 5), torch.empty(1, device="meta")
    here = [torch.empty(1)]
    text = f"found input tensor at cpu and {kind} tensor at meta"
    states, weights = ([far, far], here) if kind == "hidden" else ([*here, *here], [far])
    with pytest.raises(RuntimeError, match=text):
        check_tensors(Call(x, *states, weights, None, None, None, Options()))


@pytest.mark.parametrize("kind", ["hidden", "parameter"])
def test_tensors_of_different_dtypes(kind):
    module, x, state = LSTM(5, 8), torch.randn(2, 3, 5), torch.zeros(1, 3, 8)
    if kind == "parameter":
        module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.detach().double())
    with pytest.raises(RuntimeError, match=f"Input and {kind} tensors are not the same dtype"):
        module(x, (state, state if kind == "parameter" else state.double()))


@pytest.mark.parametrize(
    "name,shape", [("weight_hh_l0", (32, 7)), ("weight_hh_l0", (28, 8)), ("weight_ih_l0", (28, 5))]
)
def test_a_replaced_weight_of_another_size_is_not_read_out_of_bounds(name, shape):
    module = LSTM(5, 8, bias=False)
    setattr(module, name, torch.nn.Parameter(torch.zeros(shape)))
    with pytest.raises(RuntimeError, match="hidden size 8 takes weight_hh"):
        module(torch.randn(2, 3, 5))


@pytest.mark.parametrize(
    "B, options, mode",
    [
        (16, {}, "grid"),
        (1024, {}, "torch"),
        # Where README says that it begins.
        (256, {"H": 384}, "torch"),
        (512, {"H": 256}, "grid"),
        (1024, {"H": 256}, "torch"),
        (1024, {"cut": True}, "grid"),  # which cuDNN has slowly
        (1024, {"options": Options(return_states=True)}, "grid"),
        (1024, {"options": Options(recompute=128)}, "grid"),
        (1024, {"context": Context(compiled=True)}, "grid"),  # a graph is made for every B
    ],
)
def test_a_large_batch_goes_where_the_model_says(B, options, mode, monkeypatch):
    monkeypatch.setattr(plan, "cuda_device", lambda device: H100)
    monkeypatch.setattr(route, "memory_of", lambda device: None)
    monkeypatch.setattr(route, "LARGE", 256)
    form = {"options": Options(), "context": SAVES, "device": torch.device("cuda", 0), "dtype": torch.bfloat16}
    planned = route.plan_of(route.Form(**form | {"B": B, "H": 1024, "P": 0, "ieee": False} | options))
    assert planned.mode == mode and ("cuDNN" in planned.why) == (mode == "torch")
    assert mode == "torch" or planned.forward.poll or (B > 16 and planned.forward.in_turn) or "H" in options


# Streaming


class Record(TorchDispatchMode):
    """The operators of a call, and the new tensors that they leave."""

    def __init__(self):
        super().__init__()
        self.operators, self.storages = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        self.operators.append(str(function))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return result


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_streaming_call_allocates_its_outputs_alone(num_layers):
    module, x = LSTM(5, 20, num_layers), torch.randn(1, 4, 5)
    hx = torch.randn(num_layers, 4, 20), torch.randn(num_layers, 4, 20)
    with torch.no_grad(), Record() as record:
        y, (hn, cn) = module(x, hx)
    assert {t.data_ptr() for t in record.storages.values()} == {t.data_ptr() for t in (y, hn, cn)}
    assert record.operators.count("fused_lstm.one_step.default") == 1
    assert not [name for name in record.operators if "local_scalar" in name or "nonzero" in name]  # no host sync


def test_the_plan_knows_a_call_of_one_step():
    module, x = LSTM(5, 20), torch.randn(1, 4, 5)
    assert module.plan(x).mode == "local"
    with torch.no_grad():
        assert module.plan(x).mode == "one step"
        assert module.plan(x.expand(2, 4, 5)).mode == "local"
        both = LSTM(5, 20, 3, bidirectional=True, proj_size=3).plan(x)
        assert (both.mode, both.layers, both.directions) == ("one step", 3, 2) and "all 3 layers" in both.why
        assert LSTM(5, 20, 2).plan(x.expand(1, 65, 4, 5)[0].reshape(1, 260, 5)).layers == 1  # they do not wait
        assert LSTM(5, 20, batch_first=True).plan(x).mode == "local"
        assert LSTM(5, 20, batch_first=True).plan(x.transpose(0, 1)).mode == "one step"


def test_one_step_under_torch_compile_and_vmap():
    cell = LSTMCell(5, 20)
    x, hx = torch.randn(3, 5), (torch.randn(3, 20), torch.randn(3, 20))
    with torch.no_grad():
        expected = cell(x, hx)
        torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="aot_eager")(x, hx), expected)
        mapped = torch.vmap(lambda x, h, c: cell(x[None], (h[None], c[None])))(x, *hx)
    torch.testing.assert_close(tuple(s[:, 0] for s in mapped), expected)


def test_the_plan_says_how_higher_derivatives_run_and_what_it_rests_on():
    module, x = LSTM(5, 20), torch.randn(2, 4, 5)
    assert "model" in module.plan(x).evidence and module.plan(x.to("meta")).evidence == "no choice"
    assert "slow" in module.plan(x).higher_derivatives
    assert "torch's own LSTM" in module.plan(x.to("meta")).higher_derivatives
