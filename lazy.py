"""Load a package's names on first use, so that listing commands never imports torch (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


def exports(package: str, names: Mapping[str, str], parts: Sequence[str] = ()) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` for a package; ``dir()`` of the package lists the names too.

    Args:
        package: the package's ``__name__``.
        names: public name -> module that defines it.
        parts: submodules that are public names too.
    """
    module = sys.modules[package]

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in names:
            return getattr(import_module(names[name]), name)
        if name in parts:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    module.__dir__ = lambda: sorted({*vars(module), *names, *parts})  # type: ignore[method-assign]
    return __getattr__


class _Late(ModuleType):
    """A module that is imported when one of its names is first read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def late(name: str) -> Any:
    """A module that takes long to import, for code that need not always use it: imported on first use."""
    return sys.modules.get(name) or _Late(name)
