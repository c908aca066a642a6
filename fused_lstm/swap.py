"""swap(): a model's nn.LSTM modules become fused_lstm's in place, or the other way."""

from types import MethodType
from typing import Any

from torch import nn

from .lstm import LSTM, LSTMCell
from .quantized import QuantizedLSTM


def swap(model: nn.Module, back: bool = False) -> int:
    """Turns every nn.LSTM and nn.LSTMCell inside `model` (and `model` itself) into fused_lstm's, in place.

    The module objects stay the same and only change their class, so parameters, hooks, training mode, device,
    parametrizations, FSDP2's sharding and every reference to them (optimizers, tied modules) are kept. A user's own
    subclass of nn.LSTM is left alone: its forward is not ours to replace.

    Args:
        model: any module.
        back: turn fused_lstm's into torch's instead, also what quantize() has quantized, whose weights are then what
            their 8 bits stand for.

    Returns:
        How many modules were turned.

    Raises:
        RuntimeError: a module whose forward has been replaced by a function that holds the old one, so that it would
            still run; the error names it, and nothing is turned.
    """
    pairs = (
        [(LSTM, nn.LSTM), (QuantizedLSTM, nn.LSTM), (LSTMCell, nn.LSTMCell)]
        if back
        else [(nn.LSTM, LSTM), (nn.LSTMCell, LSTMCell)]
    )
    turned = []
    for name, module in model.named_modules():
        for old, new in pairs:
            if (cls := turned_class(type(module), old, new)) is not None:
                turned.append((module, cls, rebound(name, module, old, new)))
    for module, cls, methods in turned:
        if isinstance(module, QuantizedLSTM):
            module.dequantize()
        module.__class__ = cls
        vars(module).update(methods)
    return len(turned)


def turned_class(cls: type, old: type, new: type) -> type | None:
    """`cls` with `new` in the place of `old`; None if it is not `old`, nor made of it by torch as it runs."""
    if cls is old:
        return new
    # parametrize and fully_shard give a module a class of its own.
    if old in cls.__bases__ and cls.__module__.startswith("torch."):
        bases = tuple(new if base is old else base for base in cls.__bases__)
        return type(cls.__name__.replace(old.__name__, new.__name__), bases, dict(cls.__dict__))
    return None


def rebound(name: str, module: nn.Module, old: type, new: type) -> dict[str, Any]:
    """The module's own attributes that are methods of `old`, as methods of `new`.

    A library that puts a forward of its own on the instance, as accelerate does, keeps the old one beside it.
    """
    methods = {
        key: MethodType(getattr(new, value.__name__), module)
        for key, value in vars(module).items()
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ in vars(old).values()
    }
    if "forward" in vars(module) and not methods:
        where = name or type(module).__name__
        raise RuntimeError(
            f"the forward of {where} has been replaced by {vars(module)['forward']!r}, which may hold that of "
            f"{old.__name__}: call fused_lstm.swap() before that, or take it away first"
        )
    return methods
