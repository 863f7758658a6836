"""Evaluation: perplexity, divergence from the baseline, damage by layer, retrieval, tasks, cache size and speed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "evaluate": "rehead.recipes.evaluation.run",
    "Evaluation": "rehead.recipes.evaluation.schema",
    "EvaluateOptions": "rehead.recipes.evaluation.options",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Load a name on first use, so that the command line starts without torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rehead.recipes.evaluation' has no attribute {name!r}")
