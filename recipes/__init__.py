"""What to do with conversions and patches: uptrain, evaluate, report, whole pipelines.

::

    from rehead.recipes import evaluate, run_recipe, uptrain, write_report

    uptrain("llama-2-7b-gqa8", "llama-2-7b-gqa8-uptrained", data=["corpus.jsonl"], tokens=8_000_000)
    evaluate("llama-2-7b-gqa8-uptrained", baseline="meta-llama/Llama-2-7b-hf", data=["heldout.txt"])
    run_recipe("demo")  # convert -> uptrain -> evaluate -> report
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "uptrain": "rehead.recipes.training",
    "evaluate": "rehead.recipes.evaluation",
    "run_recipe": "rehead.recipes.pipeline.run",
    "write_report": "rehead.recipes.report",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Load a function on first use, so that listing commands never imports torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rehead.recipes' has no attribute {name!r}")
