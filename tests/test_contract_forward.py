"""nn.LSTM's forward: what it refuses, the forms of its inputs and outputs, dropout, PackedSequence."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from fused_lstm import LSTM

from .parity import assert_close, assert_parity, twin
from .test_contract_construct import assert_same_error, configs, raised

T, B = 4, 3


def states(lstm: nn.Module, *batch: int) -> tuple[Tensor, Tensor]:
    rows, dtype = len(lstm.all_weights), lstm.weight_hh_l0.dtype
    h0 = torch.randn(rows, *batch, lstm.proj_size or lstm.hidden_size, dtype=dtype)
    return h0, torch.randn(rows, *batch, lstm.hidden_size, dtype=dtype)


# What it refuses


def zeros(*sizes: int, **kwargs) -> Tensor:
    return torch.zeros(sizes, **kwargs)


def both(*sizes: int) -> tuple[Tensor, Tensor]:
    return zeros(*sizes), zeros(*sizes)


BATCHED = "For batched 3-D input, hx and cx should also be 3-D but got ({}-D, {}-D) tensors"
UNBATCHED = "For unbatched 2-D input, hx and cx should also be 2-D but got ({}-D, {}-D) tensors"
DTYPE = (
    "RNN input dtype ({0}) does not match weight dtype (torch.float32). "
    "Convert input: input.to(torch.float32), or convert model: model.to({0})"
)
DEVICE = "Input and {0} tensors are not at the same device, found input tensor at {1} and {0} tensor at {2}"
LENGTH = "Expected sequence length to be larger than 0 in RNN"
FEATURES = "input.size(-1) must be equal to input_size. Expected 4, got 6"
# Each: the forward arguments of an LSTM(4, 8, num_layers=2), the error and its text. T = 5, B = 3.
REFUSED = {
    "0-D": ((zeros(),), ValueError, "LSTM: Expected input to be 2D or 3D, got 0D instead"),
    "1-D": ((zeros(4),), ValueError, "LSTM: Expected input to be 2D or 3D, got 1D instead"),
    "4-D": ((zeros(1, 5, 3, 4),), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D instead"),
    "features": ((zeros(5, 3, 6),), RuntimeError, FEATURES),
    "features, unbatched": ((zeros(5, 6),), RuntimeError, FEATURES),
    "features before hx": ((zeros(5, 3, 6), both(2, 4, 8)), RuntimeError, FEATURES),
    "float64": ((zeros(5, 3, 4, dtype=torch.float64),), ValueError, DTYPE.format("torch.float64")),
    "int64": ((zeros(5, 3, 4, dtype=torch.int64),), ValueError, DTYPE.format("torch.int64")),
    "dtype before features": ((zeros(5, 3, 6, dtype=torch.float16),), ValueError, DTYPE.format("torch.float16")),
    "h rows": ((zeros(5, 3, 4), both(2, 4, 8)), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [2, 4, 8]"),
    "h layers": ((zeros(5, 3, 4), both(1, 3, 8)), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [1, 3, 8]"),
    "h units": ((zeros(5, 3, 4), both(2, 3, 7)), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [2, 3, 7]"),
    "c rows": (
        (zeros(5, 3, 4), (zeros(2, 3, 8), zeros(2, 4, 8))),
        RuntimeError,
        "Expected hidden[1] size (2, 3, 8), got [2, 4, 8]",
    ),
    "h, unbatched": ((zeros(5, 4), both(1, 8)), RuntimeError, "Expected hidden[0] size (2, 1, 8), got [1, 1, 8]"),
    "2-D hx": ((zeros(5, 3, 4), both(2, 8)), RuntimeError, BATCHED.format(2, 2)),
    "2-D c": ((zeros(5, 3, 4), (zeros(2, 3, 8), zeros(2, 8))), RuntimeError, BATCHED.format(3, 2)),
    "3-D hx, unbatched": ((zeros(5, 4), both(2, 3, 8)), RuntimeError, UNBATCHED.format(3, 3)),
    "3-D c, unbatched": ((zeros(5, 4), (zeros(2, 8), zeros(2, 1, 8))), RuntimeError, UNBATCHED.format(2, 3)),
    "hx of 3": ((zeros(5, 3, 4), [zeros(2, 3, 8)] * 3), RuntimeError, "lstm expects two hidden states"),
    "hx of 1": ((zeros(5, 3, 4), (zeros(2, 3, 8),)), IndexError, "tuple index out of range"),
    "hx of 1, unbatched": ((zeros(5, 4), [zeros(2, 8)]), IndexError, "list index out of range"),
    "T = 0": ((zeros(0, 3, 4),), RuntimeError, LENGTH),
    "T = 0, with hx": ((zeros(0, 3, 4), both(2, 3, 8)), RuntimeError, LENGTH),
    "T = 0, unbatched": ((zeros(0, 4),), RuntimeError, LENGTH),
    "T = B = 0": ((zeros(0, 0, 4),), RuntimeError, LENGTH),
    "x elsewhere": ((zeros(5, 3, 4, device="meta"),), RuntimeError, DEVICE.format("parameter", "meta", "cpu")),
    "x elsewhere, with hx": (
        (zeros(5, 3, 4, device="meta"), both(2, 3, 8)),
        RuntimeError,
        DEVICE.format("hidden", "meta", "cpu"),
    ),
    "h elsewhere": (
        (zeros(5, 3, 4), (zeros(2, 3, 8, device="meta"), zeros(2, 3, 8))),
        RuntimeError,
        DEVICE.format("hidden", "cpu", "meta"),
    ),
    "c elsewhere": (
        (zeros(5, 3, 4), (zeros(2, 3, 8), zeros(2, 3, 8, device="meta"))),
        RuntimeError,
        DEVICE.format("hidden", "cpu", "meta"),
    ),
}


@pytest.mark.parametrize(("given", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_forward_refuses(given, kind, text):
    assert_same_error(lambda cls: cls(4, 8, 2)(*given), kind, text)


def test_weights_elsewhere_are_refused():
    text = DEVICE.format("parameter", "cpu", "meta")
    assert_same_error(lambda cls: cls(4, 8, device="meta")(zeros(5, 3, 4)), RuntimeError, text)


def test_hx_of_one_stacked_tensor_is_a_type_error():
    hx = zeros(2, 1, 3, 8)
    for cls, text in ((nn.LSTM, "combination of arguments"), (LSTM, r"tuple of two Tensors, \(h0, c0\), got one")):
        with pytest.raises(TypeError, match=text):
            cls(4, 8)(zeros(5, 3, 4), hx)


def test_the_device_of_hx_is_checked_before_that_of_the_weights():
    hx = zeros(1, 3, 8, device="meta"), zeros(1, 3, 8, device="meta")
    text = DEVICE.format("hidden", "cpu", "meta")
    assert_same_error(lambda cls: cls(4, 8, device="meta")(zeros(5, 3, 4), hx), RuntimeError, text)


def test_projected_h_has_proj_size_features():
    text = "Expected hidden[0] size (1, 3, 2), got [1, 3, 8]"
    assert_same_error(lambda cls: cls(4, 8, proj_size=2)(zeros(5, 3, 4), both(1, 3, 8)), RuntimeError, text)


def test_batch_first_does_not_apply_to_hx():
    text = "Expected hidden[0] size (2, 3, 8), got [3, 2, 8]"
    assert_same_error(lambda cls: cls(4, 8, 2, batch_first=True)(zeros(3, 5, 4), both(3, 2, 8)), RuntimeError, text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_lifts_the_dtype_check(dtype):
    lstm, x = LSTM(4, 5), torch.randn(T, B, 4).to(dtype)
    theirs = twin(lstm)
    # On some processors oneDNN has no bfloat16: nn.LSTM raises there, and without oneDNN it leaves float32 as it is.
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.backends.mkldnn.flags(enabled=supported):
        with torch.autocast("cpu", torch.bfloat16):
            y, (hn, cn) = lstm(x)
            y_, (hn_, cn_) = theirs(x)
        if not supported and lstm.plan(x).mode != "torch":
            y_, (hn_, cn_) = twin(lstm).bfloat16()(x.bfloat16())
    gold, (hn_gold, cn_gold) = theirs.double()(x.double())
    for name, ours, nn_lstm, exact in [("y", y, y_, gold), ("hn", hn, hn_, hn_gold), ("cn", cn, cn_, cn_gold)]:
        assert_close(name, ours, nn_lstm, exact.detach(), nn_lstm.dtype)


# Forms of input and output


@configs
def test_hx_defaults_to_zeros(config):
    lstm, x = LSTM(4, 5, **config), torch.randn(T, B, 4)
    hx = tuple(torch.zeros_like(s) for s in states(lstm, B))
    without, given = assert_parity(lstm, x), assert_parity(lstm, x, hx)
    assert all(torch.equal(without[name], given[name]) for name in ("y", "hn", "cn"))


@pytest.mark.parametrize("with_hx", [False, True], ids=["no hx", "hx"])
@configs
def test_no_rows(config, with_hx):
    lstm = LSTM(4, 5, **config)
    results = assert_parity(lstm, torch.randn(T, 0, 4), states(lstm, 0) if with_hx else None)
    assert results["y"].shape[:2] == (T, 0)
    assert all(results[f"d{name}"].count_nonzero() == 0 for name, _ in lstm.named_parameters())


@configs
def test_one_step_of_one_row(config):
    lstm = LSTM(4, 5, **config)
    assert_parity(lstm, torch.randn(1, 1, 4), states(lstm, 1))


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
@configs
def test_unbatched(config, batch_first):
    lstm = LSTM(4, 5, batch_first=batch_first, **config)
    x, hx = torch.randn(T, 4), states(lstm)
    results = assert_parity(lstm, x, hx)
    D, rows = 1 + lstm.bidirectional, len(lstm.all_weights)
    assert results["y"].shape == (T, D * (lstm.proj_size or 5))
    assert results["hn"].shape == (rows, lstm.proj_size or 5)
    assert results["cn"].shape == (rows, 5)
    assert_parity(lstm, x)


@configs
def test_batch_first(config):
    lstm = LSTM(4, 5, batch_first=True, **config)
    hx = states(lstm, B)
    results = assert_parity(lstm, torch.randn(B, T, 4), hx)
    assert results["y"].shape[:2] == (B, T)
    assert results["hn"].shape == hx[0].shape and results["cn"].shape == hx[1].shape


def test_final_states_are_layer_major():
    lstm = LSTM(4, 5, 2, bidirectional=True)
    first = nn.LSTM(4, 5, bidirectional=True)
    first.load_state_dict({name: p for name, p in lstm.state_dict().items() if "_l0" in name})
    x, (h0, c0) = torch.randn(T, B, 4), states(lstm, B)
    _, ours = lstm(x, (h0, c0))
    _, theirs = first(x, (h0[:2], c0[:2]))
    _, gold = first.double()(x.double(), (h0[:2].double(), c0[:2].double()))
    for name, a, b, exact in zip(("hn", "cn"), ours, theirs, gold, strict=True):
        assert_close(name, a[:2], b, exact.detach(), torch.float32)


@configs
def test_final_states_are_those_of_the_last_layer_s_output(config):
    lstm = LSTM(4, 5, **config)
    y, (hn, _) = lstm(torch.randn(T, B, 4))
    D = 1 + lstm.bidirectional
    directions = y.unflatten(2, (D, -1))
    assert torch.equal(hn[-D], directions[-1, :, 0])
    if D == 2:
        assert torch.equal(hn[-1], directions[0, :, 1])


SEQUENCES = [torch.randn(length, 4, generator=torch.Generator().manual_seed(3)) for length in (2, 4, 1)]
FORMS = {
    "batched": ({}, torch.randn(T, B, 4)),
    "T = 1": ({}, torch.randn(1, B, 4)),
    "B = 1": ({}, torch.randn(T, 1, 4)),
    "batch_first": ({"batch_first": True}, torch.randn(B, T, 4)),
    "unbatched": ({}, torch.randn(T, 4)),
    "packed": ({}, pack_sequence(SEQUENCES, enforce_sorted=False)),
}


@pytest.mark.parametrize(("form", "x"), FORMS.values(), ids=FORMS)
@configs
def test_final_states_are_contiguous_and_share_no_memory(config, form, x):
    lstm = LSTM(4, 5, **config, **form)
    y, (hn, cn) = lstm(x)
    storages = {t.untyped_storage().data_ptr() for t in (y.data, hn, cn)}
    assert hn.is_contiguous() and cn.is_contiguous()
    assert len(storages) == 3


def test_final_states_do_not_share_memory_with_the_initial_ones():
    lstm = LSTM(4, 5)
    hx = states(lstm, B)
    _, state = lstm(torch.randn(1, B, 4), hx)
    assert not {t.untyped_storage().data_ptr() for t in hx} & {t.untyped_storage().data_ptr() for t in state}


STRIDED = {
    "transposed": lambda: torch.randn(B, T, 4).transpose(0, 1),
    "sliced time": lambda: torch.randn(2 * T, B, 4)[::2],
    "sliced features": lambda: torch.randn(T, B, 8)[..., ::2],
    "offset": lambda: torch.randn(T + 1, B + 1, 5)[1:, 1:, 1:],
    "expanded time": lambda: torch.randn(1, B, 4).expand(T, B, 4),
    "expanded rows": lambda: torch.randn(T, 1, 4).expand(T, B, 4),
    "expanded features": lambda: torch.randn(T, B, 1).expand(T, B, 4),
}


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
def test_input_of_any_strides(strided, batch_first):
    x = strided()
    assert_parity(LSTM(4, 5, batch_first=batch_first), x.transpose(0, 1) if batch_first else x)


STRIDED_STATES = {
    "expanded": lambda h, c: (h[:, :1].expand_as(h), c[:1].expand_as(c)),
    "transposed": lambda h, c: tuple(s.transpose(0, 1).contiguous().transpose(0, 1) for s in (h, c)),
    "sliced": lambda h, c: tuple(s.repeat_interleave(2, 2)[..., ::2] for s in (h, c)),
    "one for both": lambda h, c: (h, h),
}


@pytest.mark.parametrize("strided", STRIDED_STATES.values(), ids=STRIDED_STATES)
def test_hx_of_any_strides(strided):
    lstm = LSTM(4, 5, bidirectional=True)
    assert_parity(lstm, torch.randn(T, B, 4), strided(*states(lstm, B)))


@pytest.mark.parametrize(("form", "x"), FORMS.values(), ids=FORMS)
def test_return_types(form, x):
    result = LSTM(4, 5, **form)(x)
    assert type(result) is tuple and len(result) == 2
    y, state = result
    assert type(y) is (PackedSequence if isinstance(x, PackedSequence) else Tensor)
    assert type(state) is tuple and [type(s) for s in state] == [Tensor, Tensor]


@pytest.mark.parametrize("batch", [(), (B,)], ids=["unbatched", "batched"])
def test_hx_may_be_a_list(batch):
    lstm = LSTM(4, 5)
    x, hx = torch.randn(T, *batch, 4), states(lstm, *batch)
    y, state = lstm(x, list(hx))
    y_, state_ = lstm(x, hx)
    assert type(state) is tuple
    assert all(torch.equal(a, b) for a, b in zip((y, *state), (y_, *state_), strict=True))


# Dropout


def sees_its_input(lstm: nn.Module, scale: float = 1e-4) -> nn.Module:
    """Makes layer 1 pass on its input: with i = o = 1, f = 0 and a small g, h = tanh(tanh(scale x)) = scale x."""
    H = lstm.hidden_size
    with torch.no_grad():
        for name in ("weight_ih_l1", "weight_hh_l1", "bias_ih_l1", "bias_hh_l1"):
            getattr(lstm, name).zero_()
        lstm.weight_ih_l1[2 * H : 3 * H] = scale * torch.eye(H)
        lstm.bias_ih_l1[:] = torch.tensor([30.0, -30.0, 0.0, 30.0]).repeat_interleave(H)
    return lstm


def test_dropout_zeroes_or_scales_the_elements_between_layers():
    lstm = sees_its_input(LSTM(4, 8, 2, dropout=0.25, dtype=torch.float64))
    x = torch.randn(5, B, 4, dtype=torch.float64)
    y, (hn, _) = lstm(x)
    kept, (kept_hn, _) = lstm.eval()(x)
    ratio = y / kept
    dropped = ratio.abs() < 1e-4
    assert torch.all(dropped | ((ratio - 1 / 0.75).abs() < 1e-4))
    # 120 elements: each bound lies five standard deviations from the mean.
    assert 6 <= dropped.sum() <= 54
    # Drawn anew for each step, batch row and unit.
    assert all((dropped != dropped.narrow(dim, 0, 1)).any() for dim in range(3))
    # The states of the layer below are taken before dropout.
    assert torch.equal(hn[0], kept_hn[0])


def test_dropout_never_touches_the_last_layer():
    lstm = LSTM(4, 8, 2, dropout=0.9, bidirectional=True)
    y, (hn, cn) = lstm(torch.randn(5, B, 4))
    assert all(t.count_nonzero() == t.numel() for t in (y, hn, cn))


@pytest.mark.filterwarnings("ignore:dropout option")
def test_dropout_does_nothing_to_one_layer():
    assert_parity(LSTM(4, 5, dropout=0.9), torch.randn(T, B, 4))


def test_dropout_is_off_in_eval():
    assert_parity(LSTM(4, 5, 2, dropout=0.9, bidirectional=True).eval(), torch.randn(T, B, 4))


def test_manual_seed_repeats_dropout():
    lstm, x = LSTM(4, 5, 2, dropout=0.5), torch.randn(T, B, 4)

    def run(seed):
        torch.manual_seed(seed)
        return lstm(x)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_dropout_backward_uses_the_same_mask():
    lstm = LSTM(2, 3, 2, dropout=0.5, dtype=torch.float64)

    def run(x):
        torch.manual_seed(1)
        y, (hn, cn) = lstm(x)
        return y, hn, cn

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x, fast_mode=True)


def test_dropout_of_packed_input():
    lstm = sees_its_input(LSTM(4, 8, 2, dropout=0.25, dtype=torch.float64))
    x = pack_sequence(SEQUENCES, enforce_sorted=False).double()
    y, kept = lstm(x)[0].data, lstm.eval()(x)[0].data
    ratio = y / kept
    dropped = ratio.abs() < 1e-4
    assert torch.all(dropped | ((ratio - 1 / 0.75).abs() < 1e-4))
    assert 0 < dropped.sum() < dropped.numel() / 2


# PackedSequence

LENGTHS = {"sorted": (4, 2, 1), "unsorted": (2, 4, 1), "equal": (3, 3), "one": (2,), "one step": (1, 1, 1)}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
PACKINGS = {
    "sorted": lambda: pack_sequence(sorted(SEQUENCES, key=len, reverse=True)),
    "unsorted": lambda: pack_sequence(SEQUENCES, enforce_sorted=False),
    "padded": lambda: pack_padded_sequence(torch.randn(T, B, 4), torch.tensor([1, 4, 3]), enforce_sorted=False),
}
packings = pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)


@packings
@configs
def test_packed(pack, config):
    lstm = LSTM(4, 5, **config)
    assert_parity(lstm, pack(), states(lstm, B))


@packings
def test_packed_without_hx(pack):
    assert_parity(LSTM(4, 5, 2, bidirectional=True), pack())


@packings
def test_packed_output_reuses_the_packing(pack):
    x = pack()
    y, _ = LSTM(4, 5)(x)
    assert y.batch_sizes is x.batch_sizes
    assert y.sorted_indices is x.sorted_indices and y.unsorted_indices is x.unsorted_indices


@lengths
@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "bidirectional"])
def test_packed_equals_each_sequence_alone(lengths, config):
    # hx and the final states are in the user's order, whatever the order inside the packing.
    lstm = LSTM(4, 5, **config)
    sequences, (h0, c0) = [torch.randn(n, 4) for n in lengths], states(lstm, len(lengths))
    y, (hn, cn) = lstm(pack_sequence(sequences, enforce_sorted=False), (h0, c0))
    y, _ = pad_packed_sequence(y, padding_value=-7.0)
    theirs, gold = twin(lstm), twin(lstm, torch.float64)
    for b, sequence in enumerate(sequences):
        n, hx = len(sequence), (h0[:, b], c0[:, b])
        y_, state = theirs(sequence, hx)
        y_gold, gold_state = gold(sequence.double(), tuple(s.double() for s in hx))
        assert_close("y", y[:n, b], y_, y_gold.detach(), torch.float32)
        assert (y[n:, b] == -7).all()
        for name, a, s, exact in zip(("hn", "cn"), (hn[:, b], cn[:, b]), state, gold_state, strict=True):
            assert_close(name, a, s, exact.detach(), torch.float32)


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_output_pads(batch_first):
    lstm = LSTM(4, 5)
    y, _ = lstm(pack_sequence(SEQUENCES, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(y, batch_first=batch_first, padding_value=-7.0, total_length=6)
    assert lengths.tolist() == [2, 4, 1]
    rows = padded if batch_first else padded.transpose(0, 1)
    assert rows.shape == (3, 6, 5)
    for row, length in zip(rows, lengths, strict=True):
        assert (row[length:] == -7).all() and (row[:length] != -7).all()


def test_packed_ignores_batch_first():
    lstm, x = LSTM(4, 5, 2, batch_first=True, bidirectional=True), pack_sequence(SEQUENCES, enforce_sorted=False)
    hx = states(lstm, B)
    ours = assert_parity(lstm, x, hx)
    lstm.batch_first = False
    gold = assert_parity(lstm, x, hx)
    assert all(torch.equal(ours[name], gold[name]) for name in ("y", "hn", "cn"))


FITS = (4, torch.float32)
# Each: the features and dtype of the packed input of three rows, hx, the error and its text.
PACKED_REFUSED = {
    "features": ((6, torch.float32), None, RuntimeError, FEATURES),
    "dtype": ((4, torch.float64), None, ValueError, DTYPE.format("torch.float64")),
    "too few rows": (FITS, both(2, 2, 8), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [2, 2, 8]"),
    "too many rows": (FITS, both(2, 4, 8), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [2, 4, 8]"),
    "h units": (FITS, both(2, 3, 7), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [2, 3, 7]"),
    "h layers": (FITS, both(1, 3, 8), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [1, 3, 8]"),
    "c rows": (
        FITS,
        (zeros(2, 3, 8), zeros(2, 4, 8)),
        RuntimeError,
        "Expected hidden[1] size (2, 3, 8), got [2, 4, 8]",
    ),
    "c units": (
        FITS,
        (zeros(2, 3, 8), zeros(2, 3, 7)),
        RuntimeError,
        "Expected hidden[1] size (2, 3, 8), got [2, 3, 7]",
    ),
    "2-D hx": (FITS, both(2, 8), RuntimeError, "Expected hidden[0] size (2, 3, 8), got [2, 8]"),
    "hx of 3": (FITS, [zeros(2, 3, 8)] * 3, RuntimeError, "lstm expects two hidden states"),
    "hx of 1": (FITS, [zeros(2, 3, 8)], RuntimeError, "lstm expects two hidden states"),
}


@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize(("given", "hx", "kind", "text"), PACKED_REFUSED.values(), ids=PACKED_REFUSED)
def test_packed_refuses_with_the_clear_texts(given, hx, kind, text, enforce_sorted):
    # Not nn.LSTM's: it checks nothing of packed input, takes some of these and fails deep inside at the others.
    features, dtype = given
    rows = [zeros(n, features, dtype=dtype) for n in (4, 2, 1)]
    x = pack_sequence(rows, enforce_sorted=enforce_sorted)
    assert raised(lambda: LSTM(4, 8, 2)(x, hx)) == (kind, text)
