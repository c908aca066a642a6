"""torch.func on every level, and forward mode: against nn.LSTM called once for each sample, on the kernels' path and,
with `-p tests.without_triton`, on torch's."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from fused_lstm import LSTM, LSTMCell

T, B, I, H = 4, 3, 5, 6  # noqa: E741


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_an_ensemble_of_weights(cls):
    modules = [cls(I, H).double() for _ in range(3)]
    stacked, _ = stack_module_state(modules)
    x = torch.randn(*[T, B][: 2 if cls is LSTM else 1], I).double()

    def loss(parameters, x):
        first, second = functional_call(modules[0], parameters, (x,))
        return first.sin().sum() + (second[1] if cls is LSTM else second).square().sum()

    for call in (loss, grad(loss)):
        together = vmap(call, in_dims=(0, None))(stacked, x)
        alone = [call(dict(module.named_parameters()), x) for module in modules]
        for k in range(3):
            element = torch.utils._pytree.tree_map(lambda t, k=k: t[k], together)
            torch.testing.assert_close(element, alone[k])


@pytest.fixture
def both():
    """Ours and nn.LSTM with the same weights, in float64."""
    ours, theirs = LSTM(I, H).double(), nn.LSTM(I, H).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def loss(module, x, hx=None, parameters=None, **keywords):
    """A number that every output has a part in, of another weight."""
    parameters = dict(module.named_parameters()) if parameters is None else parameters
    y, (hn, cn) = functional_call(module, parameters, (x, hx), keywords)
    return y.sin().sum() + hn.square().sum() + 2 * cn.sum()


def detached(module):
    return {name: weight.detach() for name, weight in module.named_parameters()}


@pytest.mark.parametrize("wanted", ["samples", "hx", "weights", "stacked weights"])
def test_backward_through_vmap(wanted, both):
    """What wants a gradient does not say so within vmap."""
    ours, theirs = both
    x, hx = torch.randn(2, T, B, I).double(), torch.randn(2, 2, 1, B, H).double()
    weights = {name: torch.stack([w, 1.5 * w]) for name, w in detached(ours).items()}
    grads = []
    for module, mapped in ((ours, True), (theirs, False)):
        samples, states = (t.clone().requires_grad_(wanted == name) for t, name in ((x, "samples"), (hx, "hx")))
        stacked = {name: w.clone().requires_grad_(wanted == "stacked weights") for name, w in weights.items()}
        given = stacked if wanted == "stacked weights" else None
        module.requires_grad_(wanted == "weights")

        def of(k, module=module, samples=samples, states=states, given=given):
            own = None if given is None else {name: w[k] for name, w in given.items()}
            return loss(module, samples[k], tuple(states[k]), own)

        def one(x, h, own, module=module):
            return loss(module, x, (h[0], h[1]), own)

        if mapped:
            total = vmap(one, (0, 0, None if given is None else 0))(samples, states, given).sum()
        else:
            total = of(0) + of(1)
        leaves = {"samples": [samples], "hx": [states], "weights": list(module.parameters())}
        grads.append(torch.autograd.grad(total, leaves.get(wanted, list(stacked.values()))))
    torch.testing.assert_close(*grads)


LEVELS = {
    "grad of vmap": lambda f, xs: grad(lambda xs: vmap(f)(xs).sum())(xs),
    "vmap of grad": lambda f, xs: vmap(grad(f))(xs),
    "grad of grad": lambda f, xs: grad(lambda x: grad(f)(x).square().sum())(xs[0]),
    "vjp of grad": lambda f, xs: vjp(grad(f), xs[0])[1](xs[1])[0],
    "vmap of vmap": lambda f, xs: vmap(vmap(f))(xs[None]),
    "vmap of vjp": lambda f, xs: vmap(lambda x: vjp(f, x)[1](f(x))[0])(xs),
    "jvp": lambda f, xs: jvp(f, (xs[0],), (xs[1],)),
    "jvp of grad": lambda f, xs: jvp(grad(f), (xs[0],), (xs[1],)),
    "grad of jvp": lambda f, xs: grad(lambda x: jvp(f, (x,), (xs[1],))[1])(xs[0]),
    "vmap of jvp": lambda f, xs: vmap(lambda x: jvp(f, (x,), (xs[1],))[1])(xs),
    "jacrev": lambda f, xs: jacrev(f)(xs[0]),
    "jacfwd": lambda f, xs: jacfwd(f)(xs[0]),
    "hessian": lambda f, xs: hessian(f)(xs[0, :2, :1]),
    "hessian by jacrev": lambda f, xs: jacrev(jacrev(f))(xs[0, :2, :1]),
    "vmap of hessian": lambda f, xs: vmap(hessian(f))(xs[:, :2, :1]),
}


def composed(module, x, hx=None):
    """nn.LSTM of one layer, of operations that every transform has."""
    w_ih, w_hh, b_ih, b_hh = module.parameters()
    h = c = x.new_zeros(x.shape[1], H)
    y = []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        y.append(h)
    return torch.stack(y).sin().sum() + h.square().sum() + 2 * c.sum()


@pytest.mark.parametrize("levels", LEVELS)
def test_levels(levels, both):
    ours, theirs = both
    xs = torch.randn(2, T, B, I).double()
    results = [LEVELS[levels](lambda x, f=f, m=m: f(m, x), xs) for f, m in ((loss, ours), (composed, theirs))]
    torch.testing.assert_close(*results)


KEYWORDS = {
    "lengths": {"lengths": torch.tensor([2, 0, 4])},
    "reset": {"reset": torch.tensor([[False, True, False]] * T)},
    "reset to hx": {"reset": torch.tensor([[False, True, False]] * T), "reset_to": "hx"},
}


@pytest.mark.parametrize("form", KEYWORDS)
def test_levels_with_lengths_and_resets(form):
    """Against the gradients that a plain call gives, and their numerical derivatives."""
    module, xs = LSTM(2, 3).double(), torch.randn(2, T, 3, 2).double()

    def f(x):
        return loss(module, x, **KEYWORDS[form])

    def gradient(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    first = torch.stack([gradient(x) for x in xs])
    for levels in ("grad of vmap", "vmap of grad"):
        torch.testing.assert_close(LEVELS[levels](f, xs), first)
    second, eps = hessian(f)(xs[0]).flatten(0, 2), 1e-6
    steps = eps * torch.eye(xs[0].numel()).double().view(-1, *xs[0].shape)
    numerical = torch.stack([(gradient(xs[0] + step) - gradient(xs[0] - step)) / (2 * eps) for step in steps])
    torch.testing.assert_close(second, numerical, rtol=1e-5, atol=1e-7)
    along = LEVELS["jvp of grad"](f, xs)[1]
    torch.testing.assert_close(along, (second * xs[1]).sum((1, 2, 3)).view_as(along))


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "batch_first": True, "num_layers": 2}], ids=["", "all"]
)
def test_lengths_and_resets_of_each_sample(options):
    module = LSTM(I, H, **options).double()
    lead = (B, T) if options else (T, B)
    x, lengths = torch.randn(2, *lead, I).double(), torch.tensor([[2, 0, 4], [4, 1, 3]])
    reset = torch.arange(2 * T * B).view(2, *lead) % 3 == 1

    def of(x, lengths, reset):
        def f(x):
            y, (hn, cn) = module(x, lengths=lengths, reset=reset, reset_to="hx")
            return y.sin().sum() + hn.square().sum() + cn.sum()

        return grad(f)(x)

    torch.testing.assert_close(
        vmap(of)(x, lengths, reset), torch.stack([of(x[k], lengths[k], reset[k]) for k in (0, 1)])
    )


def test_forward_mode_of_a_cell():
    ours, x = LSTMCell(I, H).double(), torch.randn(B, I).double()
    theirs = nn.LSTMCell(I, H).double()
    theirs.load_state_dict(ours.state_dict())
    results = []
    for cell in (ours, theirs):
        with forward_ad.dual_level():
            results.append([forward_ad.unpack_dual(t).tangent for t in cell(forward_ad.make_dual(x, x.sin()))])
    torch.testing.assert_close(*results)


def test_packed_rows_under_a_transform():
    """nn.LSTM refuses them there."""
    module, lengths = LSTM(I, H, bidirectional=True).double(), torch.tensor([4, 2, 1])
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I).double(), lengths)

    def f(data):
        y, (hn, cn) = module(packed._replace(data=data))
        return y.data.sin().sum() + hn.sum() + cn.sum()

    leaf = packed.data.clone().requires_grad_()
    torch.testing.assert_close(grad(f)(packed.data), torch.autograd.grad(f(leaf), leaf)[0])
