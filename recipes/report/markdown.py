"""The report in Markdown, for a model card."""

from __future__ import annotations

from rehead.checkpoints.markdown import plain
from rehead.recipes.report.samples import NOTE, SampleCard
from rehead.recipes.report.tables import Table
from rehead.recipes.report.verdict import Verdict
from rehead.version import __version__


def markdown(
    title: str,
    verdict: Verdict,
    notes: list[str],
    overview: Table,
    samples: list[SampleCard],
    conditions: Table,
    caveats: list[str],
    details: list[tuple[str, list[Table]]],
) -> str:
    """The page as GitHub and the Hub show it; everything that comes from names is escaped."""
    lines = [f"# {plain(title)}", "", f"**{plain(verdict.headline)}**", ""]
    lines += [f"- {f'**{plain(name)}**: ' if name else ''}{plain(text)}" for name, text in verdict.points]
    for note in notes:
        lines += ["", plain(note)]
    lines += ["", *table(overview, 2), *_samples(samples), *table(conditions, 2)]
    if caveats:
        lines += ["## Caveats", "", *(f"- {plain(line)}" for line in caveats), ""]
    for name, tables in details:
        lines += [f"## {plain(name)}", ""]
        for item in tables:
            lines += table(item, 3)
    return "\n".join([*lines, f"Made by Rehead {__version__}.", ""])


def _samples(cards: list[SampleCard]) -> list[str]:
    """Continuations as lists; what the original writes too is bold."""
    lines = ["## What they write", ""] if cards else []
    for card in cards:
        lines += [f"{plain(card.where)}:", "", f"> {plain(card.prompt)} …", ""]
        for line in card.lines:
            same, rest = plain(line.same), plain(line.rest)
            bold = f"**{same}**" if same and line.note else same
            lines.append(f"- {plain(line.name)}: {' '.join(filter(None, (bold, rest)))}")
        lines.append("")
    return [*lines, plain(NOTE.replace("Underlined", "Bold")), ""] if cards else []


def table(item: Table, level: int) -> list[str]:
    """A table with its heading."""
    head = [plain(cell) for cell in item.head]
    lines = [f"{'#' * level} {plain(item.title)}", ""]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(plain(cell) for cell in row)} |" for row in item.rows]
    lines += ["", plain(item.note), ""] if item.note else [""]
    return lines
