"""Evaluation: perplexity, divergence from the baseline, damage by layer, retrieval, tasks, cache size and speed."""

from __future__ import annotations

from rehead.lazy import exports

_EXPORTS = {
    "evaluate": "rehead.recipes.evaluation.run",
    "Evaluation": "rehead.recipes.evaluation_schema",
    "EvaluateOptions": "rehead.recipes.evaluation.options",
}

__all__ = list(_EXPORTS)
__getattr__ = exports(__name__, _EXPORTS)
