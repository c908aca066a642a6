"""Cells: the equations of those that come along, what a cell's function may do, and how it is printed in Triton."""

import copy
import linecache
import math
import pickle
import re
from itertools import chain, combinations, count, product

import pytest
import torch
from torch import nn
from torch.nn import functional

from fused_lstm import Cell, Recurrent, cell, cells
from fused_lstm.cells.definition import by_key
from fused_lstm.cells.graph import COSTS, OF_BOOL, SAVED, Node

from .parity import assert_close

LIBRARY = {name: made for name in cells.__all__ if isinstance(made := getattr(cells, name), Cell)}
N = 32  # numbers in a row


# Cells of the tests alone


@cell(gates="ab", state="c n")
def two_states(x, r, s, p):
    a = torch.sigmoid(x.a + r.a)
    c = a * s.c + (1 - a) * torch.tanh(x.b + r.b * s.n)
    n = torch.exp(-a) * s.n + 0.3 * s.h
    return torch.tanh(c) - n, c, n


@cell(gates="a", params="w v")
def vectors(x, r, s, p):
    return p.w * s.h + torch.tanh(x.a + r.a * p.v)


def absolute(x):
    return x.abs() + 0.1


# By group of operations a function of two numbers.
GROUPS = {
    "arithmetic": lambda x, y: torch.add(x, y, alpha=0.3) / torch.sub(x, y, alpha=-3.1) - 1 / -y + (2 - x).square(),
    "exponentials": lambda x, y: torch.exp(x) + torch.exp2(y) - torch.expm1(x * y) * torch.sigmoid(x),
    "logarithms": lambda x, y: torch.log(absolute(x)) + torch.log2(absolute(y)) * torch.log1p(x * x),
    "of sigmoids": lambda x, y: functional.logsigmoid(x - y) + torch.tanh(y) * torch.rsub(x, torch.sigmoid(y), alpha=3),
    "roots": lambda x, y: torch.sqrt(absolute(x)) + torch.rsqrt(absolute(y)) + absolute(x) ** 0.5 * absolute(y) ** -1.7,
    "powers": lambda x, y: x**3 - y**-2 + x**0 + torch.reciprocal(x),
    "comparisons": lambda x, y: ((x > 0.25) & (y >= 0.75) | ~(x <= y)) * x + (y < 0.25).to(x.dtype) * y,
    "logic": lambda x, y: torch.logical_or(torch.logical_not(y == x), torch.logical_and(x != 0.75, y > -0.25)) * x,
    "selection": lambda x, y: torch.where(x > y, x * y, 0.5) + y.masked_fill(x < 0.25, 0.75),
    "bounds": lambda x, y: torch.clamp(x, -0.25, 0.75) + torch.clamp(y, min=0.25) + torch.clamp(x, max=y),
    "extremes": lambda x, y: torch.maximum(x, y) * torch.minimum(x, -y) + torch.relu(x) + abs(y) * torch.sign(x - y),
    "waves": lambda x, y: torch.sin(x) * torch.cos(y) + torch.erf(x - y),
}


def of_two(function):
    """A cell of a function of two numbers."""
    return cell(gates="a", state="c")(lambda x, r, s, p: (function(x.a, r.a) * s.h, torch.tanh(x.a - r.a * s.c)))


OWN = {"two states": two_states, "vectors": vectors} | {name: of_two(function) for name, function in GROUPS.items()}
PRINTED = LIBRARY | OWN


# The equations


def sigmoid(a):
    return 1 / (1 + math.exp(-a))


def greff(variant, a, s, p):
    """Greff et al. 2017, section II and III, of one unit; a: what reaches each gate, but for the peepholes."""

    def gate(name, c, missing):
        return 1.0 if variant == missing else sigmoid(a[name] + (0 if variant == "NP" else p["p" + name] * c))

    f = gate("f", s["c"], "NFG")
    i = 1 - f if variant == "CIFG" else gate("i", s["c"], "NIG")
    z = a["g"] if variant == "NIAF" else math.tanh(a["g"])
    c = z * i + s["c"] * f
    o = gate("o", c, "NOG")
    y = (c if variant == "NOAF" else math.tanh(c)) * o
    return {"h": y, "c": c} | ({"i": i, "f": f, "o": o} if variant == "FGR" else {})


def beck(a, s, p):
    """Beck et al. 2024, eq. 8 to 17, with the stabilised gates; a first step has m = i."""
    log_f = math.log(sigmoid(a["f"]))
    m = a["i"] if s["n"] == 0 else max(log_f + s["m"], a["i"])
    i, f = math.exp(a["i"] - m), math.exp(log_f + s["m"] - m)
    c, n = f * s["c"] + i * math.tanh(a["g"]), max(f * s["n"] + i, 1.0)
    return {"h": sigmoid(a["o"]) * c / n, "c": c, "n": n, "m": m}


def units(of):
    """Random numbers for N units of a cell; and for each unit what reaches the gates, the states, and the vectors."""
    kinds = zip("xrsp", (of.X, of.R, of.S, of.P), strict=True)
    given = {kind: cls(*torch.randn(len(cls._fields), N, dtype=torch.float64)) for kind, cls in kinds}
    if of is cells.slstm:
        given["s"] = given["s"]._replace(n=torch.relu(given["s"].n) * 2)  # of about half the units a first step
    columns = {kind: {name: row.tolist() for name, row in v._asdict().items()} for kind, v in given.items()}
    each = [{kind: {name: row[k] for name, row in v.items()} for kind, v in columns.items()} for k in range(N)]
    return given, [({gate: one["x"][gate] + one["r"][gate] for gate in of.gates}, one["s"], one["p"]) for one in each]


def assert_equations(of, equations):
    given, each = units(of)
    found, expected = of.on_flat(*chain(*given.values())), [equations(*unit) for unit in each]
    assert set(expected[0]) == set(of.S._fields)
    for name, state in zip(of.S._fields, found, strict=True):
        gold = torch.tensor([one[name] for one in expected], dtype=torch.float64)
        assert_close(name, state, None, gold, torch.float64)


@pytest.mark.parametrize("variant", cells.GREFF)
def test_the_variants_of_greff(variant):
    assert_equations(cells.GREFF[variant], lambda *unit: greff(variant, *unit))


def test_the_slstm_of_beck():
    assert_equations(cells.slstm, beck)


def test_names_and_order_of_what_the_cells_have():
    """The order of the gates is that of the rows of the weights, which state_dicts have."""
    assert list(cells.GREFF) == ["V", "NIG", "NFG", "NOG", "NIAF", "NOAF", "NP", "CIFG", "FGR"]
    names = {name: "/".join(map(" ".join, (of.gates, of.states, of.params))) for name, of in LIBRARY.items()}
    assert names == dict.fromkeys(("vanilla", "niaf", "noaf"), "i f g o/c/pi pf po") | {
        **{"nig": "f g o/c/pf po", "cifg": "f g o/c/pf po", "nfg": "i g o/c/pi po", "nog": "i f g/c/pi pf"},
        **{"lstm": "i f g o/c/", "fgr": "i f g o/c i f o/pi pf po", "slstm": "i f g o/c n m/"},
        **{"gru": "r z n//", "rnn_tanh": "a//"},
    }
    assert [name for name, of in LIBRARY.items() if of.feedback] == ["fgr"] and cells.fgr.feedback == ("i", "f", "o")


@pytest.mark.parametrize("name, cls", [("gru", nn.GRUCell), ("rnn_tanh", nn.RNNCell), ("lstm", nn.LSTMCell)])
def test_the_cells_of_torch(name, cls):
    of, theirs, x = LIBRARY[name], cls(3, 5).double(), torch.randn(N, 3).double()
    s = of.S(*torch.randn(len(of.S._fields), N, 5).double())
    x_parts = functional.linear(x, theirs.weight_ih, theirs.bias_ih).chunk(len(of.gates), -1)
    r_parts = functional.linear(s.h, theirs.weight_hh, theirs.bias_hh).chunk(len(of.gates), -1)
    found, expected = of(of.X(*x_parts), of.R(*r_parts), s), theirs(x, tuple(s) if len(s) > 1 else s.h)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# A cell as an object


def test_a_cell_is_called_as_its_function_and_says_what_it_has():
    given, _ = units(vectors)
    assert torch.equal(vectors(*given.values()), vectors.function(*given.values()))
    assert torch.equal(cells.rnn_tanh(given["x"], given["r"], given["s"]), torch.tanh(given["x"].a + given["r"].a))
    assert vectors.__name__ == "vectors" and cells.gru.__doc__.startswith("torch.nn.GRU's cell")
    assert repr(cells.gru) == "<cell gru(gates='r z n')>" and repr(vectors) == "<cell vectors(gates='a', params='w v')>"
    assert repr(cells.fgr) == "<cell fgr(gates='i f g o', state='c i f o', params='pi pf po', feedback='i f o')>"


@pytest.mark.parametrize("of", [cells.gru, two_states], ids=["of the library", "of a test"])
def test_copies_are_the_cell(of):
    assert copy.copy(of) is of and copy.deepcopy({"a": [of]})["a"][0] is of
    assert pickle.loads(pickle.dumps(of)) is of and by_key(of.key) is of


def test_cells_of_one_name_have_keys_of_their_own():
    made = [cell(gates="a")(lambda x, r, s, p, k=k: k * torch.tanh(x.a + r.a)) for k in range(3)]
    assert len({of.key for of in made}) == 3 and [by_key(of.key) for of in made] == made
    with pytest.raises(KeyError, match="unknown is not known here: import the module that has it"):
        by_key("unknown")


NAMES = {
    "a gate that is no name": ({"gates": "a 1"}, "gates must be different names, got '1' in 'a 1'"),
    "a gate twice": ({"gates": "ifi"}, "gates must be different names, got 'i' in 'i f i'"),
    "no gate": ({"gates": ""}, "at least one gate"),
    "a state twice": ({"gates": "a", "state": "c d c"}, "state must be different names, got 'c' in 'c d c'"),
    "h as a state": ({"gates": "a", "state": "c h"}, "every cell has the state h"),
    "a vector of a layer's name": ({"gates": "a", "params": "w bias_hh"}, "cannot be called bias_hh: a layer has that"),
    "feedback that is no state": ({"gates": "ab", "state": "b", "feedback": "ab"}, "names, got a$"),
    "feedback that is no gate": ({"gates": "a", "state": "a b", "feedback": "ab"}, "names, got b$"),
}


@pytest.mark.parametrize(("named", "text"), NAMES.values(), ids=NAMES)
def test_names_that_are_refused(named, text):
    with pytest.raises(ValueError, match=text):
        cell(**named)


# What a function may do

OUTSIDE = torch.ones(3)
REFUSED = [
    (lambda x, r, s, p: x.a.sum() + r.a, "sum is not element-wise"),
    (lambda x, r, s, p: x.a - x.a.mean(-1, keepdim=True), "mean is not element-wise"),
    (lambda x, r, s, p: torch.softmax(x.a, -1), "_softmax is not element-wise"),
    (lambda x, r, s, p: torch.matmul(x.a, r.a), "mm is not element-wise"),
    (lambda x, r, s, p: x.a[0] + r.a, "select is not element-wise"),
    (lambda x, r, s, p: torch.cat([x.a, r.a]), "cat is not element-wise"),
    (lambda x, r, s, p: x.a.add_(1), "add_ writes into a tensor"),
    (lambda x, r, s, p: torch.tanh(x.a, out=r.a), "tanh writes into a tensor"),
    (lambda x, r, s, p: x.a if x.a > 0 else r.a, "looks at a tensor's values; torch.where chooses"),
    (lambda x, r, s, p: x.a if torch.equal(x.a, r.a) else r.a, "equal looks at a tensor's values"),
    (lambda x, r, s, p: x.a * torch.from_numpy(x.a.numpy()), "looks at a tensor's values.*numpy"),
    (lambda x, r, s, p: x.a * x.a.tolist()[0][0], "_to_copy looks at a tensor's values"),
    (lambda x, r, s, p: x.a * x.a.item(), "looks at a tensor's values"),
    (lambda x, r, s, p: x.a * float(x.a), "looks at a tensor's values"),
    (lambda x, r, s, p: torch.tanh(x.a.int().to(x.a.dtype) + r.a), "_to_copy changes the dtype"),
    (lambda x, r, s, p: x.a.double(), "_to_copy changes the dtype"),
    (lambda x, r, s, p: x.a * torch.rand_like(x.a), "rand_like draws random numbers"),
    (lambda x, r, s, p: x.a + torch.randn(2, 3), "randn draws random numbers"),
    (lambda x, r, s, p: x.a + OUTSIDE, "add takes a tensor from outside; a learnable vector belongs to params"),
]


@pytest.mark.parametrize("function, text", REFUSED)
def test_what_is_refused_is_named_with_its_line(function, text):
    """Each function is one line of this file, which the text quotes: why it is refused stands behind it."""
    with pytest.raises(ValueError, match="the cell <lambda>, ") as error:
        cell(gates="a")(function)
    number = function.__code__.co_firstlineno
    place, _, why = str(error.value).rpartition("`: ")
    assert re.match(text, why) and place.endswith(f"line {number}: `{linecache.getline(__file__, number).strip()}")


def test_the_line_is_that_of_the_operation():
    def several(x, r, s, p):
        a = torch.tanh(x.a)
        b = functional.softmax(a, -1)
        return b

    with pytest.raises(ValueError, match="the cell several, ") as error:
        cell(gates="a")(several)
    assert f"line {several.__code__.co_firstlineno + 2}: `b = functional.softmax(a, -1)`" in str(error.value)


RESULTS = {
    "one more": (lambda x, r, s, p: (x.a, s.c, r.a), "must return h, c, tensors: got Tensor, Tensor, Tensor"),
    "one less": (lambda x, r, s, p: x.a, "must return h, c, tensors: got Tensor"),
    "a number": (lambda x, r, s, p: (x.a, 1.0), "must return h, c, tensors: got Tensor, float"),
    "nothing": (lambda x, r, s, p: None, "must return h, c, tensors: got NoneType"),
    "bools": (lambda x, r, s, p: (x.a > 0, s.c), "must return tensors of the shape and dtype that it takes"),
}


@pytest.mark.parametrize(("function", "text"), RESULTS.values(), ids=RESULTS)
def test_results_that_are_refused(function, text):
    with pytest.raises(ValueError, match=f"the cell <lambda> {text}"):
        cell(gates="a", state="c")(function)


ALLOWED = {f.__name__: f for f in (functional.softplus, functional.gelu, functional.silu, functional.leaky_relu)}
ALLOWED |= {f.__name__: f for f in (torch.relu, torch.log1p, torch.expm1, torch.erf, torch.sin, torch.abs, torch.sign)}
ALLOWED |= {"gelu by tanh": lambda v: functional.gelu(v, approximate="tanh"), "pow(2)": lambda v: v.pow(2)}
ALLOWED |= {"log1p near 0": lambda v: torch.log1p(1e-9 * v), "expm1 near 0": lambda v: torch.expm1(1e-9 * v)}


@pytest.mark.parametrize("name", ["atan2", "hypot"])
def test_what_has_no_form_in_triton(name):
    """Such a cell runs, composed of torch's operations: only its print has to say so."""
    of = cell(gates="a")(lambda x, r, s, p: getattr(torch, name)(x.a, r.a))
    layer, x = Recurrent(of, 3, 5), torch.randn(4, 2, 3)
    y, _ = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and layer.weight_ih_l0.grad.any()
    with pytest.raises(ValueError, match=f"^{name} has no form in Triton here"):
        _ = of.source


# What is printed

KERNEL = """

@triton.jit
def run_{name}(given, made, N: tl.constexpr):
    at = tl.arange(0, N)
    results = {name}({arguments})
    {stores}
"""
numbers = count()


class Printed:
    """A printed cell, run on rows of N numbers, one row for each argument and result. source: text in its place."""

    def __init__(self, of, source=None):
        self.counts = G, S, P = len(of.gates), len(of.S._fields), len(of.params)
        text, K = of.source if source is None else source, len(of.graph.saved)
        text += self.kernel("forward", (G, G, S, P), (None, S - 1, K))
        text += self.kernel("backward", (K, S, S, P, S), (len(of.graph.apart), G, S, P))
        # Triton reads a function's text by inspect, which asks linecache.
        file, self.functions = f"<printed {next(numbers)}>", {"__name__": __name__}
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
        exec(compile(text, file, "exec"), self.functions)

    @staticmethod
    def kernel(name, takes, gives):
        """The text of a kernel that takes tuples of so many rows, and gives such; None: a tile that is in none."""
        rows = count()
        arguments = (f"({''.join(f'tl.load(given + {next(rows)} * N + at), ' for _ in range(n))})" for n in takes)
        places = ([""] if n is None else [f"[{k}]" for k in range(n)] for n in gives)
        made = [f"results[{k}]{place}" for k, of_one in enumerate(places) for place in of_one]
        stores = "\n    ".join(f"tl.store(made + {k} * N + at, {result})" for k, result in enumerate(made))
        return KERNEL.format(name=name, arguments=", ".join(arguments), stores=stores)

    def run(self, name, given, rows):
        made = given.new_full((rows, N), torch.nan)
        self.functions[f"run_{name}"][(1,)](given.contiguous(), made, N)
        return made

    def both(self, of, given, d):
        """given: rows of x, r, s and p. Returns what forward makes without what it keeps, and what backward makes."""
        G, S, P = self.counts
        made = self.run("forward", given, S + len(of.graph.saved))
        s, p = given[2 * G : 2 * G + S], given[2 * G + S :]
        given = torch.cat([made[S:], s, made[:S], p, d])
        return made[:S], self.run("backward", given, len(of.graph.apart) + G + S + P)


def by_torch(of, given, d):
    """The same by torch.autograd."""
    leaves = [row.clone().requires_grad_() for row in given]
    outputs = of.on_flat(*leaves)
    outputs = [output if output.requires_grad else output + 0 * leaves[0] for output in outputs]
    grads = torch.autograd.grad(outputs, leaves, list(d), materialize_grads=True, allow_unused=True)
    G = len(of.gates)
    apart = [grads[of.gates.index(gate)] for gate in of.graph.apart]
    for gate, of_x, of_r in zip(of.gates, grads, grads[G:], strict=False):
        assert gate in of.graph.apart or torch.equal(of_x.nan_to_num(), of_r.nan_to_num()), gate
    return torch.stack(outputs).detach(), torch.stack([*apart, *grads[G:]])


def rows_for(of, dtype=torch.float64):
    """Random numbers for the arguments of a cell, and for the gradients of what it returns."""
    sizes = len(of.arguments), len(of.S._fields)
    given, d = torch.randn(sum(sizes), N, dtype=torch.float64).split(sizes)
    given[:, -8:] = (given[:, -8:] * 2).floor() / 2 + 0.25  # equal ones, and some that are the bounds in GROUPS
    if of is cells.slstm:
        given[of.arguments.index("s.n")].clamp_(min=0)  # first steps, and others
    return given.to(dtype), d.to(dtype)


def assert_printed(of, dtype=torch.float64, source=None):
    given, d = rows_for(of, dtype)
    gold = by_torch(of, given.double(), d.double())
    each = zip(("h", "grads"), Printed(of, source).both(of, given, d), by_torch(of, given, d), gold, strict=True)
    for kind, *results in each:
        for k, (own, other, exact) in enumerate(zip(*results, strict=True)):
            assert_close(f"{kind} {k}", own, other, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRINTED)
def test_the_print_is_the_function_and_its_derivative(name, dtype):
    assert_printed(PRINTED[name], dtype)


@pytest.mark.parametrize("name", list(ALLOWED))
def test_the_print_of_torch_s_functions(name):
    assert_printed(cell(gates="a")(lambda x, r, s, p: ALLOWED[name](abs(x.a + r.a)) * s.h))


ODD = {
    "a state called d": ("d", lambda x, r, s, p: (torch.tanh(x.a + r.a), torch.tanh(s.d * x.a))),
    "a state called exp": ("exp", lambda x, r, s, p: (torch.exp(x.a + r.a), torch.exp(s.exp * x.a))),
    "a state called dh": ("dh", lambda x, r, s, p: (torch.exp(x.a + r.a), torch.tanh(s.dh * x.a))),
    "a constant state": ("c", lambda x, r, s, p: (torch.tanh(x.a), torch.ones_like(s.c))),
    "an input as a state": ("c", lambda x, r, s, p: (x.a * r.a, x.a)),
    "a gradient without d": ("", lambda x, r, s, p: torch.sign(abs(x.a)) * s.h),
    "a constant in float64": ("", lambda x, r, s, p: torch.clamp(x.a + r.a, -0.1, 0.1)),
    "detach": ("", lambda x, r, s, p: torch.tanh(x.a.detach() * r.a)),
    "not of a number": ("", lambda x, r, s, p: torch.where(torch.logical_not(x.a), s.h, r.a)),
    "a tensor made inside": ("", lambda x, r, s, p: torch.tanh(x.a * torch.tensor(2.0))),
    "a linear cell": ("c", lambda x, r, s, p: (x.a + r.a + s.h, x.a + r.a)),
}


@pytest.mark.parametrize(("state", "function"), ODD.values(), ids=ODD)
def test_the_print_of_odd_cells(state, function):
    assert_printed(cell(gates="a", state=state)(function))


@pytest.mark.parametrize("name", PRINTED)
def test_nan_stays_in_its_number(name):
    """Each argument is NaN in another number."""
    of = PRINTED[name]
    given, d = rows_for(of)
    printed = Printed(of)
    clean = printed.both(of, given, d)
    for k, row in enumerate((*given, *d)):
        row[k] = torch.nan
    for found, theirs, without in zip(printed.both(of, given, d), by_torch(of, given, d), clean, strict=True):
        assert found.isnan().any() and torch.equal(found.isnan(), theirs.isnan())
        free = torch.arange(N) >= len(given) + len(d)
        assert torch.equal(found[:, free], without[:, free])


SIGNS = {" * ": " + ", " + ": " - ", " - ": " + ", " / ": " * "}


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_wrong_derivative_is_found(name):
    """Any one sign in the print of backward."""
    of, wrong = LIBRARY[name], 0
    forward, head, backward = of.source.partition("@triton.jit\ndef backward")
    lines = backward.splitlines(keepends=True)
    for k, (sign, other) in product(range(len(lines)), SIGNS.items()):
        if sign in lines[k]:
            text = "".join([forward, head, *lines[:k], lines[k].replace(sign, other), *lines[k + 1 :]])
            with pytest.raises(AssertionError, match="the rule allows"):
                assert_printed(of, source=text)
            wrong += 1
    assert wrong > 15


BY_HAND = """
import triton
import triton.language as tl

from fused_lstm.kernels.cell import cell_backward, cell_forward
from fused_lstm.kernels.gates import Gates


@triton.jit
def forward(x, r, s, p):
    gates, c, h = cell_forward(Gates(x[0] + r[0], x[1] + r[1], x[2] + r[2], x[3] + r[3]), s[1])
    return h, (c,), (gates.i, gates.f, gates.g, gates.o)


@triton.jit
def backward(saved, s, now, p, d):
    gates, dc = cell_backward(Gates(saved[0], saved[1], saved[2], saved[3]), s[1], now[1], d[0], d[1])
    return (), (gates.i, gates.f, gates.g, gates.o), (tl.full(dc.shape, 0.0, dc.dtype), dc), ()
"""


def test_the_print_of_lstm_is_the_cell_of_the_kernels():
    given, d = rows_for(cells.lstm)
    results = zip(*(Printed(cells.lstm, source).both(cells.lstm, given, d) for source in (None, BY_HAND)), strict=True)
    for ours, by_hand in (pair for both in results for pair in zip(*both, strict=True)):
        assert_close("by hand", ours, None, by_hand, torch.float64)


# What is kept


def reached(of, kept):
    """The nodes that backward makes anew, or takes, where forward keeps these beside h and the states."""
    done, stack = (
        {*(state for state in of.graph.outputs.values() if isinstance(state, Node)), *kept},
        of.graph.gradients(),
    )
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in done:
            done.add(node)
            stack += node.args
            yield node


def cost(of, kept):
    """What that costs; infinite if it cannot be."""
    nodes = list(reached(of, kept))
    if any(node.name[:2] in ("x.", "r.") for node in nodes):
        return math.inf
    return SAVED * len(kept) + sum(COSTS[node.op] for node in nodes if not node.later and node.op != "input")


def test_what_the_cells_keep():
    ops = {name: sorted(node.name or node.op for node in of.graph.saved) for name, of in LIBRARY.items()}
    assert ops["lstm"] == ["sigmoid"] * 3 + ["tanh"] and ops["gru"] == ["r.n", "sigmoid", "sigmoid", "tanh"]
    assert not ops["rnn_tanh"] and cells.gru.graph.apart == ("n",) and not cells.lstm.graph.apart


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_that_is_kept_can_be_left_out(name):
    of, kept = LIBRARY[name], LIBRARY[name].graph.saved
    assert cost(of, kept) < math.inf == min((cost(of, {*kept} - {node}) for node in kept), default=math.inf)


@pytest.mark.parametrize("name", ["gru", "cifg", "rnn_tanh", "vectors", "waves", "powers"])
def test_the_least_is_kept(name):
    """Against every choice that does not cost more by its number alone."""
    of, least = PRINTED[name], cost(PRINTED[name], PRINTED[name].graph.saved)
    choices = [n for n in reached(of, ()) if not n.later and n.op not in OF_BOOL and n.name[:1] not in ("s", "p")]
    every = chain.from_iterable(combinations(choices, n) for n in range(int(least // SAVED) + 1))
    assert least == min(cost(of, kept) for kept in every)


def test_the_graph_does_not_depend_on_what_it_is_first_asked_for_under():
    def one(x, r, s, p):
        return torch.tanh(x.a + r.a) * s.h

    plain = cell(gates="a")(one).source
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.autocast("cpu"), torch.inference_mode(), torch.device("meta"), hooks:
        assert cell(gates="a")(one).source == plain
