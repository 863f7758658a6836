"""The report's plots: inline SVG whose colours are CSS variables, so that one drawing serves light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rehead.recipes.report.facts import CONVERTED, Summary, Training
from rehead.recipes.report.verdict import final
from rehead.recipes.report.wording import bytes_of, figure, short

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


def draw_all(summaries: list[Summary], trainings: list[Training]) -> list[Plot]:
    """Every plot for which there is data."""
    drawn = (
        quality_against_cache(summaries),
        perplexity_against_cache(summaries),
        recovery(trainings),
        kl_distribution(summaries),
        damage(summaries),
        decode_speed(summaries),
    )
    return [plot for plot in drawn if plot is not None]


def quality_against_cache(summaries: list[Summary]) -> Plot | None:
    """KL to the original against the cache's size, a curve for each series and stage."""
    return _against_cache(
        summaries, "quality", "Quality against KV size",
        "KL divergence from the original (nats per token, on the worst text) against the size of one KV cache. "
        "Lower left is better; the original lies at 0.",
        "KL to the original", lambda s: s.worst.kl if s.worst else None,
    )  # fmt: skip


def perplexity_against_cache(summaries: list[Summary]) -> Plot | None:
    """Perplexity over the original's, with original and control beside it."""
    control = any(s.worst and s.worst.control and s.worst.baseline for s in summaries)
    return _against_cache(
        summaries, "perplexity", "Perplexity against KV size",
        "Perplexity divided by the original's, on the worst text. The original is the line at 1"
        + ("; the broken line is the control, the original uptrained on the same tokens." if control else "."),
        "perplexity, × original", lambda s: s.worst.ratio if s.worst else None, reference=True,
    )  # fmt: skip


def _against_cache(
    summaries: list[Summary],
    name: str,
    title: str,
    caption: str,
    label: str,
    value: Callable[[Summary], float | None],
    reference: bool = False,
) -> Plot | None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for s in summaries:
        y = value(s)
        if y is not None and y > 0 and s.kv_bytes:
            curves.setdefault((s.entry.series or s.name, s.entry.stage), []).append((s.kv_bytes, y))
    # One dot on axes of its own says less than its figures do.
    if sum(map(len, curves.values())) < 2:
        return None
    names = list(dict.fromkeys(series for series, _ in curves))
    keys, words = [], []
    with _figure() as (fig, ax):
        for (series, stage), points in list(curves.items())[:MOST_LINES]:
            at = names.index(series)
            points.sort()
            key = Key(f"{series}, {stage}" if stage else series, at % len(SERIES), MARKERS[at % len(MARKERS)],
                      stage == CONVERTED, 1 if stage == CONVERTED else 0)  # fmt: skip
            _line(ax, [x for x, _ in points], [y for _, y in points], key)
            keys.append(key)
            words.append(f"{key.text}: " + ", ".join(f"{figure(y)} at {bytes_of(x)}" for x, y in points))
        ax.set_xscale("log", base=2)
        sizes = sorted({x for points in curves.values() for x, _ in points})
        base = [s.baseline_kv_bytes for s in summaries if s.baseline_kv_bytes]
        if base:
            sizes = sorted({*sizes, max(base)})
            ax.axvline(max(base), color=FAINT, linewidth=0.8, linestyle=DASHES[2])
        ticks = _spread(sizes)
        ax.set_xticks(ticks, [bytes_of(x) for x in ticks], minor=False)
        ax.minorticks_off()
        ax.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
        _log_if_wide(ax, [y for points in curves.values() for _, y in points])
        if reference:
            ax.axhline(1.0, color=FAINT, linewidth=0.9)
            ratios = [s.worst.control / s.worst.baseline for s in summaries
                      if s.worst and s.worst.control and s.worst.baseline]  # fmt: skip
            if ratios:
                ax.axhline(min(ratios), color=FAINT, linewidth=0.9, linestyle=DASHES[1])
                words.append(f"control: {figure(min(ratios))}")
                keys.append(Key("control", -1, "", False, 1))
        ax.set_xlabel(f"KV cache at {summaries[0].context:,} tokens")
        ax.set_ylabel(label)
        return Plot(name, title, caption, _svg(fig, name), keys, f"{title}. {'; '.join(words)}.")


def recovery(trainings: list[Training]) -> Plot | None:
    """KL (or, where no run was evaluated on its way, the training loss) against tokens."""
    evaluated = [t for t in trainings if t.kl]
    shown = (evaluated or [t for t in trainings if t.loss])[:MOST_LINES]
    if not shown:
        return None
    keys, words = [], []
    with _figure() as (fig, ax):
        for at, run in enumerate(shown):
            xs, ys = (run.kl_tokens, run.kl) if evaluated else (run.tokens, run.loss)
            pairs = list(zip(xs, ys))
            key = Key(run.label, at % len(SERIES), MARKERS[at % len(MARKERS)] if evaluated else "", False, 0)
            _line(ax, [x for x, _ in pairs], [y for _, y in pairs], key)
            keys.append(key)
            words.append(f"{run.label}: {figure(pairs[0][1])} at {short(pairs[0][0])} tokens, "
                         f"{figure(pairs[-1][1])} at {short(pairs[-1][0])}")  # fmt: skip
        _log_if_wide(ax, [y for run in shown for y in (run.kl if evaluated else run.loss)])
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda x, _: short(x))
        ax.set_xlabel("uptraining tokens")
        ax.set_ylabel("KL to the original" if evaluated else "training loss")
        what = "KL divergence from the original on held-out text" if evaluated else "Training loss of every logged step"
        return Plot("recovery", "Recovery against tokens", f"{what} as uptraining goes on.", _svg(fig, "recovery"),
                    keys, f"Recovery against tokens. {'; '.join(words)}.")  # fmt: skip


def kl_distribution(summaries: list[Summary]) -> Plot | None:
    """How the divergence is spread over tokens: the share of them that is worse than each value."""
    shown = [(s, d) for s in final(summaries) for d in s.entry.evaluation.divergence
             if d.who == "model" and s.worst and d.data == s.worst.name and sum(d.histogram.counts)]  # fmt: skip
    if not shown:
        return None
    keys, words = [], []
    with _figure() as (fig, ax):
        first, last = [], []
        for at, (s, d) in enumerate(shown[:MOST_LINES]):
            total, left, xs, ys = sum(d.histogram.counts), float(sum(d.histogram.counts)), [], []
            for edge, n in zip(d.histogram.edges, d.histogram.counts):
                if edge > 0 and left > 0:
                    xs.append(edge)
                    ys.append(left / total)
                left -= n
            key = Key(s.name, at % len(SERIES), "", False, at // len(SERIES) % len(DASHES))
            _line(ax, xs, ys, key)
            first += [x for x, y in zip(xs, ys) if y > 0.995][-1:] or xs[:1]
            last += [x for x, y in zip(xs, ys) if y > 0.001][-1:]
            keys.append(key)
            words.append(f"{s.name}: median {figure(d.median)}, 99th percentile {figure(d.p99)}, largest "
                         f"{figure(d.max)}")  # fmt: skip
        from matplotlib.ticker import LogLocator, NullFormatter

        ax.set_xscale("log")
        ax.set_xlim(min(first), max([*last, 10 * min(first)]))
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        ax.xaxis.set_major_locator(LogLocator(10, numticks=7))
        ax.xaxis.set_major_formatter(lambda x, _: figure(x, 1))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("KL of a token (nats)")
        ax.set_ylabel("tokens worse than that")
        return Plot("distribution", "KL distribution",
                    "The share of tokens whose divergence from the original is above each value. The further left a "
                    "curve falls, the better; a long right tail means few tokens that are badly off.",
                    _svg(fig, "distribution"), keys, f"KL distribution. {'; '.join(words)}.")  # fmt: skip


def damage(summaries: list[Summary]) -> Plot | None:
    """What each converted layer costs when it stands alone in the original."""
    shown = [s for s in final(summaries) if s.entry.evaluation.damage][:MOST_LINES]
    if not shown:
        return None
    keys, words = [], []
    with _figure() as (fig, ax):
        for at, s in enumerate(shown):
            rows = sorted(s.entry.evaluation.damage, key=lambda row: row.layer)
            key = Key(s.name, at % len(SERIES), MARKERS[at % len(MARKERS)])
            _line(ax, [row.layer for row in rows], [row.kl for row in rows], key)
            keys.append(key)
            worst = max(rows, key=lambda row: row.kl)
            words.append(f"{s.name}: most in layer {worst.layer}, KL {figure(worst.kl)}")
        _log_if_wide(ax, [row.kl for s in shown for row in s.entry.evaluation.damage])
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("layer")
        ax.set_ylabel("KL to the original")
        return Plot("damage", "Damage by layer",
                    "Each converted layer alone in the original: KL divergence from the original, in nats per token.",
                    _svg(fig, "damage"), keys, f"Damage by layer. {'; '.join(words)}.")  # fmt: skip


def decode_speed(summaries: list[Summary]) -> Plot | None:
    """Decoding throughput against context, at the largest batch; model and original beside each other."""
    shown = [s for s in summaries if any(item.phase == "decode" for item in s.speed)]
    if not shown:
        return None
    batch = max(item.batch for s in shown for item in s.speed if item.phase == "decode")
    # Models of one shape run at one speed: a line for each size of the cache, not for each way to get there.
    by_shape = {s.kv_bytes: s for s in shown}
    keys, words = [], []
    with _figure() as (fig, ax):
        lines: dict[str, list[tuple[float, float]]] = {}
        for s in by_shape.values():
            for item in s.speed:
                if item.phase == "decode" and item.batch == batch:
                    lines.setdefault(_sized(s), []).append((item.context, item.model))
                    if item.baseline:
                        lines.setdefault("original", []).append((item.context, item.baseline))
        for at, (name, points) in enumerate(sorted(lines.items(), key=lambda pair: pair[0] == "original")):
            # The original was measured beside each model; the middle measurement stands for it.
            xs = sorted({x for x, _ in points})
            ys = [_median([y for x, y in points if x == at_x]) for at_x in xs]
            original = name == "original"
            key = Key(name, -1 if original else at % len(SERIES), MARKERS[at % len(MARKERS)],
                      False, 1 if original else 0)  # fmt: skip
            _line(ax, xs, ys, key)
            keys.append(key)
            words.append(f"{name}: " + ", ".join(f"{figure(y)} at {x:,.0f}" for x, y in zip(xs, ys)))
        ax.set_xscale("log", base=2)
        ticks = _spread(sorted({x for points in lines.values() for x, _ in points}))
        ax.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(lambda y, _: short(y) if y else "0")
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel("tokens a second")
        return Plot("speed", "Decode speed", f"Decoded tokens a second at batch {batch}, against context.",
                    _svg(fig, "speed"), keys, f"Decode speed at batch {batch}. {'; '.join(words)}.")  # fmt: skip


def _sized(summary: Summary) -> str:
    """A model by the size of its cache."""
    size = summary.kv_bytes
    return summary.name if size is None else f"cache of {bytes_of(size)} at {summary.context:,} tokens"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _line(ax: Any, xs: Sequence[float], ys: Sequence[float], key: Key) -> None:
    colour = FAINT if key.colour < 0 else SERIES[key.colour]
    # Markers may stand out of the axes, at whose edge the first and last sizes lie; plain lines may not.
    ax.plot(
        xs, ys, color=colour, marker=key.marker or None, markersize=5, linewidth=1.6, linestyle=DASHES[key.dash],
        markerfacecolor="none" if key.hollow else colour, markeredgecolor=colour, clip_on=not key.marker,
    )  # fmt: skip


def _spread(values: list[float], most: int = 5) -> list[float]:
    """At most so many of sorted values, ends included."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _log_if_wide(ax: Any, values: list[float]) -> None:
    """A logarithmic axis where values span more than a factor of six; labelled in plain figures either way."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > 6 and len(positive) == len(values):
        from matplotlib.ticker import LogLocator, NullFormatter

        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=12))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(lambda y, _: figure(y, _digits(ax.yaxis.get_majorticklocs())))


def _digits(ticks: Any) -> int:
    """Significant digits, at least two, that tell an axis's ticks apart."""
    apart = (digits for digits in range(2, 8) if len({figure(tick, digits) for tick in ticks}) == len(ticks))
    return next(apart, 8)


@contextmanager
def _figure() -> Iterator[tuple[Any, Any]]:
    """A figure without pyplot, so that nobody's backend or settings are touched."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "rehead", "font.size": 9, "font.family": "sans-serif",
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


def _svg(fig: Any, name: str) -> str:
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
