"""Writing a report: HTML, Markdown and JSON of the same figures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import write_file
from rehead.recipes.evaluation_schema import Evaluation
from rehead.recipes.report import tables
from rehead.recipes.report.facts import Entry, Summary, Training, as_entries, read_training, summarise
from rehead.recipes.report.samples import NOTE, sample_cards
from rehead.recipes.report.verdict import Verdict, final, verdict
from rehead.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class ReportPaths:
    """Where a report was written, and what it opens with."""

    html: Path
    markdown: Path
    json: Path
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "html": str(self.html),
            "markdown": str(self.markdown),
            "json": str(self.json),
            "verdict": dataclasses.asdict(self.verdict),
        }


def write_report(
    out: str | os.PathLike[str],
    evaluations: Sequence[Entry | tuple[str, Evaluation]],
    trainings: Sequence[tuple[str, str | os.PathLike[str]]] = (),
    title: str = "Evaluation",
    notes: Sequence[str] = (),
) -> ReportPaths:
    """Write ``report.html``, ``report.md`` and ``report.json`` into a folder.

    Args:
        out: the folder; made where it is missing, and the three files in it replaced.
        evaluations: what was found of each model, under the label that the report calls it by. :class:`Entry` also
            says which curve a model belongs to and whether it stands before or after its uptraining.
        trainings: label and training log (the JSONL file, or the folder it lies in) of each uptraining.
        title: the report's heading.
        notes: lines to stand under the verdict, e.g. what is missing.

    Returns:
        The paths and the verdict.

    Raises:
        UsageError: there is no evaluation, two have one label, or a training log cannot be read.
        ResourceError: the disk is full or fails; what was there stays.
    """
    from rehead.recipes.report.html import html
    from rehead.recipes.report.markdown import markdown
    from rehead.recipes.report.plots import draw_all

    summaries = [summarise(entry) for entry in as_entries(evaluations)]
    runs = [read_training(label, Path(log)) for label, log in trainings]
    said = verdict(summaries)
    cards = sample_cards(final(summaries))
    overview, conditions = tables.overview(summaries), tables.conditions(summaries, runs)
    caveats, details = tables.caveats(summaries), [(s.name, tables.details(s.entry)) for s in summaries]
    failed = any(not gate.passed for s in summaries for gate in s.entry.evaluation.gates)
    page = html(
        title=title, verdict=said, failed=failed, notes=list(notes), overview=overview, conditions=conditions,
        caveats=caveats, details=details, plots=draw_all(summaries, runs), samples=cards, samples_note=NOTE,
    )  # fmt: skip
    text = markdown(title, said, list(notes), overview, cards, conditions, caveats, details)
    folder = Path(out)
    paths = ReportPaths(folder / "report.html", folder / "report.md", folder / "report.json", said)
    write_file(paths.json, json.dumps(_table(title, said, summaries, runs, notes, caveats), indent=1) + "\n")
    write_file(paths.markdown, text)
    write_file(paths.html, page)
    return paths


def _table(
    title: str,
    said: Verdict,
    summaries: list[Summary],
    runs: list[Training],
    notes: Sequence[str],
    caveats: list[str],
) -> dict[str, Any]:
    """The report for machines."""
    return {
        "format": FORMAT,
        "tool": {"name": "rehead", "version": __version__},
        "title": title,
        "verdict": dataclasses.asdict(said),
        "notes": list(notes),
        "caveats": caveats,
        "entries": [
            {
                "label": s.name,
                "series": s.entry.series,
                "stage": s.entry.stage,
                "kv_bytes_per_token": s.kv_bytes_per_token,
                "context": s.context,
                "kv_bytes": s.kv_bytes,
                "kv_saving": s.saving,
                "verdict": s.verdict,
                "texts": [dataclasses.asdict(text) for text in s.texts],
                "speed": [dataclasses.asdict(item) for item in s.speed],
                "evaluation": s.entry.evaluation.as_json(),
            }
            for s in summaries
        ],
        "trainings": [dataclasses.asdict(run) for run in runs],
    }
