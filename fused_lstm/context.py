"""What a call is made under: asked here, once, of the compiler, the tracers and every level of torch.func.

By it a call takes its path. The kernels serve a plain call, a compiled one, reverse mode and torch.vmap; torch's own
LSTM a plain call, reverse mode, and what records a call in torch's operators; and composed.py, slow but made of torch
operations alone, what is left: forward mode on either path, torch.vmap on torch's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Any = torch._C._functorch


def constant(function: Callable[..., Any]) -> Any:
    """torch.compiler.assume_constant_result, without importing all of the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Context(NamedTuple):
    """What a call is made under.

    compiled: torch.compile or torch.export makes a graph of it, for all T and B: it may ask no tensor.
    recorded: torch.jit.trace or torch.onnx.export records it in torch's own operators; sizes can be tensors.
    saves: autograd wants a gradient through it, on some level.
    forward_mode: a derivative goes along with it, on some level.
    transformed: it is within a transform of torch.func, which may have wrapped any tensor.
    batched: it is within torch.vmap.
    """

    compiled: bool = False
    recorded: bool = False
    saves: bool = False
    forward_mode: bool = False
    transformed: bool = False
    batched: bool = False

    @staticmethod
    def of(*tensors: Tensor) -> "Context":
        """tensors: all that a gradient may be wanted of."""
        saves = False
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad:
                    saves = True
                    break
        if torch.compiler.is_compiling():
            return Context(True, _exports_onnx(), saves)
        forward_mode = batched = False
        transformed = _functorch.peek_interpreter_stack() is not None
        if transformed:
            kinds = {level.key() for level in _functorch.get_interpreter_stack()}
            forward_mode = _functorch.TransformType.Jvp in kinds
            batched = _functorch.TransformType.Vmap in kinds
            saves = saves or (torch.is_grad_enabled() and any(map(_wants_gradient, tensors)))
        if forward_ad._current_level >= 0 and not forward_mode:
            forward_mode = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
        recorded = torch._C._is_tracing()
        if recorded or forward_mode or transformed:
            return Context(False, recorded, saves, forward_mode, transformed, batched)
        return SAVES if saves else PLAIN

    @property
    def plain(self) -> bool:
        """Whether there is nothing but, perhaps, a gradient that autograd wants."""
        return self is PLAIN or self is SAVES


PLAIN, SAVES = Context(), Context(saves=True)


@constant
def _exports_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def _wants_gradient(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient on any level: what torch.vmap hands on does not say so itself."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False
