"""W_hh of 8 bits in the grid form: multiplied as it is, under every schedule, where the plan says so and else wide; and
what its instructions make of every number of 8 bits."""

import copy
import re

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fused_lstm import LSTM, operators, quantize, reference, swap
from fused_lstm.kernels import choice, findings, narrow
from fused_lstm.kernels import plan as plan_module
from fused_lstm.kernels.choice import choose_narrow, precision_of
from fused_lstm.kernels.findings import Refused
from fused_lstm.kernels.forward import forward
from fused_lstm.kernels.plan import Plan, hardware_of
from fused_lstm.kernels.tiles import A100, H100, Tiles
from fused_lstm.paths import layers
from fused_lstm.quantized import KINDS
from fused_lstm.quantized import narrow as to_8_bits
from fused_lstm.weights import widened

from .explorer import SCHEDULES, explore
from .layouts import NAMES, layout_of
from .parity import assert_close
from .test_quantized import exact

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def plan_for(dtype, device, kind="int8", batch=8, directions=1):
    """Of a few units in each program; on a GPU all at once, in the interpreter a launch a step."""
    tiles = Tiles(batch, 16, 4 * 64 // dtype.itemsize, 4, split=4, poll=True)
    if device == "cpu":
        return Plan("step", tiles, None, 0, "ieee", "", directions, weights=kind)
    hardware = hardware_of(torch.device(device, torch.cuda.current_device()))
    precision = precision_of(dtype, True, hardware)
    return Plan("grid", tiles, None, hardware.multiprocessors, precision, "", directions, weights=kind)


def inputs(dtype, lead, B, H, kind, D=1, large=1.0):
    """input_gates, q, scale and the states of as many directions."""
    of_each = [to_8_bits(2 / H**0.5 * torch.randn(4 * H, H).to(dtype), kind) for _ in range(D)]
    q, scale = (torch.stack(tensors) for tensors in zip(*of_each, strict=True))
    states = large * torch.randn(D, B, H), torch.randn(D, B, H)
    return torch.randn(*lead, D * 4 * H).to(dtype), q, scale, *(state.to(dtype) for state in states)


def check(dtype, form, B, H, device, kind="int8", reverse=False, batch=8, large=1.0, T=4):
    """The launcher against the reference with the weights that the 8 bits stand for, by the rule."""
    layout, lead = layout_of(form, T, B)
    x, q, scale, h0, c0 = inputs(dtype, lead, B, H, kind, large=large)
    c_reset = None if layout.starts is None else torch.randn(1, B, H, dtype=torch.promote_types(dtype, torch.float32))
    plan = plan_for(dtype, device, kind, batch)
    given, _ = layout_of(form, T, B, device)
    options = {"scale": scale.to(device), "c_reset": None if c_reset is None else c_reset.to(device)}
    tensors = (tensor.to(device) for tensor in (x, q, h0, c0))
    ours = forward(*tensors, plan=plan, layout=given, reverse=reverse, save=False, **options)

    def by_reference(dtype):
        wide = widened(q[0], scale[0].to(dtype))
        of = (x.to(dtype), wide, h0[0].to(dtype), c0[0].to(dtype))
        reset = None if c_reset is None else c_reset[0].to(dtype)
        return reference.forward(*of, layout=layout, reverse=reverse, c_reset=reset)[:3]

    theirs = by_reference(dtype) if dtype != torch.float64 else (None,) * 3
    found = zip(("y", "hn", "cn"), (ours[0], ours[1][0], ours[2][0]), theirs, by_reference(torch.float64), strict=True)
    for name, one, other, gold in found:
        assert_close(name, one.cpu().to(dtype), other, gold, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [24, 72])
def test_a_launch(H, kind, dtype, device):
    check(dtype, "dense", 9, H, device, kind)


def test_sums_in_float64():
    check(torch.float64, "dense", 9, 20, "cpu")


@pytest.mark.parametrize("form", NAMES[1:])
@pytest.mark.parametrize("reverse", [False, True])
def test_layouts(form, reverse, device):
    check(torch.bfloat16, form, 5, 40, device, reverse=reverse, batch=16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_h_that_float16_does_not_hold(dtype, device):
    check(dtype, "dense", 3, 24, device, large=60.0 if dtype == torch.float16 else 1e6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_breaks_it(schedule, dtype):
    """In a grid, where all steps but the first multiply what has been polled."""
    T, B, H, D = 3, 3, 6, 2
    layout, lead = layout_of("lengths", T, B)
    x, q, scale, h0, c0 = inputs(dtype, lead, B, H, "int8", D)
    tiles = Tiles(2, 2, 16 if dtype == torch.float64 else 64, 2, split=2, poll=True)
    plan = Plan("grid", tiles, None, 12, "ieee", "", D, weights="int8")
    with explore(schedule, 0, strict=True) as explorer:
        ours = forward(x, q, h0, c0, plan=plan, layout=layout, scale=scale, save=False)
    assert explorer.switches > 0
    for d in range(D):
        of = (x.chunk(D, -1)[d].double(), widened(q[d], scale[d].double()), h0[d].double(), c0[d].double())
        gold = reference.forward(*of, layout=layout, reverse=d == 1)[:3]
        for one, other in zip((ours[0].chunk(D, -1)[d], ours[1][d], ours[2][d]), gold, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-2)


@pytest.fixture
def pays(monkeypatch):
    """Every layer is taken to be faster with 8 bits."""
    monkeypatch.setattr(choice, "narrow_pays", lambda *args: True)
    choose_narrow.cache_clear()
    yield
    choose_narrow.cache_clear()


def made(H=136, L=2, D=2, dtype=torch.bfloat16, kind="int8", **options):
    module = LSTM(24, H, L, bidirectional=D == 2, dtype=dtype, **options).eval()
    assert quantize(module, kind) == 1
    return module


CALLS = {
    "dense": lambda module, x, hx: module(x, hx),
    "lengths": lambda module, x, hx: module(x, hx, lengths=torch.tensor([2, 3, 1, 3, 0], device=x.device)),
    "reset": lambda module, x, hx: module(x, hx, reset=torch.eye(3, 5, dtype=torch.bool, device=x.device)),
    "packed": lambda module, x, hx: module(pack_padded_sequence(x, [3, 3, 2, 2, 1]), hx),
    "mask": lambda module, x, hx: module(x, hx, mask=~torch.eye(3, 5, dtype=torch.bool, device=x.device)),
}


@pytest.mark.parametrize("how", CALLS)
def test_a_module(how, pays, device, monkeypatch):
    """Against the same module with wide weights, and, where nn.LSTM has the call, against that."""
    module = made().to(device)
    wide = copy.deepcopy(module)
    swap(wide, back=True)
    swap(wide)
    x, hx = torch.randn(3, 5, 24), (torch.randn(4, 5, 136), torch.randn(4, 5, 136))
    x, hx = x.to(device, torch.bfloat16), tuple(state.to(device, torch.bfloat16) for state in hx)
    seen = []
    run = operators.forward.run
    monkeypatch.setattr(operators.forward, "run", lambda a, **more: (seen.append(a.weight_hh.dtype), run(a, **more))[1])
    with torch.no_grad():
        assert module.plan(x).weights == "int8" and "W_hh in int8" in str(module.plan(x))
        ours, theirs = CALLS[how](module, x, hx), CALLS[how](wide, x, hx)
        assert seen == [torch.int8] * 2 + [torch.bfloat16] * 2
        torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
        if how == "dense":
            gold = exact(module.cpu())(x.double().cpu(), tuple(state.double().cpu() for state in hx))
            for name, one, other, by in zip(
                "yhc", (ours[0], *ours[1]), (theirs[0], *theirs[1]), (gold[0], *gold[1]), strict=True
            ):
                assert_close(name, one.cpu(), other.cpu(), by, torch.bfloat16)


def test_where_it_is_made_wide(pays, device):
    module, x = made().to(device), torch.randn(3, 5, 24, dtype=torch.bfloat16).to(device)
    assert module.plan(x.clone().requires_grad_()).weights == ""  # which has a backward pass
    with torch.no_grad():
        assert module.plan(x).weights == "int8" and module.plan(x[:1]).mode == "one step"
        with torch.autocast(device, torch.bfloat16):
            assert module.plan(x).weights == ""
            assert module(x)[0].dtype == torch.bfloat16
        y, _ = module(x)
        reset = torch.zeros(3, 5, dtype=torch.bool, device=device)
        for options in ({"return_states": True}, {"reset": reset, "reset_to": "hx"}):
            torch.testing.assert_close(module(x, **options)[0], y, atol=0.02, rtol=0.02)
        projecting = made(proj_size=7).to(device)
        assert projecting.plan(x).weights == "" and projecting(x)[0].shape == (3, 5, 14)
        assert made(kind="fp8").to(device).plan(x).weights == "fp8"
    with pytest.raises(RuntimeError, match=r"weight_hh of torch.int8 does not go with the scale"):
        z, layout = torch.zeros(1, 2, 20), layout_of("dense", 3, 2)[0]
        q = torch.zeros(1, 80, 20, dtype=torch.int8)
        operators.forward(
            operators.ForwardArgs(
                torch.zeros(3, 2, 80), q, z, z, None, layout, None, operators.Stack(), False, False, True
            )
        )


def test_in_a_graph_a_transform_and_in_chunks(pays, monkeypatch, device):
    module, x = made(L=1, D=1).to(device), torch.randn(3, 5, 24, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        y, hx = module(x)
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), (y, hx), atol=0.01, rtol=0.01)
        of_samples = torch.vmap(lambda x: module(x)[0])(torch.stack([x, x]))
        torch.testing.assert_close(of_samples, torch.stack([y, y]), atol=0.01, rtol=0.01)
        monkeypatch.setattr(layers, "memory_of", lambda device: 1)
        monkeypatch.setattr(layers, "chunk_for", lambda *sizes: 2)
        torch.testing.assert_close(module(x), (y, hx), atol=0.01, rtol=0.01)


@pytest.mark.stands_in
def test_a_refused_kernel_makes_way_for_wide_weights(pays, monkeypatch):
    module, x = made(L=1, D=1), torch.randn(3, 5, 24, dtype=torch.bfloat16)
    launched = operators.forward_kernel.forward

    def refusing(*args, **options):
        if options.get("scale") is not None:
            raise Refused("not here", lasts=True)
        return launched(*args, **options)

    monkeypatch.setattr(operators.forward_kernel, "forward", refusing)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="a kernel does not run here"):
        module(x)
        plan = module.plan(x)
    assert plan.weights == "" and "not here" in plan.refused[0]
    monkeypatch.undo()
    findings.forget()
    choice.candidates.cache_clear()
    plan_module.forget_plans()


def test_a_plan_has_twice_the_hidden_units():
    """Of few rows, without weights that stream: up to 2048 on an H100, on an A100 up to as many as it has programs."""

    def most(device, kind, B=1):
        sizes = [H for H in range(64, 2200, 8) if choose_narrow(torch.bfloat16, B, H, device, True, 1, kind)]
        return min(sizes), max(sizes)

    assert most(H100, "int8") == most(H100, "fp8") == (1064, 2048)
    assert most(A100, "int8") == (1032, 1728)
    plan = choose_narrow(torch.bfloat16, 1, 2048, H100, True, 1, "int8")
    assert (plan.mode, plan.forward.units, plan.backward) == ("grid", 16, None) and "in int8 is spread" in plan.why
    assert choose_narrow(torch.bfloat16, 1, 2047, H100, True, 1, "int8") is None  # 16-byte loads do not divide it
    cpu = torch.device("cpu")
    assert plan_module.takes_narrow("fp8", cpu, H100)
    gpu = torch.device("cuda", 0)
    assert [plan_module.takes_narrow(kind, gpu, A100) for kind in KINDS] == [True, False]


def bits(x):
    return np.asarray(x, dtype=np.uint32)


def halves(x, dtype):
    """The lower and upper 16 bits of words as float32."""
    return [
        torch.from_numpy((x >> shift & 0xFFFF).astype(np.uint16).view(np.int16)).view(dtype).float()
        for shift in (0, 16)
    ]


def packed(pair, dtype):
    low, high = (each.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for each in pair)
    return low | high << 16


def prmt(a, b, selector):
    of_byte = [a >> 8 * k & 0xFF for k in range(4)] + [b >> 8 * k & 0xFF for k in range(4)]
    return sum((of_byte[selector >> 4 * k & 7] << 8 * k for k in range(4)), bits(0) * a)


def evaluate(lines, registers):
    """The registers after some lines of PTX, each with a word of every number."""

    def value(name):
        if name.startswith("0f"):
            return bits(int(name[2:], 16))
        return bits(int(name, 16)) if name.startswith("0x") else registers[name]

    for line in lines:
        text = line.strip().rstrip(";")
        if text in ("{", "}") or text.startswith(".reg"):
            continue
        operation, rest = text.split(maxsplit=1)
        if split := re.fullmatch(r"\{low, high\}, (\w+|\$\d+)", rest):
            registers["low"], registers["high"] = value(split[1]) & 0xFFFF, value(split[1]) >> 16
            continue
        into, *names = rest.split(", ")
        given = [value(name) for name in names]
        if operation == "mov.b32":
            found = given[0]
        elif operation in ("xor.b32", "or.b32", "and.b32"):
            found = {"xor": np.bitwise_xor, "or": np.bitwise_or, "and": np.bitwise_and}[operation[:-4]](*given)
        elif operation == "prmt.b32":
            found = prmt(given[0], given[1], int(given[2]))
        elif operation == "sub.f16x2":
            pairs = zip(*(halves(each, torch.float16) for each in np.broadcast_arrays(*given)), strict=True)
            found = packed([a - b for a, b in pairs], torch.float16)
        elif operation == "fma.rn.bf16x2":
            triples = zip(*(halves(each, torch.bfloat16) for each in np.broadcast_arrays(*given)), strict=True)
            found = packed([a * b + c for a, b, c in triples], torch.bfloat16)
        elif operation == "sub.f32":
            a, b = (np.ascontiguousarray(each).view(np.float32) for each in np.broadcast_arrays(*given))
            found = (a - b).view(np.uint32)
        elif operation == "cvt.rn.f16x2.e4m3x2":
            pair = [
                torch.from_numpy((given[0] >> shift & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn)
                for shift in (0, 8)
            ]
            found = packed([each.float() for each in pair], torch.float16)
        elif operation == "cvt.f32.f16":
            found = halves(given[0], torch.float16)[0].numpy().view(np.uint32)
        elif operation == "cvt.rn.bf16x2.f32":
            pair = [torch.from_numpy(each.view(np.float32).copy()) for each in reversed(given)]
            found = packed(pair, torch.bfloat16)
        else:
            raise AssertionError(f"no {operation}")
        registers[into] = found
    return registers


def lines_of(function, *args):
    found = getattr(function, "fn", function)(*args)
    return found.split("\n") if isinstance(found, str) else found


@pytest.mark.parametrize("to", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["int8", "fp8e4nv"])
def test_every_number_of_8_bits_is_made_wide_exactly(kind, to):
    every = torch.arange(-127, 128) if kind == "int8" else torch.arange(256)
    every = every.to(torch.int8).view(torch.uint8).numpy().astype(np.uint32) if kind == "int8" else bits(every.numpy())
    if kind == "fp8e4nv":
        every = every[(every & 0x7F) != 0x7F]  # NaN
    others = [np.roll(every, k) for k in range(4)]
    word = others[0] | others[1] << 8 | others[2] << 16 | others[3] << 24
    of_eight = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    wanted = [torch.from_numpy(each.astype(np.uint8)).view(of_eight).float() for each in others]
    count = 1 if to == "fp32" else 2
    registers = {f"${4 + k}": word for k in range(count)} | {f"${4 + count}": bits(0) * word}
    if kind == "int8":  # as load_words() leaves them
        for k in range(count):
            registers = evaluate(lines_of(narrow.add_offset, [f"${4 + k}"]), registers)
    registers = evaluate(lines_of(narrow.widening, kind, to), registers)
    if to == "fp32":
        found = [torch.from_numpy(np.ascontiguousarray(registers[f"${k}"]).view(np.float32).copy()) for k in range(4)]
    else:
        dtype = torch.bfloat16 if to == "bf16" else torch.float16
        found = [half for k in range(4) for half in halves(registers[f"${k}"], dtype)]
        wanted = wanted * 2
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
