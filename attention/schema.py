"""Operator schemas made from the record that holds a call's options, so that those are listed in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

from torch import Tensor

KINDS = {Tensor: "Tensor", float: "float", bool: "bool", int: "SymInt"}


def schema(tensors: str, record: type, returns: str) -> str:
    """The ``torch.library`` schema of an operator that takes ``tensors`` and then the fields of ``record`` in order.

    Args:
        tensors: the arguments that come first, as a schema writes them: ``"Tensor query, Tensor? sinks"``.
        record: a dataclass whose fields are ``Tensor``, ``float``, ``bool`` or ``int``, each perhaps ``| None``.
        returns: what follows the arrow: ``"Tensor"`` or ``"(Tensor, Tensor)"``.
    """
    hints = get_type_hints(record)
    options = [f"{_kind(hints[field.name])} {field.name}" for field in fields(record)]
    return f"({', '.join([tensors, *options])}) -> {returns}"


def _kind(hint: Any) -> str:
    options = get_args(hint)
    if not options:
        return KINDS[hint]
    (kind,) = (item for item in options if item is not type(None))
    return f"{KINDS[kind]}?"
