"""Records: NamedTuples of tensors and options that travel together, and their flat form.

autograd.Function, torch's operators and torch.vmap take flat arguments alone. flatten() makes them of a record and
unflatten() makes the record of them again; nobody else counts places.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

Record = TypeVar("Record", bound=tuple)

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[bool]: "bool[]",
    bool: "bool",
    int: "SymInt",
}
# Of each field of a record: None for a tensor or an option; the record that it is; or (record,) for a tuple of them.
_PARTS: dict[type, list[Any]] = {}


def record(cls: type[Record]) -> type[Record]:
    """Makes a NamedTuple known here. Its fields are tensors, options, records, or tuple[..., ...] of one record."""
    parts: list[Any] = []
    for kind in get_type_hints(cls).values():
        if get_origin(kind) is tuple:
            parts.append((get_args(kind)[0],))
        else:
            parts.append(kind if kind in _PARTS else None)
    _PARTS[cls] = parts
    return cls


def flatten(values: tuple[Any, ...]) -> list[Any]:
    """The tensors and options of a record, of those within it, too."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            flat += flatten(value)
        else:
            flat.append(value)
    return flat


def unflatten(cls: type[Record], flat: Iterable[Any]) -> Record:
    """The record that flatten() has made `flat` of. Its tuples of records, if it has several, are of one length."""
    flat = list(flat)
    alone, in_each = _count(cls)
    return _build(cls, iter(flat), (len(flat) - alone) // in_each if in_each else 0)


def schema(cls: type) -> str:
    """A record's fields as the arguments of a torch operator: "Tensor x, Tensor? lengths, bool reverse"."""
    fields = zip(get_type_hints(cls).items(), _PARTS[cls], strict=True)
    return ", ".join(schema(part) if part else f"{_SCHEMA[kind]} {name}" for (name, kind), part in fields)


def save(ctx: Any, values: tuple[Any, ...]) -> None:
    """Keeps a record for backward."""
    flat = flatten(values)
    ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in flat])
    ctx.options = [None if isinstance(value, Tensor) else value for value in flat]


def saved(ctx: Any, cls: type[Record]) -> Record:
    """The record that save() has kept. To be asked for once: under a checkpoint each look unpacks."""
    pairs = zip(ctx.saved_tensors, ctx.options, strict=True)
    return unflatten(cls, [option if tensor is None else tensor for tensor, option in pairs])


def _count(cls: type) -> tuple[int, int]:
    """How many values a record has beside its tuples of records, and how many with one record in each of these."""
    alone = in_each = 0
    for part in _PARTS[cls]:
        if part is None:
            alone += 1
        elif isinstance(part, tuple):
            in_each += _count(part[0])[0]
        else:
            within = _count(part)
            alone, in_each = alone + within[0], in_each + within[1]
    return alone, in_each


def _build(cls: type[Record], values: Iterator[Any], repeats: int) -> Record:
    fields: list[Any] = []
    for part in _PARTS[cls]:
        if part is None:
            fields.append(next(values))
        elif isinstance(part, tuple):
            fields.append(tuple([_build(part[0], values, 0) for _ in range(repeats)]))
        else:
            fields.append(_build(part, values, repeats))
    return cls(*fields)
