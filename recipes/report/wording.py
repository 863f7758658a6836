"""How figures are put into words: one place, so that terminal, HTML and Markdown agree."""

from __future__ import annotations

import math
from typing import Any


def figure(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, thousands separated, never in exponents a reader has to decode.

    None and what is not finite become a dash.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -5:
        return f"{value:.{digits - 1}e}"
    # Rounding may carry into the next power of ten (9.996 -> 10.0), so the size is taken again.
    value = round(value, digits - 1 - size)
    size = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits - 1 - size, 0)}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return "–" if value is None else f"{value:,.0f}"


def short(value: float) -> str:
    """A token count as people write it: ``8M``, ``32k``, ``1.5M``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.{digits}%}"


def times(value: float | None) -> str:
    """A factor: ``×1.07``; small excesses keep the digits that tell them from 1."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"×{value:.2f}" if 0.1 <= value < 10 else f"×{figure(value)}"


def bytes_of(value: float | None) -> str:
    """Bytes in the unit that reads best."""
    if value is None:
        return "–"
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f} B"


def heads(by_layer: list[int]) -> str:
    """KV heads of a model: ``"2"``, or ``"1 to 4"`` where layers differ."""
    if not by_layer:
        return "–"
    low, high = min(by_layer), max(by_layer)
    return str(low) if low == high else f"{low} to {high}"


def heads_phrase(by_layer: list[int]) -> str:
    """``"1 KV head"``, ``"8 KV heads"``, ``"1 to 4 KV heads"``."""
    text = heads(by_layer)
    return f"{text} KV head{'' if text == '1' else 's'}"


def latent_phrase(facts: dict[str, Any]) -> str:
    """``"latent of 128 numbers and a rotated key of 32"``, from what a manifest says of latent attention."""
    key = facts.get("rope_dims")
    return f"latent of {facts.get('rank')} numbers" + (f" and a rotated key of {key}" if key else "")


def listed(parts: list[str]) -> str:
    """``"a, b and c"``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
