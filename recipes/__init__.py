"""What to do with conversions and patches: uptrain, evaluate, report, whole pipelines.

::

    from rehead.recipes import evaluate, run_recipe, uptrain, write_report

    uptrain("llama-2-7b-gqa8", "llama-2-7b-gqa8-uptrained", data=["corpus.jsonl"], tokens=8_000_000)
    evaluate("llama-2-7b-gqa8-uptrained", baseline="meta-llama/Llama-2-7b-hf", data=["heldout.txt"])
    run_recipe("demo")  # convert -> uptrain -> evaluate -> report
"""

from __future__ import annotations

from rehead.lazy import exports

_EXPORTS = {
    "uptrain": "rehead.recipes.training",
    "evaluate": "rehead.recipes.evaluation",
    "run_recipe": "rehead.recipes.pipeline.run",
    "write_report": "rehead.recipes.report",
}

__all__ = list(_EXPORTS)
__getattr__ = exports(__name__, _EXPORTS)
