"""Reports that a person can decide from: one self-contained HTML file, the same in Markdown, the same in JSON."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Entry": "rehead.recipes.report.facts",
    "ReportPaths": "rehead.recipes.report.write",
    "write_report": "rehead.recipes.report.write",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Load a function on first use."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rehead.recipes.report' has no attribute {name!r}")
