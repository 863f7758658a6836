"""What the benchmark of blocks found: rows, the best of each form, and the table for a README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORMS = ("serial", "parallel")


@dataclass
class Row:
    """One measurement: median milliseconds of a step, and the spread (half the interquartile range) as a share."""

    hidden: int
    kv_heads: int
    ranks: int
    step: str
    form: str
    products: str
    compiled: str
    collectives: str
    milliseconds: float = 0.0
    spread: float = 0.0
    graph: bool = False
    tflops: float | None = None
    skipped: str | None = None


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each shape and step: the best serial and the best parallel variant, and how much faster the latter is.

    ``plain`` is the same among variants without overlapped collectives, which is what the published figure compares.
    """
    found = []
    for key in dict.fromkeys((row.hidden, row.kv_heads, row.ranks, row.step) for row in rows):
        mine = [r for r in rows if (r.hidden, r.kv_heads, r.ranks, r.step) == key and r.skipped is None]
        best = {form: min((r for r in mine if r.form == form), key=_milliseconds, default=None) for form in FORMS}
        serial, parallel = best["serial"], best["parallel"]
        if serial is None or parallel is None:
            continue
        fact: dict[str, Any] = dict(zip(("hidden", "kv_heads", "ranks", "step"), key))
        fact |= {
            "serial_ms": serial.milliseconds,
            "serial": how(serial),
            "parallel_ms": parallel.milliseconds,
            "parallel": how(parallel),
            "speedup": serial.milliseconds / parallel.milliseconds,
        }
        plain = [r for r in mine if r.collectives in ("none", "plain")]
        if all(any(r.form == form for r in plain) for form in FORMS):
            first, second = (min(r.milliseconds for r in plain if r.form == form) for form in FORMS)
            fact["plain_speedup"] = first / second
        found.append(fact)
    return found


def _milliseconds(row: Row) -> float:
    return row.milliseconds


def how(row: Row) -> str:
    parts = [row.products, *([f"{row.compiled} compiled"] if row.compiled != "no" else [])]
    return ", ".join([*parts, *([row.collectives] if row.collectives != "none" else [])])


def markdown(facts: Sequence[dict[str, Any]]) -> str:
    """The summary as a table."""
    lines = [
        "| hidden | KV heads | GPUs | step | best serial, ms | best parallel, ms | speed-up | without overlap |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for f in facts:
        plain = f"{f['plain_speedup']:.2f}" if "plain_speedup" in f else ""
        lines.append(
            f"| {f['hidden']} | {f['kv_heads']} | {f['ranks']} | {f['step']} | {f['serial_ms']:.3f} ({f['serial']}) | "
            f"{f['parallel_ms']:.3f} ({f['parallel']}) | {f['speedup']:.2f} | {plain} |"
        )
    return "\n".join(lines)
