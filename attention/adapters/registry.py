"""The table of adapters, and how one is set on a module."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from rehead.models.undo import UndoLog

Adapter = Callable[[nn.Module], dict[str, Any]]

ADAPTERS: dict[str, Adapter] = {}


def qualified(cls: type) -> str:
    """``bloom.BloomAttention`` for ``transformers.models.bloom.modeling_bloom.BloomAttention``."""
    parts = cls.__module__.split(".")
    family = parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else cls.__module__
    return f"{family}.{cls.__qualname__}"


def register_adapter(*classes: str) -> Callable[[Adapter], Adapter]:
    """A decorator that registers an adapter for classes, named as by :func:`qualified`.

    Raises:
        ValueError: a class has an adapter already.
    """

    def add(adapter: Adapter) -> Adapter:
        for name in classes:
            if name in ADAPTERS:
                raise ValueError(f"{name} already has an adapter")
            ADAPTERS[name] = adapter
        return adapter

    return add


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a module's class, or None."""
    return ADAPTERS.get(qualified(type(module)))


def adapt(module: nn.Module, undo: UndoLog) -> None:
    """Set an adapter's methods on one module instance."""
    adapter = adapter_for(module)
    assert adapter is not None
    for name, value in adapter(module).items():
        bound = types.MethodType(value, module) if isinstance(value, types.FunctionType) else value
        undo.set_attribute(module, name, bound)
