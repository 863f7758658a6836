"""Make operator schemas from the dataclass of a call, so that its fields are listed in one place.

A field that may be a number or a tensor (``int | Tensor``) takes two arguments, the second named ``NAME_tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from torch import Tensor

KINDS = {Tensor: "Tensor", float: "float", bool: "bool", int: "SymInt"}

T = TypeVar("T")


class Flat(Generic[T]):
    """Converts a dataclass to an operator's flat arguments and back.

    Args:
        record: a dataclass whose fields are ``Tensor``, ``float``, ``bool``, ``int`` or ``int | Tensor``, each perhaps
            ``| None``.
    """

    def __init__(self, record: type[T]) -> None:
        self.record = record
        self.arguments: list[tuple[str, str]] = []  # (type, name), in order
        self._fields: list[
            tuple[str, bool, int | None]
        ] = []  # (name, whether it takes two, the number beside a tensor)
        hints = get_type_hints(record)
        for field in fields(record):  # type: ignore[arg-type]
            options = get_args(hints[field.name]) or (hints[field.name],)
            kinds, optional = [o for o in options if o is not type(None)], "?" * (type(None) in options)
            self._fields.append((field.name, len(kinds) > 1, None if optional else 0))
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
        for name, two, number in self._fields:
            value = getattr(record, name)
            if not two:
                values.append(value)
            elif isinstance(value, Tensor):
                values += [number, value]
            else:
                values += [value, None]
        return values

    def unflatten(self, values: Any) -> T:
        """The record from the operator's arguments; the inverse of :meth:`flatten`."""
        items, rest = {}, iter(values)
        for name, two, _ in self._fields:
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
