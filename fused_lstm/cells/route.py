"""Which way a call of Recurrent takes: the kernels, or torch operations, and why."""

from functools import partial
from typing import Any

import torch

from ..call import Options
from ..chunks import CHUNK, chunk_for, memory_of
from ..context import SAVES, Context, constant
from ..kernels.environment import WHY_NO_TRITON
from ..kernels.planned import Plan, composed
from ..route import COMPILED_B, full_precision
from .definition import Cell, by_key
from .in_graph import layer_in_graph
from .layers import CellCall, Layer, composed_layer, in_chunks, layer_by_layer, prepared
from .recurrence import kernel_layer

if WHY_NO_TRITON is None:
    from ..kernels.plan_of_cell import choose_for
    from .compiled import compiled

STEP_BY_STEP = "torch operations, step by step"


def run(call: CellCall) -> tuple[Any, ...]:
    """As layers.layer_by_layer()."""
    call, context = prepared(call), Context.of(call.input, *call.hx, *call.weights)
    # In a graph the states' sizes are symbols, a parameter's are none.
    D, x, B, H = call.options.directions, call.input, call.hx[0].shape[1], call.weights[1].shape[1]
    layer: Layer = composed_layer
    if call.record is not None:  # it asks for what no kernel keeps
        return layer_by_layer(call, layer)
    if plan_of(call.cell, context, x.dtype, B, H, x.device, D).mode != "composed":
        layer = partial(kernel_layer, save=context.saves, ieee=full_precision())
    elif context.compiled and not context.recorded:
        layer = layer_in_graph
    if chunk := chunk_of(call.options, context, x.dtype, B, H, x.device):
        layer = partial(in_chunks, layer=layer, length=chunk)
    return layer_by_layer(call, layer)


def chunk_of(options: Options, context: Context, dtype: torch.dtype, B: int, H: int, device: torch.device) -> int:
    """The steps of a chunk under recompute; 0: everything is kept."""
    if options.recompute == 0 or context is not SAVES or options.reset_to_hx:
        return 0
    memory = memory_of(device)
    return options.recompute or (CHUNK if memory is None else chunk_for(dtype, B, H, memory))


def plan_of(
    cell: Cell, context: Context, dtype: torch.dtype, B: int, H: int, device: torch.device, directions: int
) -> Plan:
    """The plan of a layer: in mode "composed" for torch operations, with the reason."""
    if cell.feedback:
        return composed(f"{STEP_BY_STEP}: the cell's states feed back through matrices of their own, beside W_hh")
    if context.recorded:
        return composed(f"{STEP_BY_STEP}: torch.jit.trace and torch.onnx.export know torch's operators alone")
    if context.forward_mode or context.batched:
        return composed(f"{STEP_BY_STEP}: within forward mode and torch.vmap")
    # A graph is for all B.
    B = COMPILED_B if context.compiled or type(B) is not int else B
    return plan_here(cell.key, dtype, B, H, device, directions)


@constant
def plan_here(key: str, dtype: torch.dtype, B: int, H: int, device: torch.device, directions: int) -> Plan:
    """plan_of() where nothing but the cell, the sizes and the device decides."""
    if WHY_NO_TRITON is not None:
        return composed(f"{WHY_NO_TRITON}: {STEP_BY_STEP}")
    try:
        equations = compiled(by_key(key))
    except ValueError as error:
        return composed(f"{STEP_BY_STEP}: {error}")
    return choose_for(equations, dtype, B, H, device, full_precision(), directions)
