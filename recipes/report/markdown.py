"""The report in Markdown, for a model card."""

from __future__ import annotations

import re

from rehead.recipes.report.tables import Table
from rehead.recipes.report.verdict import Verdict
from rehead.version import __version__


def markdown(
    title: str,
    verdict: Verdict,
    notes: list[str],
    overview: Table,
    conditions: Table,
    caveats: list[str],
    details: list[tuple[str, list[Table]]],
) -> str:
    """The page as GitHub and the Hub show it; everything that comes from names is escaped."""
    lines = [f"# {escape(title)}", "", f"**{escape(verdict.headline)}**", ""]
    lines += [f"- {f'**{escape(name)}**: ' if name else ''}{escape(text)}" for name, text in verdict.points]
    for note in notes:
        lines += ["", escape(note)]
    lines += ["", *table(overview, 2), *table(conditions, 2)]
    if caveats:
        lines += ["## Caveats", "", *(f"- {escape(line)}" for line in caveats), ""]
    for name, tables in details:
        lines += [f"## {escape(name)}", ""]
        for item in tables:
            lines += table(item, 3)
    return "\n".join([*lines, f"Made by Rehead {__version__}.", ""])


def table(item: Table, level: int) -> list[str]:
    """A table with its heading."""
    head = [escape(cell) for cell in item.head]
    lines = [f"{'#' * level} {escape(item.title)}", ""]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(escape(cell) for cell in row)} |" for row in item.rows]
    lines += ["", escape(item.note), ""] if item.note else [""]
    return lines


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no table cells, no emphasis or links of its own."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", text)
