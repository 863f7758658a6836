"""The main plot: what a model is worth against the bytes of its KV cache, every variant on the same axes.

Any table of results can be drawn with it, e.g. the curve of a budget search::

    rows = [CacheRow("svd", 20 << 20, 0.05), CacheRow("svd", 10 << 20, 0.2), CacheRow("window", 4 << 20, 0.4)]
    plot = cache_plot(rows, context=8192, original=80 << 20)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rehead.models.distance import RECOVERABLE, USABLE
from rehead.recipes.report.drawing import (
    DASHES,
    FAINT,
    MARKERS,
    MOST_LINES,
    SERIES,
    Key,
    Plot,
    blank_figure,
    doubling,
    interval,
    line,
    log_if_wide,
    roomy,
    svg_of,
)
from rehead.recipes.report.wording import bytes_of, count, figure


@dataclass(frozen=True)
class CacheRow:
    """One model.

    Attributes:
        series: what it is called in the legend; rows of one series and one ``before`` are joined by a line.
        bytes: of one sequence's cache.
        value: KL to the original in nats per token, or another figure that is better the lower it is.
        low, high: its 95% interval, where there is one.
        before: whether it stands before its uptraining; drawn hollow.
    """

    series: str
    bytes: float
    value: float
    low: float | None = None
    high: float | None = None
    before: bool = False

    @property
    def legend(self) -> str:
        return f"{self.series}, converted" if self.before else self.series


KL_CAPTION = (
    "KL divergence from the original (nats per token, on the worst text; bars: 95% interval) against the size of one "
    "KV cache. Lower left is better; the original lies at 0."
)


def cache_plot(
    rows: Sequence[CacheRow],
    context: int,
    original: float | None = None,
    *,
    name: str = "quality",
    title: str = "Quality against KV size",
    caption: str = KL_CAPTION,
    label: str = "KL to the original",
    lines: Sequence[tuple[str, float]] = (),
) -> Plot | None:
    """Draw rows against the bytes of their caches; against their names where all caches have one size.

    Args:
        rows: the models; those without a positive value and size are left out.
        context: tokens at which the caches have these bytes.
        original: bytes of the original's cache, drawn as an upright line.
        name, title, caption, label: of the plot; ``label`` is the vertical axis.
        lines: (legend, value) of level lines, e.g. the control's.

    Returns:
        None for fewer than two rows: one dot on axes of its own says less than its figures do.
    """
    rows = [row for row in rows if row.value > 0 and row.bytes > 0]
    if len(rows) < 2:
        return None
    draw = _by_size if len({row.bytes for row in rows}) > 1 else _by_name
    curves: dict[tuple[str, bool], list[CacheRow]] = {}
    for row in rows:
        curves.setdefault((row.series, row.before), []).append(row)
    shown = dict(list(curves.items())[:MOST_LINES])
    order = list(dict.fromkeys(row.series for row in rows))
    keys, words = [], []
    with blank_figure() as (fig, ax):
        for points in shown.values():
            points.sort(key=lambda row: row.bytes)
            at = order.index(points[0].series)
            keys.append(Key(points[0].legend, at % len(SERIES), MARKERS[at % len(MARKERS)], points[0].before,
                            1 if points[0].before else 0))  # fmt: skip
            words.append(f"{points[0].legend}: "
                         + ", ".join(f"{figure(row.value)} at {bytes_of(row.bytes)}" for row in points))  # fmt: skip
        draw(ax, list(zip(keys, shown.values())), original, label, lines)
        if draw is _by_size:
            ax.set_xlabel(f"KV cache at {count(context)} tokens")
            for at, (legend, _) in enumerate(lines):
                keys.append(Key(legend, -1, "", False, 1 + at % 2))
        words += [f"{legend}: {figure(value)}" for legend, value in lines]
        return Plot(name, title, caption, svg_of(fig, name), keys if draw is _by_size else [],
                    f"{title}. {'; '.join(words)}.")  # fmt: skip


Curves = list[tuple[Key, list[CacheRow]]]


def _by_size(ax: Any, curves: Curves, original: float | None, label: str, lines: Sequence[tuple[str, float]]) -> None:
    """A curve for each series; bytes double from left to right."""
    rows = [row for _, points in curves for row in points]
    for key, points in curves:
        for row in points:
            interval(ax, row.bytes, row.low, row.high, key)
        line(ax, [row.bytes for row in points], [row.value for row in points], key)
    sizes = sorted({row.bytes for row in rows} | ({original} if original else set()))
    if original:
        ax.axvline(original, color=FAINT, linewidth=0.8, linestyle=DASHES[2])
    ticks = roomy(sizes, original)
    doubling(ax, sizes, ticks, [bytes_of(x) + "\noriginal" * (x == original) for x in ticks])
    log_if_wide(ax, [row.value for row in rows])
    for at, (_, value) in enumerate(lines):
        ax.axhline(value, color=FAINT, linewidth=0.9, linestyle=DASHES[1 + at % 2])
    if label.startswith("KL"):
        _verdicts(ax)
    ax.set_ylabel(label)


def _by_name(ax: Any, curves: Curves, original: float | None, label: str, lines: Sequence[tuple[str, float]]) -> None:
    """A row for each model, the best at the top."""
    pairs = sorted(((key, row) for key, points in curves for row in points), key=lambda pair: -pair[1].value)
    for at, (key, row) in enumerate(pairs):
        interval(ax, at, row.low, row.high, key, level=True)
        line(ax, [row.value], [at], key)
    ax.set_yticks(range(len(pairs)), [_folded(key.text) for key, _ in pairs])
    ax.set_ylim(-0.7, len(pairs) - 0.3)
    log_if_wide(ax, [row.value for _, row in pairs], axis="x")
    for at, (_, value) in enumerate(lines):
        ax.axvline(value, color=FAINT, linewidth=0.9, linestyle=DASHES[1 + at % 2])
    ax.set_xlabel(label)


def _verdicts(ax: Any) -> None:
    """The limits of the verdict, as far as they lie on the axis."""
    low, high = ax.get_ylim()
    for limit, word in ((USABLE[0], "usable"), (RECOVERABLE[0], "uptrain first")):
        if low < limit < high:
            ax.axhline(limit, color=FAINT, linewidth=0.7, linestyle=DASHES[2])
            ax.annotate(f"{word}, below {limit:g}", (1, limit), xycoords=("axes fraction", "data"), xytext=(-3, -3),
                        textcoords="offset points", ha="right", va="top", color=FAINT, fontsize=8)  # fmt: skip
    ax.set_ylim(low, high)


def _folded(text: str, width: int = 24) -> str:
    """A name over as many lines as it needs."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_long_words=True)[:3])
