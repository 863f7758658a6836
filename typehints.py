"""What the type of a field says: the types inside it, its alternatives, the values that it accepts."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal, Union


def leaves(annotation: Any) -> set[Any]:
    """Every type named in an annotation, including those inside unions, tuples and mappings."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (Annotated, Literal):
        parts = parts[:1] if typing.get_origin(annotation) is Annotated else ()
    return {kind for part in parts for kind in leaves(part)} if parts else {annotation}


def alternatives(annotation: Any) -> list[Any]:
    """The types of a union, each without its annotations; a list of one for any other type."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for each in typing.get_args(annotation) for kind in alternatives(each)]
    return [annotation]


def is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def choices(annotation: Any) -> list[str]:
    """The values that a ``Literal`` annotation accepts, as text."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return list(map(str, parts))
    return [name for part in parts for name in choices(part)]
