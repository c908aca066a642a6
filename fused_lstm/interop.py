"""What torch's other tools make of the modules: torch.fx takes them for leaves; torch.jit.script and quantization,
which know torch's classes alone, are refused."""

import sys
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError


def as_leaf(module: nn.Module, input: Proxy, *args: Any, **keywords: Any) -> Any:
    """Answers torch.fx, which looks into all modules but torch's own, as a leaf does: with a call of the module.

    Raises:
        TraceError: the module is not within the model that is traced.
    """
    try:
        target = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    except NameError:
        target = ""
    if not target:
        raise TraceError(f"{type(module).__name__} is a leaf of torch.fx: trace a model that has it as a submodule")
    return input.tracer.create_proxy("call_module", target, (input, *args), keywords)


class Refusing:
    """A module that refuses torch.ao.quantization, which would leave it as it is, in silence, and torch.jit.script."""

    @property
    def qconfig(self) -> Any:
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        # quantize_dynamic hands a module that is not in its list the same None as one that is to be left alone.
        name, frame = type(self).__name__, sys._getframe()
        while frame is not None and frame.f_code.co_name != "quantize_dynamic":
            frame = frame.f_back  # type: ignore[assignment]
        if value is not None or (frame is not None and getattr(nn, name, None) in frame.f_locals["qconfig_spec"]):
            raise RuntimeError(
                f"torch quantizes nn.{name}, not fused_lstm.{name}: call fused_lstm.swap(model, back=True) before"
            )

    def __prepare_scriptable__(self) -> Any:
        name = type(self).__name__
        raise RuntimeError(
            f"torch.jit.script compiles nn.{name}, not fused_lstm.{name}: call fused_lstm.swap(model, back=True) before"
        )
