"""What is kept for backward, counted, and that recompute gives the same gradients from less of it."""

import copy
import io
import math
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fused_lstm
from bench.memory import beside, kept
from fused_lstm import LSTM, autograd, chunks, gradients, recurrence, route
from fused_lstm.chunks import chunk_for
from fused_lstm.kernels.forward import forward
from fused_lstm.kernels.planned import Plan
from fused_lstm.kernels.tiles import Tiles
from fused_lstm.paths import layers

from .parity import WIDEST, assert_parity, assert_parity_of, twin
from .test_sequences import LAYERS, LENGTHS, RESET, B, H, I, Loop, T, assert_oracle, given, module_and_input

FORMS = ["", "lengths", "reset", "lengths and reset to hx"]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def recomputing(options, dtype, device, chunk):
    module, x, hx = module_and_input(options, dtype, device)
    module.recompute = chunk
    return module, x, hx


TWO, PROJECTED = "two layers, both directions", "projection, both directions"
# Chunks that do not divide T, of one step, and longer than T.
CASES = [
    *((form, layers, 4, torch.float64) for form in FORMS for layers in (TWO, PROJECTED)),
    *(("lengths and reset to hx", TWO, chunk, torch.float64) for chunk in (1, 9)),
    *(("lengths and reset", PROJECTED, 3, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]


@pytest.mark.parametrize("form, layers, chunk, dtype", CASES, ids=str)
def test_every_state_and_gradient(form, layers, chunk, dtype, device):
    module, x, hx = recomputing(LAYERS[layers], dtype, device, chunk)
    keywords = given(module, form) | ({"reset_to": "hx"} if "hx" in form else {})

    def loop(lstm):
        masks = (LENGTHS if "lengths" in form else None, RESET if "reset" in form else None)
        return Loop(lstm, *masks, keywords.get("reset_to", "zero"))

    assert_oracle(loop, module, x, hx, **keywords, return_states=True)


@pytest.mark.parametrize("layers, chunk, dtype", [(TWO, 4, torch.float64), (PROJECTED, 1, torch.float32)])
def test_packed(layers, chunk, dtype, device):
    module, x, hx = recomputing(LAYERS[layers], dtype, device, chunk)
    packed = pack_padded_sequence(x, [3, 6, 1, 4], batch_first=module.batch_first, enforce_sorted=False)
    assert_parity(module, packed, hx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(1, 4), (5, 1), (5, 0), (20, 2)])
def test_sizes(sizes, dtype, device):
    module = LSTM(I, 70 if sizes[0] < 20 else H, dtype=dtype, device=device, recompute=3)
    assert_parity(module, torch.randn(*sizes, I).to(device, dtype))


def test_higher_derivatives(device):
    def second(module, x):
        y, (hn, cn) = module(x, tuple(s.to(x) for s in hx))
        (dx,) = torch.autograd.grad(y.square().sum() + hn.sum() + cn.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *module.parameters()])

    module, x, hx = recomputing({}, WIDEST[device], device, 4)
    assert_parity_of(second, module, x)


def test_in_one_graph():
    module, x = LSTM(I, H, bidirectional=True, recompute=4), torch.randn(T, B, I, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for steps in (6, 5):
        results = [call(x[:steps])[0] for call in (compiled, module)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), [x, *module.parameters()]) for y in results))


def test_under_vmap():
    module, x = LSTM(I, H, recompute=4).double(), torch.randn(3, T, B, I, dtype=torch.float64)
    weights = dict(module.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(module, weights, x)[0].sum()

    ours = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    one_by_one = [torch.func.grad(loss)(weights, sample) for sample in x]
    for name in weights:
        torch.testing.assert_close(ours[name], torch.stack([grads[name] for grads in one_by_one]))


# Counted


@pytest.mark.parametrize("recompute", [False, 25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"batch_first": True}, {"bidirectional": True}], ids=str)
def test_the_plan_says_what_is_kept(options, dtype, recompute):
    T, B, H = 50, 3, 8
    module = LSTM(I, H, **options, dtype=dtype, recompute=recompute)
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), I).to(dtype)
    plan, D = module.plan(x), 2 if module.bidirectional else 1
    count, _ = kept(lambda: module(x)[0])
    output = T * B * D * (module.proj_size or H) * dtype.itemsize
    of_hx = D * B * ((module.proj_size or H) * dtype.itemsize + H * dtype.itemsize)
    rest = beside(count, [x, *module.parameters()]) - output - of_hx
    assert plan.chunk == recompute and 0 <= rest <= T * B * D * plan.saved_bytes
    if not recompute:
        assert rest == T * B * plan.saved_bytes * D
        if dtype != torch.bfloat16:
            assert plan.saved_bytes == 5 * H * dtype.itemsize
    # At the peak of backward the gradients of the gates beside that, and in a chunk the gates and cells themselves.
    assert plan.peak_bytes == 4 * H * dtype.itemsize + bool(recompute) * module_keeps(dtype, H)
    assert f"{plan.peak_bytes} bytes more" in str(plan)


def module_keeps(dtype, H):
    return LSTM(I, H, dtype=dtype).plan(torch.zeros(2, 1, I, dtype=dtype)).saved_bytes


def test_large_batches_write_the_gates_over_what_they_are_made_of():
    """A third less at the peak of forward."""
    tiles = Tiles(16, 32, 32, 1, part=16)
    plan = Plan("step", tiles, tiles, 0, "ieee", "")
    tensors = [torch.randn(shape) for shape in [(3, 20, 4 * 36), (4 * 36, 36), (20, 36), (20, 36)]]
    *others, apart = forward(*tensors, plan=plan)
    *same, gates = forward(*tensors, plan=plan, over_input=True)
    assert gates is tensors[0] and all(map(torch.equal, [*same, gates], [*others, apart]))


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("form", ["dense", "packed", "lengths and reset"])
def test_without_gradients_what_would_not_fit_is_made_in_chunks(options, form, monkeypatch):
    """The input's part of the gates, chunk by chunk of steps: the same results."""
    T, B = 20, 3
    module, x = LSTM(I, H, **options).eval(), torch.randn(T, B, I)
    keywords = {"lengths": [T, 7, 0], "reset": torch.rand(T, B) < 0.1} if "reset" in form else {}
    if module.batch_first:
        x = x.transpose(0, 1).contiguous()
        keywords = {name: value.T if name == "reset" else value for name, value in keywords.items()}
    if form == "packed":
        x = pack_padded_sequence(x, [T, 17, 3], module.batch_first)
    chunks, of_chunk = [], recurrence.forward
    monkeypatch.setattr(recurrence, "forward", lambda *args: chunks.append(args[0]) or of_chunk(*args))
    with torch.no_grad():
        whole, in_one = module(x, **keywords), len(chunks)
        monkeypatch.setattr(layers, "memory_of", lambda device: 16 * 4 * H * 4)
        in_chunks = module(x, **keywords)
    assert in_one == module.num_layers and len(chunks) - in_one == in_one * (1 + module.bidirectional) * 2
    torch.testing.assert_close(in_chunks, whole)
    chunks.clear()
    module(x, **keywords)  # what gradients need is kept all the same
    assert len(chunks) == in_one


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_out_of_memory_names_recompute(during, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    module, x = LSTM(I, H, bidirectional=True), torch.randn(T, B, I)
    kept_bytes = T * B * 2 * module.plan(x).saved_bytes
    for recompute, advice in [
        (False, f"keeps {kept_bytes / 2**20:,.0f} MiB .* in chunks of 16 steps"),
        (8, "recompute=4 "),
    ]:
        module.recompute = recompute
        with monkeypatch.context() as patch:
            if during == "forward":
                patch.setattr(recurrence, "input_gates_of", full)
                patch.setattr(chunks, "input_gates_of", full)
                with pytest.raises(torch.OutOfMemoryError, match=f"(?s)Tried to allocate 1 GiB.*{advice}"):
                    module(x)
            else:
                y, _ = module(x)
                patch.setattr(autograd, "gradients", full)
                patch.setattr(gradients, "gradients", full)
                with pytest.raises(torch.OutOfMemoryError, match=f"(?s)Tried to allocate 1 GiB.*{advice}"):
                    y.sum().backward()


def test_a_layer_keeps_its_input_once_and_its_weights_as_they_are():
    """The output of a layer is the input of the next: saved by both, in memory once."""
    module, x = LSTM(H, H, num_layers=3, batch_first=True), torch.randn(4, 50, H)
    count, _ = kept(lambda: module(x)[0])
    of_hx = 2 * 3 * 4 * H * 4
    assert x.untyped_storage().data_ptr() in count
    assert beside(count, [x, *module.parameters()]) == of_hx + 3 * 4 * 50 * (module.plan(x).saved_bytes + 4 * H)


@pytest.mark.parametrize("form", ["", "lengths", "reset"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_rows_first_copy_no_more_than_steps_first(options, form):
    T, B, I, H = 30, 3, 8, 8  # noqa: E741
    reset = torch.rand(T, B) < 0.1

    def copies(batch_first):
        module, x = LSTM(I, H, **options, batch_first=batch_first), torch.randn(B, T, I).requires_grad_()
        if not batch_first:
            x = x.detach().transpose(0, 1).contiguous().requires_grad_()
        keywords = {"lengths": {"lengths": [T, 7, 0]}, "reset": {"reset": reset.T if batch_first else reset}, "": {}}
        with torch.profiler.profile(record_shapes=True) as profile:
            y, _ = module(x, **keywords[form])
            torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
        found = (math.prod(event.input_shapes[0]) for event in profile.events() if event.name == "aten::copy_")
        # Of all steps: what is smaller is a state's, or a weight's.
        return sorted(size for size in found if size >= T * B * min(I, H))

    assert copies(True) == copies(False)


def test_a_third_of_what_nn_lstm_keeps():
    """Of every step nn.LSTM must keep at least the four gates and c, whatever else cuDNN has in its reserve."""
    T, B, H = 256, 2, 32
    module, x = LSTM(H, H, recompute=True).bfloat16(), torch.randn(T, B, H).bfloat16()
    count, _ = kept(lambda: module(x)[0])
    ours = sum(size for size in count.values()) - sum(p.nbytes for p in module.parameters())
    assert ours <= T * B * H * 2 * (1 + 1 + 5) / 3


# The length of a chunk


def test_a_chunk_fits_the_memory_at_hand():
    GIB = 2**30
    sizes = [(1, 64), (16, 512), (64, 1024), (1024, 2048), (2**14, 2**13)]
    assert [chunk_for(torch.bfloat16, *size, 80 * GIB) for size in sizes] == [1024, 256, 128, 64, 16]
    assert [chunk_for(torch.bfloat16, 256, 1024, memory * GIB) for memory in (1, 8, 80)] == [16, 64, 128]
    # The next longer one would take a sixteenth, beyond which none is, or a thousandth.
    for dtype, (rows, units) in product(DTYPES, sizes[1:-1]):
        chunk = chunk_for(dtype, rows, units, 80 * GIB)
        share = chunk * rows * units * (9 * dtype.itemsize + (8 if dtype == torch.float64 else 4)) / (80 * GIB)
        assert share <= 1 / 16 and 2 * share > (1 / 16 if chunk < 128 else 1 / 1000)


def test_the_plan_says_the_chunk_that_is_taken(monkeypatch):
    module, x = LSTM(I, H, recompute=True), torch.randn(70, 3, I)
    assert module.plan(x).chunk == 128  # of a CPU nothing is known
    step = 3 * H * (9 * 4 + 4)
    for memory, chunk in [(16 * 64 * step, 64), (16 * 64 * step - 1, 32), (0, 16)]:
        monkeypatch.setattr(route, "memory_of", lambda device, memory=memory: memory)
        route.known_route.cache_clear()
        count, (y, _) = kept(lambda: module(x))
        of_hx, states = 2 * 3 * H * 4, -(-70 // chunk) - 1
        assert module.plan(x).chunk == chunk
        assert beside(count, [x, y, *module.parameters()]) == of_hx * (1 + states)
    monkeypatch.setattr(route, "memory_of", lambda device: pytest.fail("asked in a graph"))
    ours = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)(x)[0]
    module.recompute = 128
    torch.testing.assert_close(ours, module(x)[0])


# The attribute


def test_the_keyword_is_an_attribute_of_any_module():
    module = LSTM(I, H, recompute=True)
    assert module.recompute is True and "recompute=True" in repr(module) and "recompute" not in repr(LSTM(I, H))
    assert copy.deepcopy(module).recompute is True and "recompute" not in str(module.state_dict().keys())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).recompute is True
    swapped = twin(LSTM(I, H))
    fused_lstm.swap(swapped)
    assert swapped.recompute is False
    swapped.recompute = 7
    fused_lstm.swap(swapped, back=True)
    fused_lstm.swap(swapped)
    assert swapped.recompute == 7 and swapped.plan(torch.randn(T, B, I)).chunk == 7


@pytest.mark.parametrize("recompute, error", [(-1, ValueError), (2.5, TypeError), (None, TypeError)])
def test_what_is_no_number_of_steps_is_refused(recompute, error):
    with pytest.raises(error, match="recompute must be"):
        LSTM(I, H, recompute=recompute)


def test_the_functional_form():
    module, x, hx = module_and_input({}, torch.float64, "cpu")
    results = []
    for recompute in (4, False):
        y, *_ = fused_lstm.lstm(x, hx, list(module.parameters()), recompute=recompute)
        results.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    torch.testing.assert_close(*results)


def test_dropout_and_weights_without_gradients():
    module, x = LSTM(I, H, 2, dropout=0.5), torch.randn(T, B, I)
    module.weight_hh_l0.requires_grad_(False)
    wanted = [p for p in module.parameters() if p.requires_grad]
    results = []
    for recompute in (4, False):
        module.recompute = recompute
        torch.manual_seed(1)
        results.append(torch.autograd.grad(module(x)[0].sum(), wanted))
    torch.testing.assert_close(*results)
