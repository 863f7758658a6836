"""An evaluation on the terminal: the verdict in words, then the figures that it rests on.

Words, cells and headings are the report's, so that the two never disagree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rehead.console import rich_console
from rehead.recipes.evaluation_schema import Evaluation
from rehead.recipes.report import tables
from rehead.recipes.report.facts import Entry, summarise
from rehead.recipes.report.verdict import verdict
from rehead.recipes.report.wording import bytes_of, count, figure, heads, percent, times

#: A terminal shows the layers that matter; the report shows all.
_WORST_LAYERS = 5
#: Report tables that are short enough for a terminal as they are.
_WHOLE = ("needle", "recall", "tasks", "speed", "gates")
_ORDER = ("baseline", "control", "model")


def show(found: Evaluation, report: str | None = None, console: Console | None = None) -> None:
    """Print a summary that a person can decide from.

    Args:
        found: the evaluation.
        report: path of the report, to be named last.
        console: where to; standard output by default.
    """
    # What goes to a file or a pipe is read later, at any width.
    console = console or rich_console(width=None if sys.stdout.isatty() else 160)
    entry = Entry(Path(found.model.name).name or found.model.name, found)
    for line in verdict([summarise(entry)]).lines():
        console.print(escape(line), soft_wrap=True)
    console.print(_models(found))
    if found.perplexity:
        console.print(_quality(found))
    if found.damage:
        console.print(_damage(found))
    for table in tables.details(entry):
        if table.name in _WHOLE:
            console.print(_drawn(table))
    conditions = found.conditions
    texts = ", ".join(f"{text.name} ({count(text.tokens)} tokens)" for text in conditions.data)
    lines = [f"{conditions.device}, {conditions.dtype}, attention {conditions.attention}", texts, *found.notes]
    lines += [f"report: {report}"] if report else []
    for line in filter(None, lines):
        console.print(escape(line), soft_wrap=True)


def _models(found: Evaluation) -> Table:
    context = summarise(Entry("", found)).context
    sizes = {row.who: row.bytes_at(context) for row in found.kv_cache}
    table = _table(["", "name", "parameters", "KV heads", "KV per token", f"KV at {count(context)}"], left=2)
    table.title = "Models"
    facts = found.facts()
    for who in _ORDER:
        if who in facts:
            one = facts[who]  # type: ignore[index]
            table.add_row(who, escape(one.name), count(one.parameters), heads(one.num_key_value_heads),
                          bytes_of(one.kv_bytes_per_token), bytes_of(sizes.get(who)))  # fmt: skip
    return table


def _quality(found: Evaluation) -> Table:
    """A row for each text and model; a pair of columns for each convention."""
    conventions = list(dict.fromkeys(row.convention for row in found.perplexity))
    head = ["text", "of"]
    for name in conventions:
        shown = tables.named(next(row for row in found.perplexity if row.convention == name))
        head += [shown, "×"] if found.baseline else [shown]
    head += ["KL", "KL 99%", "top-1"] if found.divergence else []
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found.perplexity:
        cells.setdefault((row.data, row.who), {})[row.convention] = row
    distances: dict[tuple[str, str], Any] = {(row.data, row.who): row for row in found.divergence}
    table = _table(head, left=2)
    table.title = "Perplexity by convention" + (", × the baseline's; KL in nats per token" if found.divergence else "")
    for data in dict.fromkeys(row.data for row in found.perplexity):
        for who in _ORDER:
            if (data, who) not in cells:
                continue
            line = [escape(Path(data).name), who]
            for name in conventions:
                one = cells[data, who].get(name)
                line.append(figure(one.value if one else None))
                if found.baseline:
                    line.append(times(one.ratio.value if one and one.ratio else None))
            if found.divergence:
                distance = distances.get((data, who))
                line += (
                    [figure(distance.mean), figure(distance.p99), percent(distance.top1_agreement)]
                    if distance
                    else ["–", "–", "–"]
                )
            table.add_row(*line)
    return table


def _damage(found: Evaluation) -> Table:
    worst = sorted(found.damage, key=lambda row: row.kl, reverse=True)[:_WORST_LAYERS]
    table = _table(["layer alone in the baseline", "KL", "top-1"], left=1)
    for row in worst:
        table.add_row(str(row.layer), figure(row.kl), percent(row.top1_agreement))
    rest = len(found.damage) - len(worst)
    if rest:
        table.add_row(f"mean of all {len(found.damage)}", figure(sum(r.kl for r in found.damage) / len(found.damage)),
                      percent(sum(r.top1_agreement for r in found.damage) / len(found.damage)))  # fmt: skip
    return table


def _drawn(source: tables.Table) -> Table:
    """A report's table for the terminal."""
    table = _table(source.head, left=1)
    table.title = source.title
    for row in source.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _table(head: list[str], left: int) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left", header_style="bold", title_style="bold")
    for at, name in enumerate(head):
        table.add_column(escape(name), justify="left" if at < left else "right", overflow="fold")
    return table
