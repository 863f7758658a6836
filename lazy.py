"""Names of a package that are loaded on first use, so that listing commands never imports torch (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` for a package.

    Args:
        package: the package's ``__name__``.
        names: public name -> module that defines it.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in names:
            return getattr(import_module(names[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
