"""The launchers of kernels/ in torch's own operations: what the operators run where a device takes none of the kernels.

Slow, but a call gives its results all the same. The next one has a plan that knows, and goes to torch's own LSTM; a
compiled graph, a transform or a backward pass whose forward pass has run stays with these. Arguments and results are
those of the launchers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference
from .kernels.layout import DENSE, NO_STACK, Layout, Stack, accumulator
from .weights import Weights, cat


def forward(
    input_gates: Tensor,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
    stack: Stack = NO_STACK,
    weight_hr: Tensor | None = None,
    save: bool = True,
) -> Any:
    """As kernels.forward.forward, of states (R, B, ...)."""
    stacked, (R, B, _), dtype = stack.weight_ih is not None, h0.shape, input_gates.dtype
    of_each: list[Any] = []
    for r in range(R):
        pre = input_gates if stacked else input_gates.chunk(R, -1)[r]
        if stacked and r > 0:
            x = dropped(of_each[-1][0], stack, r - 1, B, layout)
            pre = linear(x, stack.weight_ih[r - 1], stack.bias[r - 1])  # type: ignore[index]
        options = of_recurrence(r, stacked, reverse, layout, c_reset, weight_hr)
        y, hn, cn, c, gates = reference.forward(*map(wide, (pre, weight_hh[r], h0[r], c0[r])), **options)
        of_each.append((y.to(dtype), hn.to(dtype), cn, c, gates.to(dtype)))
    ys, hns, cns, cs, every_gates = (list(tensors) for tensors in zip(*of_each, strict=True))
    of_all = torch.stack if stacked else cat
    saved = (of_all(cs), of_all(every_gates)) if save else (None, None)
    return of_all(ys), torch.stack(hns), torch.stack(cns), *saved


def backward(
    dy: Tensor,
    dhn: Tensor,
    dcn: Tensor,
    weight_hh: Tensor,
    c0: Tensor,
    c: Tensor,
    gates: Tensor,
    *,
    reverse: bool = False,
    layout: Layout = DENSE,
    c_reset: Tensor | None = None,
    stack: Stack = NO_STACK,
    weight_hr: Tensor | None = None,
    dc_steps: Tensor | None = None,
) -> Any:
    """As kernels.backward.backward, of states (R, B, ...)."""
    stacked, (R, B, _), dtype = stack.weight_ih is not None, c0.shape, gates.dtype
    of_each: list[Any] = []
    for r in reversed(range(R)):
        above, saved = dy, (c[r], gates[r]) if stacked else (c.chunk(R, -1)[r], gates.chunk(R, -1)[r])
        if not stacked:
            above = dy.chunk(R, -1)[r]
        elif r < R - 1:
            above = dropped(of_each[-1][0] @ stack.weight_ih[r], stack, r, B, layout)  # type: ignore[index]
        options = of_recurrence(r, stacked, reverse, layout, c_reset, weight_hr)
        options["dc_steps"] = None if dc_steps is None else dc_steps.chunk(R, -1)[r]
        tensors = map(wide, (above, dhn[r], dcn[r], weight_hh[r], c0[r], *saved))
        dgates, *of_states, dh_steps = reference.backward(*tensors, **options)
        of_each.append((dgates.to(dtype), *of_states, None if dh_steps is None else dh_steps.to(dtype)))
    of_gates, dc0, dc_reset, of_steps = (list(tensors) for tensors in zip(*reversed(of_each), strict=True))
    return (
        torch.stack(of_gates) if stacked else cat(of_gates),
        torch.stack(dc0),
        None if c_reset is None else torch.stack(dc_reset),
        None if weight_hr is None else cat(of_steps),
    )


def wide(tensor: Tensor) -> Tensor:
    """In the accumulator's dtype, in which the kernels sum."""
    return tensor.to(accumulator(tensor.dtype))


def of_recurrence(
    r: int, stacked: bool, reverse: bool, layout: Layout, c_reset: Tensor | None, weight_hr: Tensor | None
) -> dict[str, Any]:
    """The options of recurrence r, as reference.py takes them."""
    return {
        "reverse": reverse or (r == 1 and not stacked),
        "layout": layout.of_direction(r),
        "c_reset": None if c_reset is None else c_reset[r],
        "weight_hr": None if weight_hr is None else wide(weight_hr[r]),
    }


def dropped(x: Tensor, stack: Stack, layer: int, B: int, layout: Layout) -> Tensor:
    """x as the layer above `layer` takes it."""
    return x if stack.seed is None else dropout(x, stack.seed, stack.keep, layer, B, layout)  # type: ignore[arg-type]


def dropout(x: Tensor, seed: Tensor, keep_prob: Tensor, layer: int, B: int, layout: Layout = DENSE) -> Tensor:
    """As kernels.dropout.dropout."""
    dropped = (x * dropout_mask(x, seed, keep_prob, layer, B, layout)).to(x.dtype)
    return dropped.masked_fill(layout.past(x.shape), 0) if layout.padded else dropped


def dropout_mask(x: Tensor, seed: Tensor, keep_prob: Tensor, layer: int, B: int, layout: Layout) -> Tensor:
    """1 / keep_prob where kernels/dropout.py keeps an element of x, and 0 elsewhere."""
    H, T = x.shape[-1], layout.steps(x.shape)
    of_step = torch.arange(B * H, device=x.device)
    time = torch.arange(T, device=x.device)[:, None]
    kept = uniform(seed, of_step, time, torch.full_like(time, layer)).view(T, B, H) < keep_prob
    if layout.offsets is not None:
        rows = torch.arange(x.shape[0], device=x.device)
        step = torch.searchsorted(layout.offsets, rows, right=True) - 1
        kept = kept[step, rows - layout.offsets[step]]
    elif layout.batch_first:
        kept = kept.transpose(0, 1)
    return kept / keep_prob


def uniform(seed: Tensor, *counter: Tensor) -> Tensor:
    """The first number of Philox 4x32 in ten rounds with the counter (c0, c1, c2, 0), as triton.language.philox has it,
    from 0 to 1 (Salmon et al. 2011)."""
    low = 0xFFFFFFFF
    c0, c1, c2 = torch.broadcast_tensors(*counter)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low

    def times(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The upper and lower 32 bits of a product, of which int64 has no room for the sign."""
        first, second = factor * (x & 0xFFFF), factor * (x >> 16)
        upper = (second + (first >> 16)) >> 16
        return upper & low, (first + ((second & 0xFFFF) << 16)) & low

    for _ in range(10):
        (upper_a, lower_a), (upper_b, lower_b) = times(0xD2511F53, c0), times(0xCD9E8D57, c2)
        c0, c1, c2, c3 = upper_b ^ c1 ^ k0, lower_b, upper_a ^ c3 ^ k1, lower_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    signed = torch.where(c0 > 0x7FFFFFFF, low - c0, c0)  # -x - 1 of the negative ones
    return signed.to(torch.float32) * 4.6566127342e-10


def one_step(
    x: Tensor, h0: Tensor, c0: Tensor, weights: tuple[Weights, ...], directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As kernels.one_step.one_step, of weights that are all of the dtype of x."""
    ends: list[tuple[Tensor, Tensor]] = []
    for k, (h, c, w) in enumerate(zip(h0, c0, weights, strict=True)):
        gates = linear(x, w.weight_ih, w.bias_ih) + linear(h, w.weight_hh, w.bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        ends.append((h if w.weight_hr is None else linear(h, w.weight_hr), c))
        if (k + 1) % directions == 0:
            x = torch.cat([h for h, _ in ends[-directions:]], -1)
    hn, cn = (torch.stack(states) for states in zip(*ends, strict=True))
    return x, hn, cn


def scan(
    pre: Tensor, c0: Tensor, *, reverse: bool = False, layout: Layout = DENSE, c_reset: Tensor | None = None
) -> Tensor:
    """As kernels.scan.scan; it too activates the gates in their memory."""
    B, H = c0.shape
    flat, c = pre.view(-1, 4 * H), c0.clone()
    cells = c0.new_zeros(len(flat), H)
    for rows, active in reference.steps(pre, B, reverse, layout):
        c_prev = c[active]
        if layout.starts is not None and c_reset is not None:
            c_prev = torch.where(layout.starts.reshape(-1)[rows, None], c_reset[active], c_prev)
        i, f, g, o = flat[rows].to(c.dtype).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c[active] = cells[rows] = f * c_prev + i * g
        flat[rows] = torch.cat([i, f, g, o], dim=1).to(flat.dtype)
    return cells.view(*pre.shape[:-1], H)
