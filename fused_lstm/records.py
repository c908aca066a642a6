"""Records: NamedTuples of tensors and options that travel together, and their flat form.

autograd.Function, torch's operators and torch.vmap take flat arguments alone. flatten() makes them of a record and
unflatten() makes the record of them again; nobody else counts places.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Record = TypeVar("Record", bound=tuple)

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    list[bool]: "bool[]",
    bool: "bool",
    str: "str",
    int: "SymInt",
}


class Part(NamedTuple):
    """What a field of a record is.

    of: the record that it is, or has a tuple of; None for a tensor or an option. repeated: it is a tuple of records
        that have none within them. is_tensor: declared as one, or None.
    """

    of: Any
    repeated: bool
    is_tensor: bool


class Piece(NamedTuple):
    """Fields of a record that unflatten() makes at once: a record or a tuple of them as in Part, or several others.

    plain: so many values, of a record with none within it or of several others; otherwise 0.
    """

    of: Any
    repeated: bool
    plain: int


PARTS: dict[type, list[Part]] = {}
PIECES: dict[type, list[Piece]] = {}
_PLAIN: set[type] = set()  # those with no record within
# How many values a record has beside its tuples of records, and how many with one record in each of these.
COUNTS: dict[type, tuple[int, int]] = {}


def record(cls: type[Record]) -> type[Record]:
    """Makes a NamedTuple known here. Its fields are tensors, options, records, or tuple[..., ...] of one record."""
    parts: list[Part] = []
    for kind in get_type_hints(cls).values():
        repeated = get_origin(kind) is tuple
        of: Any = get_args(kind)[0] if repeated else kind
        of = of if of in PARTS else None
        parts.append(Part(of, repeated, _SCHEMA.get(kind) in ("Tensor", "Tensor?")))
    PARTS[cls], PIECES[cls] = parts, []
    for of, repeated, _ in parts:
        plain = len(PARTS[of]) if of in _PLAIN else int(of is None)
        if of is None and PIECES[cls] and PIECES[cls][-1].of is None:
            plain += PIECES[cls].pop().plain
        PIECES[cls].append(Piece(of, repeated, plain))
    if all(part.of is None for part in parts):
        _PLAIN.add(cls)
    fixed = [1 if part.of is None else COUNTS[part.of][0] for part in parts if not part.repeated]
    per_repeat = [COUNTS[part.of][part.repeated ^ 1] for part in parts if part.of is not None]
    COUNTS[cls] = sum(fixed), sum(per_repeat)
    return cls


def flatten(values: tuple[Any, ...]) -> list[Any]:
    """The tensors and options of a record, of those within it, too."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            flat.extend(value if type(value) in _PLAIN else flatten(value))
        else:
            flat.append(value)
    return flat


def unflatten(cls: type[Record], flat: Sequence[Any]) -> Record:
    """The record that flatten() has made `flat` of. Its tuples of records, if it has several, are of one length."""
    fixed, per_repeat = COUNTS[cls]
    return _build(cls, flat, 0, (len(flat) - fixed) // per_repeat if per_repeat else 0)[0]


def schema(cls: type) -> str:
    """A record's fields as the arguments of a torch operator: "Tensor x, Tensor? lengths, bool reverse"."""
    fields = zip(get_type_hints(cls).items(), PARTS[cls], strict=True)
    return ", ".join(schema(part.of) if part.of else f"{_SCHEMA[kind]} {name}" for (name, kind), part in fields)


def save_record(ctx: Any, values: tuple[Any, ...]) -> None:
    """Keeps a record for backward."""
    flat = flatten(values)
    indices = _tensor_indices(type(values), len(flat))
    ctx.save_for_backward(*[flat[k] for k in indices])
    for k in indices:
        flat[k] = None
    ctx.options = flat


def saved_record(ctx: Any, cls: type[Record]) -> Record:
    """The record that save_record() has kept. To be asked for once: under a checkpoint each look unpacks."""
    flat = list(ctx.options)
    for k, tensor in zip(_tensor_indices(cls, len(flat)), ctx.saved_tensors, strict=True):
        flat[k] = tensor
    return unflatten(cls, flat)


def _tensor_indices(cls: type, length: int) -> list[int]:
    """Which values of a flat record of so many are declared as tensors."""
    # The compiler would guard what has been found before, and compile anew once more has been.
    compiled = torch.compiler.is_compiling()
    known = None if compiled else _TENSOR_INDICES.get((cls, length))
    if known is None:
        record: Any = unflatten(cls, [None] * length)
        known, at = [], 0
        for part, field in zip(PARTS[cls], record, strict=True):
            if part.of is None:
                known += [at] if part.is_tensor else []
                at += 1
                continue
            for within in field if part.repeated else [field]:
                size = len(flatten(within))
                known += [at + index for index in _tensor_indices(part.of, size)]
                at += size
        if not compiled:
            _TENSOR_INDICES[cls, length] = known
    return known


_TENSOR_INDICES: dict[tuple[type, int], list[int]] = {}


def _build(cls: type[Record], flat: Sequence[Any], at: int, repeats: int) -> tuple[Record, int]:
    """The record whose values begin at flat[at], and where they end."""
    fields: list[Any] = []
    for of, repeated, plain in PIECES[cls]:
        if of is None:
            fields += flat[at : at + plain]
            at += plain
        elif repeated:
            end = at + repeats * plain
            fields.append(tuple([of(*flat[k : k + plain]) for k in range(at, end, plain)]))
            at = end
        elif plain:
            fields.append(of(*flat[at : at + plain]))
            at += plain
        else:
            within, at = _build(of, flat, at, repeats)
            fields.append(within)
    return cls(*fields), at
