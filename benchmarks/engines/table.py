"""The recorded runs in Markdown: every run for the engines' own page, counts alone for README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rehead.models.serving import DIFFERENT, REFUSED, SAME

Runs = list[tuple[dict[str, Any], dict[str, Any]]]


def table(results: dict[str, Any]) -> str:
    """One line for each small model, one column for each engine; counts, notes and reasons below."""
    engines = by_engine(results)
    lines = [
        "| class | model | attention | cache, bytes per token | " + " | ".join(engines) + " |",
        "| --- " * (len(engines) + 4) + "|",
    ]
    for row in results["rows"]:
        cells = [_cell(row, next((run for run in row["runs"] if run["engine"] == name), None)) for name in engines]
        size = f"{row['transformers_cache_bytes_per_token']:,.0f}"
        lines.append(f"| {row['model_type']} | {row['case']} | {_kind(row)} | {size} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", digest(results), "", *reasons(results)])


def by_engine(results: dict[str, Any]) -> dict[str, Runs]:
    """(row, run) for each engine."""
    engines: dict[str, Runs] = {}
    for row in results["rows"]:
        for run in row["runs"]:
            engines.setdefault(run["engine"], []).append((row, run))
    return engines


def digest(results: dict[str, Any]) -> str:
    """One line for each engine: its version, and how many of the models that it was given it serves."""
    lines = ["| engine | version | models | same tokens | wrong | refused |", "| --- " * 2 + "| --: " * 4 + "|"]
    for name, runs in by_engine(results).items():
        outcomes = [run["outcome"] for _, run in runs]
        numbers = [len(runs), *(outcomes.count(kind) for kind in (SAME, DIFFERENT, REFUSED))]
        lines.append(f"| {name} | {runs[-1][1]['version']} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def reasons(results: dict[str, Any]) -> list[str]:
    """What engines said when they refused, and what clients had to do, each once with the models that it is true of."""
    lines = []
    for name, runs in by_engine(results).items():
        cases: dict[str, list[str]] = {}
        for row, run in runs:
            for note in run["notes"]:
                cases.setdefault(note, []).append(row["case"])
        taken = [row["case"] for row, run in runs if run["outcome"] != REFUSED]
        for note, names in cases.items():
            which = "all" if names == taken else ", ".join(names)
            lines.append(f"- {name}: {_plain(note)} ({which})")
    return lines


def put(text: str, page: Path, mark: str = "engines") -> None:
    """Replace what stands between the page's two marks, ``<!-- engines -->`` and ``<!-- /engines -->``."""
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = page.read_text().partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}{text}\n{end}{after}")


def _kind(row: dict[str, Any]) -> str:
    facts = row["facts"]
    return ", ".join(str(facts[key]) for key in ("attention", "activation") if facts[key])


def _cell(row: dict[str, Any], run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    if run["outcome"] == REFUSED:
        return "refused"
    text = f"{run['tokens']}/{run['of']}"
    if run["logprob_difference"] is not None:
        text += f", {run['logprob_difference']:.0e}"
    size = run["cache_bytes_per_token"]
    # llama.cpp reports two decimals of a MiB.
    if size is not None and abs(size / row["transformers_cache_bytes_per_token"] - 1) > 0.02:
        text += f", {size:,.0f} bytes"
    return text if run["outcome"] == SAME else f"**wrong** {text}"


def _plain(note: str) -> str:
    """An engine's words as text: no table, link or tag comes of them."""
    return "".join(f"\\{letter}" if letter in "|<>[]*_`" else letter for letter in note)
