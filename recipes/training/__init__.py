"""Uptraining: the short training after a conversion that wins the loss back."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "uptrain": "rehead.recipes.training.run",
    "Uptraining": "rehead.recipes.training.run",
    "UptrainOptions": "rehead.recipes.training.options",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Load a name on first use, so that the command line starts without torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rehead.recipes.training' has no attribute {name!r}")
