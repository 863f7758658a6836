"""Tables of things registered by name; those that ship with Rehead are imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Generic, TypeVar

from rehead.errors import UsageError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind: those that ship and those that a user adds.

    Args:
        kind: what they are called in messages, e.g. ``"method"``.
        modules: name -> module that registers it when imported. Naming them imports nothing.
    """

    def __init__(self, kind: str, modules: Mapping[str, str]) -> None:
        self.kind = kind
        self._modules = dict(modules)
        self._known: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Register ``thing``.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._known:
            raise ValueError(f"a {self.kind} named {name!r} is registered already; choose another name")
        self._known[name] = thing

    def remove(self, name: str) -> None:
        """Remove ``name`` if it is registered."""
        self._known.pop(name, None)

    def names(self) -> list[str]:
        """Every known name: first those that ship, then those that a user added."""
        return [*self._modules, *(name for name in self._known if name not in self._modules)]

    def get(self, name: str) -> T:
        """What is registered as ``name``.

        Raises:
            UsageError: nothing is; the nearest name is suggested.
        """
        if name not in self._known and name in self._modules:
            import_module(self._modules[name])
        if name not in self._known:
            raise UsageError(unknown_name(self.kind, name, self.names()))
        return self._known[name]
