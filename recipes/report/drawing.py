"""What the report's plots are drawn with: SVG whose colours are CSS variables, so that one drawing serves light, dark
and print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rehead.recipes.report.wording import figure

# Colours that stand for CSS variables while matplotlib draws; no others are used, so each can be found again.
INK, FAINT, GRID = "#010203", "#020304", "#030405"
SERIES = tuple(f"#0405{i:02x}" for i in range(8))
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--grid"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_SIZE = (4.9, 3.1)
#: A plot with more lines than this tells nothing; the tables hold the rest.
MOST_LINES = 16


@dataclass(frozen=True)
class Key:
    """One line of a legend: series ``colour`` (an index), marker, whether hollow, dash pattern index."""

    text: str
    colour: int
    marker: str = "o"
    hollow: bool = False
    dash: int = 0


@dataclass
class Plot:
    """A drawn plot.

    Attributes:
        name: short, for ids.
        title: what it shows.
        caption: how to read it.
        svg: the drawing, without a legend.
        keys: the legend, which the page sets as text.
        alt: the figures of the plot in words, for who cannot see it.
    """

    name: str
    title: str
    caption: str
    svg: str
    keys: list[Key] = field(default_factory=list)
    alt: str = ""


def line(ax: Any, xs: Sequence[float], ys: Sequence[float], key: Key) -> None:
    colour = FAINT if key.colour < 0 else SERIES[key.colour]
    # Markers may stand out of the axes, at whose edge the first and last sizes lie; plain lines may not.
    ax.plot(
        xs, ys, color=colour, marker=key.marker or None, markersize=5, linewidth=1.6, linestyle=DASHES[key.dash],
        markerfacecolor="none" if key.hollow else colour, markeredgecolor=colour, clip_on=not key.marker,
    )  # fmt: skip


def interval(ax: Any, at: float, low: float | None, high: float | None, key: Key, level: bool = False) -> None:
    """A plain line from ``low`` to ``high``, upright or level, where an interval was measured."""
    if low is not None and high is not None:
        place, ends = [at, at], [low, high]
        ax.plot(*((ends, place) if level else (place, ends)), color=SERIES[key.colour], linewidth=1.1)


def doubling(ax: Any, values: Sequence[float], ticks: Sequence[float], labels: Sequence[str]) -> None:
    """A horizontal axis on which sorted sizes double from left to right."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, labels)
    ax.minorticks_off()
    ax.set_xlim(values[0] / 1.25, values[-1] * 1.25)


def spread(values: list[float], most: int = 5) -> list[float]:
    """At most so many of sorted values, ends included."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def roomy(sizes: list[float], always: float | None = None) -> list[float]:
    """Some of sorted sizes, the ends first, so far apart on an axis that doubles that their labels do not meet."""
    least = math.log(sizes[-1] / sizes[0] * 1.25**2) / 6  # a label takes less than a sixth of what ``doubling`` shows
    kept: list[float] = []
    for size in (*([always] if always else []), sizes[0], sizes[-1], *sizes):
        if all(abs(math.log(size / one)) >= least for one in kept):
            kept.append(size)
    return sorted(kept)


def log_if_wide(ax: Any, values: list[float], axis: str = "y") -> None:
    """A logarithmic axis where values span more than a factor of six; labelled in plain figures either way."""
    positive = [value for value in values if value > 0]
    one = ax.yaxis if axis == "y" else ax.xaxis
    if positive and max(positive) / min(positive) > 6 and len(positive) == len(values):
        from matplotlib.ticker import LogLocator, NullFormatter

        (ax.set_yscale if axis == "y" else ax.set_xscale)("log")
        one.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=12))
        one.set_minor_formatter(NullFormatter())
    one.set_major_formatter(lambda value, _: figure(value, digits(one.get_majorticklocs())))


def digits(ticks: Any) -> int:
    """Significant digits, at least two, that tell an axis's ticks apart."""
    apart = (digits for digits in range(2, 8) if len({figure(tick, digits) for tick in ticks}) == len(ticks))
    return next(apart, 8)


@contextmanager
def blank_figure() -> Iterator[tuple[Any, Any]]:
    """A figure without pyplot, so that nobody's backend or settings are touched."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "rehead", "font.size": 10, "font.family": "sans-serif",
        "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "axes.grid": True, "grid.linewidth": 0.7,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.formatter.useoffset": False,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        fig = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(fig)
        fig.patch.set_alpha(0)
        ax = fig.add_subplot()
        ax.patch.set_alpha(0)
        yield fig, ax


def svg_of(fig: Any, name: str) -> str:
    """The figure as an ``svg`` element: no prologue, no metadata, ids of its own, colours as variables."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # The page's own font, and nothing that would style the page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    return re.sub(r"\n\s*\n", "\n", text).strip()
