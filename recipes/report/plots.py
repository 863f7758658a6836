"""The report's plots: which figures go into which drawing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rehead.recipes.report.cache_plot import CacheRow, cache_plot
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
    spread,
    svg_of,
)
from rehead.recipes.report.facts import CONVERTED, OnText, Summary, Training
from rehead.recipes.report.speeds import SpeedFactor, speed_factors
from rehead.recipes.report.verdict import final
from rehead.recipes.report.wording import bytes_of, figure, short, times


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
    return cache_plot(_rows(summaries, lambda text: (text.kl, text.kl_low, text.kl_high)), *_sizes(summaries))


def perplexity_against_cache(summaries: list[Summary]) -> Plot | None:
    """Perplexity over the original's, with original and control beside it."""
    texts = [s.worst for s in summaries if s.worst]
    ratios = [text.control / text.baseline for text in texts if text.control and text.baseline]
    control = [("control", min(ratios))] if ratios else []
    return cache_plot(
        _rows(summaries, lambda text: (text.ratio, text.low, text.high)), *_sizes(summaries), name="perplexity",
        title="Perplexity against KV size", label="perplexity, × original", lines=[*control, ("original", 1.0)],
        caption="Perplexity divided by the original's, on the worst text (bars: 95% interval). The original is the "
        "line at 1" + ("; the control is the original uptrained on the same tokens." if control else "."),
    )  # fmt: skip


Bounds = tuple[float | None, float | None, float | None]


def _rows(summaries: list[Summary], read: Callable[[OnText], Bounds]) -> list[CacheRow]:
    """One figure of every summary, on the text where it loses most."""
    rows = []
    for s in summaries:
        value, low, high = read(s.worst) if s.worst else (None, None, None)
        if value is not None and s.kv_bytes:
            rows.append(CacheRow(s.entry.series or s.name, s.kv_bytes, value, low, high, s.entry.stage == CONVERTED))
    return rows


def _sizes(summaries: list[Summary]) -> tuple[int, float | None]:
    base = [s.baseline_kv_bytes for s in summaries if s.baseline_kv_bytes]
    return summaries[0].context, max(base, default=None)


def recovery(trainings: list[Training]) -> Plot | None:
    """KL (or, where no run was evaluated on its way, the training loss) against tokens."""
    evaluated = [t for t in trainings if t.kl]
    shown = (evaluated or [t for t in trainings if t.loss])[:MOST_LINES]
    if not shown:
        return None
    keys, words = [], []
    with blank_figure() as (fig, ax):
        for at, run in enumerate(shown):
            xs, ys = (run.kl_tokens, run.kl) if evaluated else (run.tokens, run.loss)
            pairs = list(zip(xs, ys))
            key = Key(run.label, at % len(SERIES), MARKERS[at % len(MARKERS)] if evaluated else "", False, 0)
            line(ax, [x for x, _ in pairs], [y for _, y in pairs], key)
            keys.append(key)
            words.append(f"{run.label}: {figure(pairs[0][1])} at {short(pairs[0][0])} tokens, "
                         f"{figure(pairs[-1][1])} at {short(pairs[-1][0])}")  # fmt: skip
        log_if_wide(ax, [y for run in shown for y in (run.kl if evaluated else run.loss)])
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda x, _: short(x))
        ax.set_xlabel("uptraining tokens")
        ax.set_ylabel("KL to the original" if evaluated else "training loss")
        what = "KL divergence from the original on held-out text" if evaluated else "Training loss of every logged step"
        return Plot("recovery", "Recovery against tokens", f"{what} as uptraining goes on.", svg_of(fig, "recovery"),
                    keys, f"Recovery against tokens. {'; '.join(words)}.")  # fmt: skip


def kl_distribution(summaries: list[Summary]) -> Plot | None:
    """How the divergence is spread over tokens: the share of them that is worse than each value."""
    shown = [(s, d) for s in final(summaries) for d in s.entry.evaluation.divergence
             if d.who == "model" and s.worst and d.data == s.worst.name
             # Those at no distance have no place on a logarithmic axis.
             and any(n for edge, n in zip(d.histogram.edges, d.histogram.counts) if edge > 0)]  # fmt: skip
    if not shown:
        return None
    keys, words = [], []
    with blank_figure() as (fig, ax):
        first, last = [], []
        for at, (s, d) in enumerate(shown[:MOST_LINES]):
            total, left, xs, ys = sum(d.histogram.counts), float(sum(d.histogram.counts)), [], []
            for edge, n in zip(d.histogram.edges, d.histogram.counts):
                if edge > 0 and left > 0:
                    xs.append(edge)
                    ys.append(left / total)
                left -= n
            key = Key(s.name, at % len(SERIES), "", False, at // len(SERIES) % len(DASHES))
            line(ax, xs, ys, key)
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
                    svg_of(fig, "distribution"), keys, f"KL distribution. {'; '.join(words)}.")  # fmt: skip


def damage(summaries: list[Summary]) -> Plot | None:
    """What each converted layer costs when it stands alone in the original."""
    shown = [s for s in final(summaries) if s.entry.evaluation.damage][:MOST_LINES]
    if not shown:
        return None
    keys, words = [], []
    with blank_figure() as (fig, ax):
        for at, s in enumerate(shown):
            rows = sorted(s.entry.evaluation.damage, key=lambda row: row.layer)
            key = Key(s.name, at % len(SERIES), MARKERS[at % len(MARKERS)])
            line(ax, [row.layer for row in rows], [row.kl for row in rows], key)
            keys.append(key)
            worst = max(rows, key=lambda row: row.kl)
            words.append(f"{s.name}: most in layer {worst.layer}, KL {figure(worst.kl)}")
        log_if_wide(ax, [row.kl for s in shown for row in s.entry.evaluation.damage])
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("layer")
        ax.set_ylabel("KL to the original")
        return Plot("damage", "Damage by layer",
                    "Each converted layer alone in the original: KL divergence from the original, in nats per token.",
                    svg_of(fig, "damage"), keys, f"Damage by layer. {'; '.join(words)}.")  # fmt: skip


def decode_speed(summaries: list[Summary]) -> Plot | None:
    """Decoding speed over the original's against context, at the largest batch: a line for each size of the cache.

    Models whose caches have one size run at one speed, however their weights came about; see
    :mod:`rehead.recipes.report.speeds`.
    """
    factors = [one for one in speed_factors(summaries) if one.phase == "decode"]
    batch = max((one.batch for one in factors), default=0)
    shown = [one for one in factors if one.batch == batch]
    if len(shown) < 2:  # one dot says less than the sentence that the report opens with
        return None
    shapes = list(dict.fromkeys(one.shape for one in shown))[:MOST_LINES]
    contexts = sorted({one.context for one in shown})
    keys, words = [], []
    with blank_figure() as (fig, ax):
        for at, shape in enumerate(shapes):
            points = [one for one in shown if one.shape == shape]
            key = Key(_sized(points[0], shapes, summaries), at % len(SERIES), MARKERS[at % len(MARKERS)])
            # Bars of one context stand beside each other.
            xs = [one.context * 1.025 ** (at - (len(shapes) - 1) / 2) for one in points]
            for x, one in zip(xs, points):
                interval(ax, x, one.low, one.high, key)
            line(ax, xs, [one.factor for one in points], key)
            keys.append(key)
            words.append(f"{key.text}: " + ", ".join(f"{times(one.factor)} at {one.context:,}" for one in points))
        ax.axhline(1.0, color=FAINT, linewidth=0.9, linestyle=DASHES[1])
        keys.append(Key("original", -1, "", False, 1))
        ticks = spread([float(context) for context in contexts])
        doubling(ax, contexts, ticks, [f"{x:,.0f}" for x in ticks])
        log_if_wide(ax, [one.factor for one in shown])
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel("tokens per second, × original")
        return Plot("speed", "Decode speed",
                    f"Decoding speed divided by the original's, at batch {batch}. Bars: from the lowest to the highest "
                    "end of the 95% intervals of all measurements of that size.",
                    svg_of(fig, "speed"), keys, f"Decode speed at batch {batch}. {'; '.join(words)}.")  # fmt: skip


def _sized(one: SpeedFactor, shapes: list[tuple[Any, ...]], summaries: list[Summary]) -> str:
    """Models of one shape by the size of their cache, or by name where that is not theirs alone."""
    if one.cache is None or sum(shape[0] == one.cache for shape in shapes) > 1:
        return next(s.name for s in summaries if s.shape == one.shape)
    return f"cache of {bytes_of(one.cache)} at {summaries[0].context:,} tokens"
