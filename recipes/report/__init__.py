"""Reports that a person can decide from: one self-contained HTML file, the same in Markdown, the same in JSON."""

from __future__ import annotations

from rehead.lazy import exports

_EXPORTS = {
    "Entry": "rehead.recipes.report.facts",
    "ReportPaths": "rehead.recipes.report.write",
    "write_report": "rehead.recipes.report.write",
}

__all__ = list(_EXPORTS)
__getattr__ = exports(__name__, _EXPORTS)
