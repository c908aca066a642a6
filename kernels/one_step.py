"""One step without gradients, of a whole stack in one launch: of every layer and direction both products of the gates,
the cell and the projection.

A program has some units of one layer, or some features of its projection. It waits for what programs before it make,
and for nobody else: a device begins programs in the order of their numbers, on which the scans of CUB rely, too, so all
that is waited for is on its way. No launch has to be cooperative, and a stack may have more programs than the device
holds at once. While a program waits its weights come, and the product with the layer's own h is made.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .cell import cell_forward
from .environment import interpreted
from .exchange import NO_EXCHANGE, exchange_for, forget
from .gates import add_gates, cast_gates, load_gates
from .launch import Specialized, aligned, arguments_key, compares_pairs, on_device, prepared_for, specialized
from .layout import StepWeights
from .operands import multiply, sum_gates, sum_parts
from .plan import hardware_of
from .plan_of_step import chunks_at_once
from .planned import Plan
from .polling import form
from .step_products import Rows, add_looped, awaited_product, both_products, hold, last_chunks, scaled
from .sync import Sync, raise_if_stuck
from .tiles import Device, ceil_div

INTERPRETED = tl.constexpr(interpreted())


@dataclass(frozen=True)
class Net:
    """The constants of a launch, beside its tiles.

    I: features of x. H: hidden units. O: features of h. D: directions. layers: in the launch.
    wide: the rows of all weights, of x and of h0 are whole 16 bytes. width: of a row of the exchange.
    at_once: chunks of a weight that are on their way together, as many as a thread has registers for.
    """

    I: int  # noqa: E741
    H: int
    O: int  # noqa: E741
    D: int
    layers: int
    wide: bool
    width: int
    at_once: int

    @property
    def projects(self) -> bool:
        return self.O < self.H

    @property
    def first_output(self) -> int:
        """The slot of the first layer's h, behind those of what is to be projected, of each layer and direction."""
        return self.D * self.layers if self.projects else 0


class Place(NamedTuple):
    """What a program has of a layer."""

    layer: Any
    direction: Any
    recurrence: Any  # of all layers and directions
    block: Any  # of units, or of features of the projection
    batch: Any  # (BLOCK_B,): batch rows
    real: Any  # which of them there are
    states: Any  # (BLOCK_B,) int64: their rows in a (R, B, ...) tensor
    rows: Any  # of a slot of the exchange


@triton.jit
def one_of(pointers, at):
    """The pointer number `at` of some."""
    found = pointers[0]
    for k in tl.static_range(1, len(pointers)):
        found = tl.where(at == k, pointers[k], found)
    return found


@triton.jit
def hand_on(exchange, x, slot, at, columns, mask, WIDTH: tl.constexpr):
    """Leaves x (batch rows, columns) in a slot, which the launch after this one finds empty again."""
    to = (slot * at.rows + at.batch[:, None]) * WIDTH + columns[None, :]
    tl.store(exchange.own + to, x, mask=mask)
    tl.store(exchange.next + to, tl.full(x.shape, -1, exchange.next.dtype.element_ty), mask=mask)


@triton.jit
def leave(h, y, hn, exchange, at, features, mask, NET: tl.constexpr):
    """Stores h (batch rows, features) of a layer and direction: for the layer above, of the last one as y."""
    columns = at.direction * NET.O + features
    if NET.layers > 1:
        if at.layer < NET.layers - 1:
            hand_on(exchange, h, NET.first_output + at.layer, at, columns, mask, NET.width)
    if at.layer == NET.layers - 1:
        tl.store(y + at.batch.to(tl.int64)[:, None] * (NET.D * NET.O) + columns[None, :], h, mask=mask)
    tl.store(hn + at.states[:, None] * NET.O + features[None, :], h, mask=mask)


@triton.jit
def id_of(axis: tl.constexpr):
    """The program's number in its row, among the batch rows and directions, or among the layers, by the axis."""
    if INTERPRETED:  # which has another order of programs than a device
        return tl.program_id(2 - axis)
    else:
        return tl.program_id(axis)


@triton.jit
def place_of(B, NET: tl.constexpr, BLOCK_B: tl.constexpr):
    """The Place of this program."""
    rows, layer = id_of(1), id_of(2)
    if NET.projects:
        layer //= 2
    group, direction = rows // NET.D, rows % NET.D
    batch = group * BLOCK_B + tl.arange(0, BLOCK_B)
    recurrence = layer * NET.D + direction
    states = recurrence.to(tl.int64) * B + tl.minimum(batch, B - 1)
    slot_rows = tl.num_programs(1) // NET.D * BLOCK_B
    return Place(layer, direction, recurrence, id_of(0), batch, batch < B, states, slot_rows)


@triton.jit
def project(weight_hr, y, hn, exchange, sync, at, NET: tl.constexpr, TILES: tl.constexpr, FORM: tl.constexpr):
    """Some features of a layer and direction, from all its units."""
    BLOCK_B: tl.constexpr = TILES.batch
    FEATURES: tl.constexpr = TILES.features
    SPLIT: tl.constexpr = TILES.split
    TYPE: tl.constexpr = y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    features = at.block * FEATURES + tl.arange(0, FEATURES)
    there = features < NET.O
    rows = one_of(weight_hr, at.recurrence) + tl.minimum(features, NET.O - 1).to(tl.int64) * NET.H
    weight = hold(Rows(rows, there), FORM, NET, TYPE)
    sum = tl.zeros((SPLIT, FEATURES, BLOCK_B), ACC)
    sum = awaited_product(sum, weight, exchange, at.recurrence, at, sync, FORM, NET)
    h = sum_parts(sum, SPLIT, FEATURES, BLOCK_B).to(TYPE)
    leave(h, y, hn, exchange, at, features, at.real[:, None] & there[None, :], NET)


@triton.jit(do_not_specialize=["B"])
def one_step_kernel(
    # Inputs. R: layers times directions, all in this launch; O: features of h
    x,  # (B, I)
    h0,  # (R, B, O)
    c0,  # (R, B, H)
    weight_ih,  # R times (4H, I), above the first layer (4H, D*O)
    weight_hh,  # R times (4H, O)
    bias_ih,  # R times (4H); None: there is none
    bias_hh,  # as bias_ih
    weight_hr,  # R times (O, H); None: h is not projected
    scale_ih,  # R times (4H), of the rows of weight_ih in 8 bits; None: it is of the dtype of x
    scale_hh,  # as scale_ih
    # Outputs
    y,  # (B, D*O), of the last layer
    hn,  # (R, B, O)
    cn,  # (R, B, H)
    exchange,  # an Exchange
    sync,  # a Sync
    B,
    NET: tl.constexpr,
    PRECISION: tl.constexpr,  # of a float32 product: Plan.precision
    TILES: tl.constexpr,  # Plan.forward
    PAIRS: tl.constexpr,  # of polling.words()
    MAX_SPINS: tl.constexpr,  # bound of a wait, 0 for none
):
    H: tl.constexpr = NET.H
    O: tl.constexpr = NET.O  # noqa: E741
    TYPE: tl.constexpr = y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32  # of sums and cells
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    BLOCK_B: tl.constexpr = TILES.batch
    BLOCK_H: tl.constexpr = TILES.units
    SPLIT: tl.constexpr = TILES.split
    at = place_of(B, NET, BLOCK_B)
    if not NET.projects or id_of(2) % 2 == 0:
        # What the cell takes, before all that is waited for.
        units = at.block * BLOCK_H + tl.arange(0, BLOCK_H)
        of_units = (units < H)[None, :]
        mask = at.real[:, None] & of_units
        state = at.states[:, None] * H + units[None, :]
        c_prev = tl.load(c0 + state, mask=mask, other=0.0)
        if bias_ih is not None:
            bias = load_gates(one_of(bias_ih, at.recurrence) + units[None, :], of_units, H)
            other_bias = load_gates(one_of(bias_hh, at.recurrence) + units[None, :], of_units, H)
        index = tl.arange(0, 4 * BLOCK_H)  # gate by gate
        unit = at.block * BLOCK_H + index % BLOCK_H
        there = unit < H
        row = index // BLOCK_H * H + tl.minimum(unit, H - 1)
        recurrent = Rows(one_of(weight_hh, at.recurrence) + row.to(tl.int64) * O, there)
        h = Rows(h0 + at.states * O, at.real)
        of_input = one_of(weight_ih, at.recurrence)
        of_ih, of_hh = None, None
        if scale_ih is not None:
            of_ih, of_hh = one_of(scale_ih, at.recurrence) + row, one_of(scale_hh, at.recurrence) + row
        sum = tl.zeros((SPLIT, 4 * BLOCK_H, BLOCK_B), ACC)
        OF_H: tl.constexpr = form(O, 1, TILES, BITS, PAIRS, PRECISION, 0)
        if at.layer == 0:
            OF_X: tl.constexpr = form(NET.I, 1, TILES, BITS, PAIRS, PRECISION, 0)
            of_x = Rows(of_input + row.to(tl.int64) * NET.I, there)
            x_rows = Rows(x + tl.minimum(at.batch, B - 1).to(tl.int64) * NET.I, at.real)
            sum = both_products(sum, recurrent, h, of_x, x_rows, (of_hh, of_ih), OF_H, OF_X, NET)
        elif NET.layers > 1:
            OF_BELOW: tl.constexpr = form(NET.D * O, 1, TILES, BITS, PAIRS, PRECISION, MAX_SPINS)
            of_below = hold(Rows(of_input + row.to(tl.int64) * (NET.D * O), there), OF_BELOW, NET, TYPE)
            of_h, h_last = last_chunks(recurrent, OF_H, NET, TYPE), last_chunks(h, OF_H, NET, TYPE)
            sum = multiply(of_h, h_last, add_looped(sum, recurrent, h, OF_H, NET), PRECISION)
            slot = NET.first_output + at.layer - 1
            if of_ih is None:
                sum = awaited_product(sum, of_below, exchange, slot, at, sync, OF_BELOW, NET)
            else:
                sum, scale = scaled(sum, tl.load(of_hh)), tl.load(of_ih)
                zero = tl.zeros((SPLIT, 4 * BLOCK_H, BLOCK_B), ACC)
                sum += scaled(awaited_product(zero, of_below, exchange, slot, at, sync, OF_BELOW, NET), scale)
        pre = sum_gates(sum, SPLIT, BLOCK_H, BLOCK_B)
        if bias_ih is not None:
            pre = add_gates(pre, add_gates(cast_gates(bias, ACC), other_bias))
        _, c, h_next = cell_forward(pre, c_prev.to(ACC))
        if NET.projects:
            hand_on(exchange, h_next.to(TYPE), at.recurrence, at, units, mask, NET.width)
        else:
            leave(h_next.to(TYPE), y, hn, exchange, at, units, mask, NET)
        tl.store(cn + state, c.to(TYPE), mask=mask)
    elif NET.projects:
        OF_UNITS: tl.constexpr = form(H, 1, TILES, BITS, PAIRS, PRECISION, MAX_SPINS)
        project(weight_hr, y, hn, exchange, sync, at, NET, TILES, OF_UNITS)


def one_step(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: StepWeights,
    *,
    plan: Plan,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one step through a stack of layers, so many in a launch as the plan says.

    Args:
        x: (B, I), contiguous, as all others, and of one dtype with them.
        h0, c0: (R, B, O) and (R, B, H), of L layers times D directions; O is P with a projection, H without.
        weights: of each layer and direction.
        plan: its tiles are those of `forward`; its directions D.
        out: where the results go; not where h0 or x lie. None: new tensors.
        keep: the memory by which programs exchange stays for the next launch. Not in a graph of torch's compiler, whose
            pool of memory must be left with nothing that it does not know.

    Returns:
        y: (B, D*O), of the last layer; hn, cn: as h0 and c0.

    Raises:
        Refused, RuntimeError: as launch.launch().
    """
    (R, B, O), at_once = h0.shape, plan.layers * plan.directions  # noqa: E741
    if out is None:
        out = x.new_empty(B, plan.directions * O), torch.empty_like(h0), torch.empty_like(c0)
    y, hn, cn = out
    if at_once >= R and B > 0:
        launch_layers(x, h0, c0, weights, (y, hn, cn), plan, keep)
    elif B > 0:
        for first in range(0, R, at_once):
            end = first + at_once
            to = y if end >= R else torch.empty_like(y)
            h0_of, c0_of, hn_of, cn_of = (each[first:end] for each in (h0, c0, hn, cn))
            launch_layers(x, h0_of, c0_of, weights.part(first, end), (to, hn_of, cn_of), plan, keep)
            x = to
    return y, hn, cn


class Prepared:
    """All that the launches of one form have in common; by whether all tensors are aligned to 16 bytes the kernel."""

    def __init__(self, plan: Plan, hardware: Device, dtype: torch.dtype, R: int, sizes: tuple[int, ...]) -> None:
        """R: layers times directions of a launch. sizes: B, I, H and O."""
        B, I, H, O = sizes  # noqa: E741
        D, tiles, size = plan.directions, plan.forward, dtype.itemsize
        chunk, groups = tiles.chunk, ceil_div(B, tiles.batch)
        layers, projects = R // D, O < H
        columns = [H] * R * projects + [D * O] * (layers - 1)
        self.columns, self.slots, self.rows = columns, None, tiles.batch
        width = 0
        if columns:
            width = ceil_div(max(columns), chunk) * chunk
            self.slots = len(columns), groups * tiles.batch, width
        blocks = max(ceil_div(H, tiles.units), ceil_div(O, tiles.features) if projects else 0)
        programs = blocks, D * groups, layers * (1 + projects)
        self.programs = programs[::-1] if interpreted() else programs
        rows = (I, H, O) if layers == 1 else (I, H, O, D * O)
        # Of weights in 8 bits a thread loads as many numbers, which are as much fewer bytes.
        whole = all(row * size % 16 == 0 for row in rows) and not hardware.gcn
        pairs, at_once = compares_pairs(hardware.capability), chunks_at_once(plan.precision, hardware)

        def kernel(wide: bool) -> Specialized:
            net = Net(I, H, O, D, layers, wide, width, at_once)
            spins = launch.MAX_SPINS if columns else 0
            made = specialized(one_step_kernel, plan, tiles, H, O, NET=net, PAIRS=pairs, MAX_SPINS=spins)
            if (not wide or tiles.batch > 8) and not hardware.gcn:
                # The addresses of narrow loads and 16 rows take registers; ptxas would rather keep some in memory than
                # have two programs on a multiprocessor become one.
                made.options["maxnreg"] = 248
            return made

        self.bounded = bool(launch.MAX_SPINS and columns)
        self.kernels = kernel(False), kernel(True) if whole else None


def launch_layers(
    x: Tensor, h0: Tensor, c0: Tensor, weights: StepWeights, out: tuple[Tensor, Tensor, Tensor], plan: Plan, keep: bool
) -> None:
    """Launches one_step_kernel, for all the layers that are given."""
    (R, B, O), (I, H), device = h0.shape, (x.shape[1], c0.shape[2]), x.device  # noqa: E741
    form_of_call = id(one_step_kernel), device, x.dtype, R, B, I, H, O, launch.MAX_SPINS
    of_plan = prepared_for(plan)
    prepared = of_plan.get(form_of_call)
    if prepared is None:
        prepared = of_plan[form_of_call] = Prepared(plan, hardware_of(device), x.dtype, R, (B, I, H, O))
    with on_device(device):
        exchange = NO_EXCHANGE
        if prepared.slots is not None:
            key = (prepared, device) if keep else None
            exchange = exchange_for(key, x, prepared.slots, prepared.columns, B)
        info = torch.zeros(4, dtype=torch.int32, device=device) if prepared.bounded else None
        args = x, h0, c0, *weights, *out, exchange, Sync(None, info, None)
        code = arguments_key(args, (B,))
        kernel = prepared.kernels[aligned(code)] or prepared.kernels[False]
        try:
            kernel.launch(prepared.programs, args, (B,), code)
        except BaseException:
            forget()
            raise
    if info is not None:
        raise_if_stuck(info, one_step_kernel.__name__, plan)
