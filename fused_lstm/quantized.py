"""quantize(): an LSTM for inference whose weights have 8 bits, in memory and on their way to the multiprocessors."""

from typing import Any

import torch
from torch import Tensor, nn

from .lstm import LSTM
from .weights import widened

# The dtype, and the largest number that a weight of a row becomes.
KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
SCALE = "_scale"


def quantize(model: nn.Module, kind: str = "int8") -> int:
    """Gives every fused_lstm.LSTM inside `model` (and `model` itself) weights of 8 bits, in place, for inference.

    Each row of weight_ih and weight_hh becomes whole numbers ("int8", from -127 to 127) or numbers with three bits
    behind the first ("fp8", float8_e4m3fn), and one scale of the module's dtype: w = scale * q, symmetric, the largest
    weight of the row at the end of the range. Biases and projections stay as they are. The modules become
    QuantizedLSTM, whose state_dict has q under the weights' names and the scales under these with "_scale" behind; they
    load a checkpoint of an LSTM, too, which is then quantized. `fused_lstm.swap(model, back=True)` makes nn.LSTM of
    them, with the weights scale * q.

    Without gradients one step multiplies the 8 bits as they are, with sums in float32. So does a sequence those of
    weight_hh, if that takes less by the model, as with few rows of so many hidden units that 16 bits do not fit on the
    multiprocessors; plan(x).weights says so. Not with projections, states of all steps or resets to hx, nor under
    autocast. Any other weights are made wide first.

    Args:
        model: any module.
        kind: "int8" or "fp8". "fp8" is multiplied as it is on GPUs of compute capability 8.9 and more.

    Returns:
        How many modules were quantized.

    Raises:
        ValueError: another kind; weights that are parametrized, or not finite; a model without an LSTM of ours, or
            whose LSTMs are quantized to another kind. Nothing is quantized then.
    """
    if kind not in KINDS:
        raise ValueError(f"weights are quantized to {' or '.join(map(repr, KINDS))}, got {kind!r}")
    found = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLSTM) and module.quantized != kind:
            raise ValueError(
                f"{name or type(module).__name__} is quantized to {module.quantized!r}: call "
                f"fused_lstm.swap(model, back=True) and fused_lstm.swap(model) before quantize(model, {kind!r})"
            )
        if type(module) is LSTM:
            for weight in weight_names(module):
                if not torch.isfinite(getattr(module, weight)).all():
                    raise ValueError(f"{weight} of {name or 'the LSTM'} has numbers that are not finite")
            found.append(module)
        elif isinstance(module, LSTM) and not isinstance(module, QuantizedLSTM):
            raise ValueError(f"{name or type(module).__name__} is parametrized, or a class of its own: not quantized")
    if not found and not any(isinstance(module, QuantizedLSTM) for module in model.modules()):
        raise ValueError("there is no fused_lstm.LSTM in the model; fused_lstm.swap(model) makes them of nn.LSTM")
    for module in found:
        to_narrow(module, kind)
    return len(found)


def weight_names(module: Any) -> list[str]:
    """Of the weights that are quantized, in nn.LSTM's order."""
    ways = ("", "_reverse")[: 2 if module.bidirectional else 1]
    return [f"weight_{of}_l{k}{way}" for k in range(module.num_layers) for way in ways for of in ("ih", "hh")]


def narrow(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """q and the scale of each row, of the weight's dtype."""
    dtype, largest = KINDS[kind]
    exact = weight.detach().double()
    # A row of zeros has any scale.
    scale = (exact.abs().amax(1) / largest).to(weight.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (exact / scale.double()[:, None]).clamp(-largest, largest)
    return (q.round() if dtype == torch.int8 else q.float()).to(dtype), scale


def to_narrow(module: Any, kind: str) -> None:
    """Turns an LSTM into a QuantizedLSTM."""
    wide = {name: getattr(module, name) for name in weight_names(module)}
    for name in wide:
        del module._parameters[name]
    module.__class__ = QuantizedLSTM
    module.quantized = kind
    for name, weight in wide.items():
        q, scale = narrow(weight, kind)
        module.register_buffer(name, q)
        module.register_buffer(name + SCALE, scale)
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    names = [[name + SCALE if name in wide else name for name in layer] for layer in module._all_weights]
    module._all_weights, module._flat_weights_names = names, [name for layer in names for name in layer]
    module._init_flat_weights()


class QuantizedLSTM(LSTM):
    """An LSTM for inference with weights of 8 bits, as quantize() makes it; called as LSTM."""

    quantized: str

    def __init__(self, *args: Any, **keywords: Any) -> None:
        raise TypeError("a QuantizedLSTM is made of a fused_lstm.LSTM by fused_lstm.quantize(model)")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantized={self.quantized!r}"

    def flatten_parameters(self) -> None:
        """Does nothing: cuDNN takes no weights of 8 bits."""

    def dequantize(self) -> None:
        """Turns the module back into an LSTM, whose weights are scale * q."""
        wide = {name: self.wide(name) for name in weight_names(self)}
        for name in wide:
            del self._buffers[name], self._buffers[name + SCALE]
        vars(self).pop("quantized", None)
        self.__class__ = LSTM  # type: ignore[assignment]
        for name, weight in wide.items():
            self.register_parameter(name, nn.Parameter(weight))
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(True)
        names = [[name.removesuffix(SCALE) for name in layer] for layer in self._all_weights]
        self._all_weights, self._flat_weights_names = names, [name for layer in names for name in layer]
        # In nn.LSTM's order, as a state_dict has them.
        ordered = {name: self._parameters[name] for name in self._flat_weights_names}
        self._parameters.clear()
        self._parameters.update(ordered)
        self._init_flat_weights()

    def wide(self, name: str) -> Tensor:
        """A weight, scale * q."""
        return widened(self.get_buffer(name), self.get_buffer(name + SCALE))

    def _weights(self) -> tuple[list[Tensor], list[Tensor] | None]:
        # In torch's list the scales stand where the weights are.
        names = self._flat_weights_names
        scales = [self.get_buffer(name) for name in names if name.endswith(SCALE)]
        return [getattr(self, name.removesuffix(SCALE)) for name in names], scales

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        dtype, errors = KINDS[self.quantized][0], rest[-1]
        for name in weight_names(self):
            weight = state_dict.get(prefix + name)
            if weight is None or weight.dtype == dtype:
                continue
            if weight.dtype in (each for each, _ in KINDS.values()):
                errors.append(f"{prefix}{name} is of {weight.dtype}, and the module is quantized to {self.quantized!r}")
                del state_dict[prefix + name]
            elif prefix + name + SCALE not in state_dict:  # of an LSTM
                scale = self.get_buffer(name + SCALE)
                both = narrow(weight.to(scale.dtype), self.quantized)
                state_dict[prefix + name], state_dict[prefix + name + SCALE] = both
        super()._load_from_state_dict(state_dict, prefix, *rest)
