"""torch's own description of nn.LSTM in its module tests (ModuleInfo), run on fused_lstm.LSTM."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.testing import make_tensor

from fused_lstm import LSTM

from .parity import assert_close

pytest.importorskip("expecttest", reason="torch's own module tests need it")
with pytest.MonkeyPatch.context() as patch:
    # Their import would forbid all other tests of the process to set a switch of torch.backends.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
    from torch.testing._internal.common_utils import freeze_rng_state, gradcheck, noncontiguous_like

INFO = next(info for info in module_db if info.module_cls is nn.LSTM)
DTYPES = [*INFO.dtypes, torch.float16, torch.bfloat16]  # torch's entry names float32 and float64 only
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(dtype, device="cpu", requires_grad=False, training=True):
    with torch.random.fork_rng():
        return INFO.module_inputs_func(INFO, device=device, dtype=dtype, requires_grad=requires_grad, training=training)


def build(sample, dtype, cls=LSTM, device="cpu", training=True):
    arguments = sample.constructor_input
    return cls(*arguments.args, **arguments.kwargs, device=device, dtype=dtype).train(training)


def pair(sample, dtype, training=True):
    """Ours and nn.LSTM of one sample, with the same weights."""
    ours, theirs = build(sample, dtype, training=training), build(sample, dtype, nn.LSTM, training=training)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def call(module, sample):
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def flat(outputs):
    y, (hn, cn) = outputs
    return {"y": y.detach(), "hn": hn.detach(), "cn": cn.detach()}


def double(value):
    return tuple(map(double, value)) if isinstance(value, tuple) else value.detach().double()


def few(dtype, **options):
    """Four samples with states, in which each flag is once on and once off; the interpreter is slow."""
    return [samples(dtype, **options)[2 * k + 1] for k in (0b1111, 0b0110, 0b1001, 0b0000)]


# TestModule of torch's test/test_modules.py, test for test


@pytest.mark.parametrize("dtype,training", [*((dtype, True) for dtype in DTYPES), (torch.float32, False)])
def test_forward(dtype, training):
    # Every sample in float32; in the other types four, whose kernels differ from it in nothing but the type.
    for sample in samples(dtype) if dtype == torch.float32 and training else few(dtype, training=training):
        with freeze_rng_state():
            ours, theirs = pair(sample, dtype, training)
            outputs, others = flat(call(ours, sample)), flat(call(theirs, sample))
            gold = flat(copy.deepcopy(theirs).double()(*map(double, sample.forward_input.args)))
            reference = flat(sample.reference_fn(ours, *sample.forward_input.args, **sample.forward_input.kwargs))
        for name in gold:
            assert_close(name, outputs[name], others[name], gold[name], dtype)
            torch.testing.assert_close(outputs[name], reference[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_kwargs(device, dtype):
    for sample in samples(dtype):
        module = build(sample, dtype, device=device)
        assert len(list(module.parameters())) == len(list(build(sample, dtype, nn.LSTM).parameters()))
        assert not list(module.buffers())
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}


def test_constructor_takes_the_arguments_of_nn_lstm():
    sample = samples(torch.float32)[0].constructor_input
    names = [name for name in inspect.signature(LSTM).parameters if name in sample.kwargs]
    assert set(names) == set(sample.kwargs)


def test_repr():
    for sample in samples(torch.float32):
        ours, theirs = pair(sample, torch.float32)
        assert repr(ours) == repr(theirs) and str(ours) == str(theirs)


@MODES
def test_pickle(training):
    for sample in few(torch.float32):
        with freeze_rng_state():
            module = build(sample, torch.float32, training=training)
            copied = pickle.loads(pickle.dumps(module))
            assert copied.training is training
            for name, value in flat(call(module, sample)).items():
                assert torch.equal(value, flat(call(copied, sample))[name])


def test_grad():
    """gradcheck of the outputs with respect to the input, the states and the parameters."""
    for sample in few(torch.float64, requires_grad=True)[:1]:
        module = build(sample, torch.float64)
        x, hx = sample.forward_input.args
        parameters = dict(module.named_parameters())

        def run(x, h0, c0, *values, module=module, names=tuple(parameters)):
            with freeze_rng_state():
                y, states = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x, (h0, c0)))
            return y, *states

        assert gradcheck(run, (x, *hx, *parameters.values()), nondet_tol=INFO.gradcheck_nondet_tol, fast_mode=True)


def gradients(module, x, hx):
    """Outputs, and the gradients of the input, the states and the parameters, for cotangents of ones."""
    inputs = [x, *hx, *module.parameters()]
    y, (hn, cn) = module(x, hx)
    return [v.detach() for v in (y, hn, cn)], torch.autograd.grad(y.sum() + hn.sum() + cn.sum(), inputs)


@pytest.mark.parametrize("dtype", INFO.dtypes)
def test_non_contiguous_tensors(dtype):
    """Inputs, states and gradients of any strides give the numbers of the contiguous ones."""
    for sample in few(dtype, requires_grad=True)[:3]:
        module = build(sample, dtype)
        x, hx = sample.forward_input.args
        expected = gradients(module, x, hx)
        strided = [noncontiguous_like(t).detach().requires_grad_() for t in (x, *hx)]
        for form in [(strided[0], hx), (x, tuple(strided[1:])), (strided[0], tuple(strided[1:]))]:
            torch.testing.assert_close(gradients(module, *form), expected)

        y = module(x, hx)[0]
        cotangent = make_tensor(y.shape, device="cpu", dtype=dtype)
        contiguous = torch.autograd.grad(y, x, cotangent)
        torch.testing.assert_close(torch.autograd.grad(module(x, hx)[0], x, noncontiguous_like(cotangent)), contiguous)


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta(dtype):
    """Shapes and dtypes on the meta device are those of the CPU, and of nn.LSTM there."""
    for here, there in zip(few(dtype), few(dtype, device="meta"), strict=True):
        ours, theirs = (build(there, dtype, cls, "meta") for cls in (LSTM, nn.LSTM))
        real = flat(call(build(here, dtype), here))
        for outputs in (flat(call(ours, there)), flat(call(theirs, there))):
            for name, value in outputs.items():
                assert value.is_meta and (value.shape, value.dtype) == (real[name].shape, real[name].dtype)


@pytest.mark.parametrize("dtype", INFO.dtypes)
def test_train_and_eval_agree_without_dropout(dtype):
    for sample in few(dtype):
        module = build(sample, dtype)
        training = flat(call(module.train(), sample))
        assert all(torch.equal(training[k], v) for k, v in flat(call(module.eval(), sample)).items())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    sample = samples(torch.float32)[1]
    module = build(sample, torch.float32)
    call(module, sample)[0].sum().backward()
    module.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("swap", [True, False])
def test_to(swap):
    """Moving between dtypes, by copying or by swapping tensors, keeps parameters whole and usable."""
    sample = samples(torch.float64)[1]
    module = build(samples(torch.float32)[1], torch.float32)
    identities = [id(p) for p in module.parameters()]
    saved = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        module.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(saved)
    assert identities == [id(p) for p in module.parameters()]
    assert all(p.dtype == torch.float64 for p in module.parameters())
    theirs = build(sample, torch.float64, nn.LSTM)
    theirs.load_state_dict(module.state_dict())
    torch.testing.assert_close(flat(call(module, sample)), flat(call(theirs, sample)))


def test_memory_format():
    """channels_last says nothing about parameters of at most two dimensions: nothing changes."""
    sample = samples(torch.float32)[1]
    module = build(sample, torch.float32)
    expected = flat(call(module, sample))
    module.to(memory_format=torch.channels_last)
    assert all(torch.equal(expected[k], v) for k, v in flat(call(module, sample)).items())


@MODES
@pytest.mark.parametrize("dtype", INFO.dtypes)
def test_errors(dtype, training):
    """Every refusal that torch lists for nn.LSTM, of the same type and with the same text."""
    cases = INFO.module_error_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=False, training=training)
    assert {case.error_on for case in cases} == set(ModuleErrorEnum)
    for case in cases:
        arguments = case.module_error_input.constructor_input
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                LSTM(*arguments.args, **arguments.kwargs)
        else:
            module = LSTM(*arguments.args, **arguments.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                call(module, case.module_error_input)
