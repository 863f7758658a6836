"""Make operator schemas from the dataclass of a call, so that its fields are listed in one place.

A field that may be a number or a tensor (``int | Tensor``) takes two arguments, the second named ``NAME_tensor``. A
field that is a record takes the arguments of that record's fields, named ``NAME_FIELD`` and all optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from torch import Tensor

KINDS = {Tensor: "Tensor", float: "float", bool: "bool", int: "SymInt"}

T = TypeVar("T")


class Flat(Generic[T]):
    """Converts a dataclass to an operator's flat arguments and back.

    Args:
        record: a dataclass whose fields are ``Tensor``, ``float``, ``bool``, ``int``, ``int | Tensor`` or such a
            dataclass, each perhaps ``| None``.
    """

    def __init__(self, record: type[T]) -> None:
        self.record = record
        self.arguments: list[tuple[str, str]] = []  # (type, name), in order
        # (name, the record that it is, whether it takes two arguments, the number beside a tensor)
        self._fields: list[tuple[str, Flat | None, bool, int | None]] = []
        hints = get_type_hints(record)
        for field in fields(record):  # type: ignore[arg-type]
            options = get_args(hints[field.name]) or (hints[field.name],)
            kinds, optional = [o for o in options if o is not type(None)], "?" * (type(None) in options)
            inner: Flat | None = Flat(kinds[0]) if is_dataclass(kinds[0]) else None  # type: ignore[arg-type]
            self._fields.append((field.name, inner, len(kinds) > 1, None if optional else 0))
            if inner is not None:
                self.arguments += [(kind.rstrip("?") + "?", f"{field.name}_{name}") for kind, name in inner.arguments]
                continue
            self.arguments.append((KINDS[kinds[0]] + optional, field.name))
            if len(kinds) > 1:
                self.arguments.append(("Tensor?", f"{field.name}_tensor"))

    def schema(self, first: str, returns: str) -> str:
        """The ``torch.library`` schema of an operator whose arguments are ``first`` (schema text) and the record."""
        listed = [f"{kind} {name}" for kind, name in self.arguments]
        return f"({', '.join([first, *listed] if first else listed)}) -> {returns}"

    def names(self) -> list[str]:
        """The arguments' names in order."""
        return [name for _, name in self.arguments]

    def flatten(self, record: T) -> list[Any]:
        """A record as the operator's arguments."""
        values: list[Any] = []
        for name, inner, two, number in self._fields:
            value = getattr(record, name)
            if inner is not None:
                values += [None] * len(inner.arguments) if value is None else inner.flatten(value)
            elif not two:
                values.append(value)
            elif isinstance(value, Tensor):
                values += [number, value]
            else:
                values += [value, None]
        return values

    def unflatten(self, values: Any) -> T:
        """The record from the operator's arguments; the inverse of :meth:`flatten`."""
        items, rest = {}, iter(values)
        for name, inner, two, _ in self._fields:
            if inner is not None:
                parts = [next(rest) for _ in inner.arguments]
                items[name] = None if parts[0] is None else inner.unflatten(parts)
                continue
            items[name] = next(rest)
            if two and (tensor := next(rest)) is not None:
                items[name] = tensor
        return self.record(**items)

    @staticmethod
    def save(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        """``setup_context`` of an operator whose arguments are the record alone: keeps its outputs and its inputs."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *(item for item in inputs if isinstance(item, Tensor)))
        ctx.plain = [None if isinstance(item, Tensor) else item for item in inputs]
        ctx.places = [place for place, item in enumerate(inputs) if isinstance(item, Tensor)]

    @staticmethod
    def saved(ctx: Any, outputs: int) -> tuple[list[Tensor], list[Any]]:
        """What :meth:`save` kept: so many outputs, and the inputs in order."""
        tensors = ctx.saved_tensors
        inputs = list(ctx.plain)
        for place, tensor in zip(ctx.places, tensors[outputs:], strict=True):
            inputs[place] = tensor
        return list(tensors[:outputs]), inputs
