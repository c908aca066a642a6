"""The parameters of one layer and direction of a cell."""

from typing import NamedTuple

from torch import Tensor

from .definition import Cell


class Weights(NamedTuple):
    """Of one layer and direction. weight_ih (G·H, I), weight_hh (G·H, H), bias_ih, bias_hh (G·H) or None, vectors: each
    (H), weight_fh (F·H, F·H), of a cell with F states that feed back, or None."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    vectors: tuple[Tensor, ...]
    weight_fh: Tensor | None

    @staticmethod
    def names(cell: Cell, bias: bool) -> list[str]:
        """Of the parameters, in the order in which a layer lists them."""
        feedback = ["weight_fh"] if cell.feedback else []
        return ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else []), *cell.params, *feedback]

    @staticmethod
    def shapes(cell: Cell, input_size: int, H: int) -> dict[str, tuple[int, ...]]:
        """Of the parameters by name."""
        G, F = len(cell.gates), len(cell.feedback)
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, input_size), "weight_hh": (G * H, H)}
        shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (G * H,)) | dict.fromkeys(cell.params, (H,))
        return shapes | {"weight_fh": (F * H, F * H)}

    @staticmethod
    def of(cell: Cell, flat: list[Tensor], bias: bool) -> list["Weights"]:
        """Of all layers and directions, whose parameters are listed one after another."""
        names = Weights.names(cell, bias)
        found = []
        for k in range(0, len(flat), len(names)):
            by_name = dict(zip(names, flat[k : k + len(names)], strict=True))
            vectors = tuple(by_name[name] for name in cell.params)
            biases = by_name.get("bias_ih"), by_name.get("bias_hh")
            found.append(
                Weights(by_name["weight_ih"], by_name["weight_hh"], *biases, vectors, by_name.get("weight_fh"))
            )
        return found
