"""Uptraining: the short training after a conversion that wins the loss back."""

from __future__ import annotations

from rehead.lazy import exports

_EXPORTS = {
    "uptrain": "rehead.recipes.training.run",
    "Uptraining": "rehead.recipes.training.run",
    "UptrainOptions": "rehead.recipes.training.options",
}

__all__ = list(_EXPORTS)
__getattr__ = exports(__name__, _EXPORTS)
