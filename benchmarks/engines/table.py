"""The recorded runs as a table in Markdown."""

from __future__ import annotations

from typing import Any

from rehead.models.serving import REFUSED, SAME


def table(results: dict[str, Any]) -> str:
    """One line for each small model, one column for each engine, and the reasons below."""
    engines = list(dict.fromkeys(run["engine"] for row in results["rows"] for run in row["runs"]))
    lines = [
        "| class | from | attention | " + " | ".join(engines) + " |",
        "| --- " * (len(engines) + 3) + "|",
    ]
    for row in results["rows"]:
        runs = {run["engine"]: run for run in row["runs"]}
        act = row["facts"]["activation"]
        kind = f"{row['facts']['attention']}, {act}" if act else row["facts"]["attention"]
        lines.append(
            f"| {row['model_type']} | {row['case']} | {kind} | "
            + " | ".join(_cell(runs.get(name)) for name in engines)
            + " |"
        )
    return "\n".join([*lines, "", *counts(results)])


def counts(results: dict[str, Any]) -> list[str]:
    """For each engine: how many of the models that it was given it serves, and with which version."""
    engines: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        for run in row["runs"]:
            engines.setdefault(run["engine"], []).append(run)
    return [
        f"- {name} {runs[-1]['version']}: {sum(run['outcome'] == SAME for run in runs)} of {len(runs)} the same, "
        f"{sum(run['outcome'] not in (SAME, REFUSED) for run in runs)} different, "
        f"{sum(run['outcome'] == REFUSED for run in runs)} refused"
        for name, runs in engines.items()
    ]


def _cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    if run["outcome"] == REFUSED:
        return "refused"
    text = f"{run['tokens']}/{run['of']}"
    if run["logprob_difference"] is not None:
        text += f" ({run['logprob_difference']:.0e})"
    return text if run["outcome"] == SAME else f"**wrong** {text}"
