"""The verdict in plain words: what a conversion saves, what it costs, and against what."""

from __future__ import annotations

from dataclasses import dataclass

from rehead.models.distance import RULE
from rehead.recipes.report.facts import CONVERTED, UPTRAINED, OnText, Summary, how
from rehead.recipes.report.speeds import headline_speed
from rehead.recipes.report.wording import bytes_of, count, figure, listed, percent, times


@dataclass(frozen=True)
class Verdict:
    """What a reader should know first.

    Attributes:
        headline: one sentence.
        points: the sentences under it, each with what it is about: saves, costs, control, start, gates, rule.
    """

    headline: str
    points: list[tuple[str, str]]

    def lines(self) -> list[str]:
        """For a terminal."""
        width = max((len(name) for name, _ in self.points), default=0)
        return [self.headline, *(f"  {name.ljust(width)}  {text}" for name, text in self.points)]


def verdict(summaries: list[Summary]) -> Verdict:
    """The verdict over a report's entries.

    Args:
        summaries: at least one.
    """
    finals = final(summaries)
    said = _one(finals[0], summaries) if len(finals) == 1 else _several(finals, summaries)
    words = {summary.verdict for summary in finals} - {""}
    more = "; after uptraining, uptrain first becomes uptrain more" if "uptrain more" in words else ""
    return Verdict(said.headline, [*said.points, *([("rule", f"{RULE}{more}.")] if words else [])])


def final(summaries: list[Summary]) -> list[Summary]:
    """The models to decide on: those after uptraining, or all where none was uptrained."""
    return [s for s in summaries if s.entry.stage != CONVERTED] or summaries


def _one(summary: Summary, everything: list[Summary]) -> Verdict:
    points = [("saves", saves(summary, everything)), ("costs", costs(summary)), ("control", control(summary))]
    before = [s for s in everything if s.entry.stage == CONVERTED and s.entry is not summary.entry]
    points += [("start", start(item)) for item in before]
    points += [("uptraining", worse(summary, item)) for item in before if _harmed(item, summary)]
    points += gates([summary])
    made = how(summary)
    word = f"{summary.verdict.capitalize()}: " if summary.verdict else ""
    bargain = f"{word}{_bargain(summary)}{f' ({made})' if made else ''}."
    return Verdict(bargain[:1].upper() + bargain[1:], points)


def _bargain(summary: Summary) -> str:
    """What is got and what is paid, without a full stop."""
    got = "a KV cache of unknown size"
    if summary.saving:
        got = f"a KV cache {_smaller(summary.saving)} at {count(summary.context)} tokens"
    elif summary.kv_bytes:
        got = f"a KV cache of {bytes_of(summary.kv_bytes)} at {count(summary.context)} tokens"
    text = summary.worst
    if text is None:
        return f"{got}; what it costs was not measured"
    paid = f" at {times(text.ratio)} the perplexity" if text.ratio is not None else ""
    same = f"; the most likely token stays the same at {percent(text.top1_agreement)} of positions"
    return got + paid + (same if text.top1_agreement is not None else "")


def _smaller(saving: float) -> str:
    if saving < 1.005:
        return "of the same size" if saving > 0.995 else f"{1 / saving:.3g} times as large"
    return f"{saving:.3g} times smaller"


def saves(summary: Summary, everything: list[Summary]) -> str:
    """What the conversion saves, in one sentence; speed from every model of the same shape."""
    parts = []
    if summary.kv_bytes and summary.baseline_kv_bytes:
        parts.append(
            f"{bytes_of(summary.baseline_kv_bytes)} of KV cache at {count(summary.context)} tokens become "
            f"{bytes_of(summary.kv_bytes)}"
            + (f" ({summary.saving:.3g} times less)" if summary.saving and summary.saving > 1.005 else "")
        )
    speed = headline_speed(summary, everything)
    parts.append(speed.phrase() if speed is not None else "decoding speed was not measured")
    return "; ".join(parts) + "."


def costs(summary: Summary) -> str:
    """What it costs, in one sentence: on the text where it costs most."""
    text = summary.worst
    if text is None:
        return "not measured."
    where = f" Measured on {text.name}" + (
        f", the worst of {len(summary.texts)} texts." if len(summary.texts) > 1 else "."
    )
    return f"{_figures(summary)}.{where}"


def _interval(text: OnText) -> str:
    if text.low is None or text.high is None:
        return ""
    return f", 95% interval {figure(text.low)} to {figure(text.high)}"


def control(summary: Summary) -> str:
    """The comparison with the control, or why there is none."""
    text = summary.worst
    if text is not None and text.control is not None:
        return (
            f"the original, uptrained on the same tokens, reaches perplexity {figure(text.control)}: the fair price is "
            f"{times(text.against_control)}."
        )
    if summary.trained_tokens or summary.entry.stage == UPTRAINED:
        return "none was trained, so the perplexity mixes what the conversion cost with what the text taught."
    return "none is needed: nothing was trained."


def start(summary: Summary) -> str:
    """The model before its uptraining, in one sentence."""
    text = summary.worst
    if text is None:
        return "not measured."
    parts = [f"perplexity {figure(text.perplexity)}"] if text.perplexity is not None else []
    parts += [f"KL {figure(text.kl)}"] if text.kl is not None else []
    parts += [f"top-1 agreement {percent(text.top1_agreement)}"] if text.top1_agreement is not None else []
    return f"before uptraining: {', '.join(parts)}."


def gates(summaries: list[Summary]) -> list[tuple[str, str]]:
    """The gates that were set, failed ones first."""
    found = [(gate, s.name) for s in summaries for gate in s.entry.evaluation.gates]
    if not found:
        return []
    failed = [f"{name}: {gate.name} is {figure(gate.value)}, the limit {figure(gate.limit)}"
              for gate, name in found if not gate.passed]  # fmt: skip
    if failed:
        return [("gates", f"{len(failed)} of {len(found)} failed: {'; '.join(failed)}.")]
    return [("gates", f"all {len(found)} passed." if len(found) > 1 else "the one that was set passed.")]


def _several(finals: list[Summary], everything: list[Summary]) -> Verdict:
    """One point for each size of the cache: the best of its models, and the others beside it."""
    sizes: dict[float | None, list[Summary]] = {}
    for summary in sorted(finals, key=lambda s: -(s.kv_bytes or 0)):
        sizes.setdefault(summary.kv_bytes, []).append(summary)
    points: list[tuple[str, str]] = []
    offers: list[str] = []
    for size, group in sizes.items():
        best = min(group, key=lambda s: s.distance)
        points.append((f"cache of {bytes_of(size)}", _point(best, group, everything)))
        text = best.worst
        price = f" at {times(text.ratio)} the perplexity" if text is not None and text.ratio is not None else ""
        offers.append(_smaller(best.saving or 1.0) + price + (f" ({best.verdict})" if best.verdict else ""))
    points += _control([min(group, key=lambda s: s.distance) for group in sizes.values()])
    points += gates(finals)
    worst = finals[0].worst
    if worst is not None:
        more = f", the worst of {len(finals[0].texts)} texts" if len(finals[0].texts) > 1 else ""
        points.append(("text", f"measured on {worst.name}{more}."))
    best = min(finals, key=lambda s: s.distance)
    if len(sizes) == 1 and best.saving is not None and 0.995 < best.saving < 1.005:  # what was changed is no cache
        text = best.worst
        price = f"{times(text.ratio)} the perplexity, " if text is not None and text.ratio is not None else ""
        word = f" ({best.verdict})" if best.verdict else ""
        return Verdict(f"{best.entry.series or best.name}: {price}with the KV cache as it was{word}.", points)
    return Verdict(f"A KV cache, at {count(finals[0].context)} tokens, {'; '.join(offers)}.", points)


def _point(best: Summary, group: list[Summary], everything: list[Summary]) -> str:
    word = f"{best.verdict}, " if best.verdict else ""
    parts = [f"{best.entry.series or best.name}: {word}{_figures(best)}."]
    speed = headline_speed(best, everything)
    if speed is not None:
        parts.append(f"{speed.phrase()[:1].upper()}{speed.phrase()[1:]}.")
    others = [
        f"{s.entry.series or s.name} ({_short(s)})" for s in sorted(group, key=lambda s: s.distance) if s is not best
    ]
    if others:
        parts.append(f"Not as near: {listed(others)}.")
    before = [s for s in everything if s.entry.stage == CONVERTED and s.kv_bytes == best.kv_bytes and s not in group]
    parts += [worse(best, s) for s in before if s.entry.series == best.entry.series and s.distance < best.distance]
    return " ".join(parts)


def _control(best: list[Summary]) -> list[tuple[str, str]]:
    """One sentence on the control for the best model of each size, or on its absence."""
    texts = [(s, s.worst) for s in best if s.worst is not None and s.worst.control is not None]
    if texts:
        prices = listed([f"{times(text.against_control)} ({bytes_of(s.kv_bytes)})" for s, text in texts])
        return [(
            "control",
            f"the original, uptrained on the same tokens, has perplexity {figure(texts[0][1].control)}: against it the "
            f"price is {prices}.",
        )]  # fmt: skip
    if any(s.trained_tokens for s in best):
        return [("control", "none, so the perplexity mixes what the conversion cost with what the text taught.")]
    return []


def _figures(summary: Summary) -> str:
    text = summary.worst
    if text is None:
        return "not measured"
    parts = []
    if text.perplexity is not None:
        beside = f" where the original has {figure(text.baseline)} ({times(text.ratio)}{_interval(text)})"
        parts.append(f"perplexity {figure(text.perplexity)}" + (beside if text.baseline is not None else ""))
    if text.kl is not None:
        parts.append(f"KL {figure(text.kl)} nats per token")
    if text.top1_agreement is not None:
        parts.append(f"the same most likely token at {percent(text.top1_agreement)} of positions")
    return ", ".join(parts)


def _harmed(before: Summary, after: Summary) -> bool:
    """Whether an uptraining did more harm than two runs differ by."""
    return after.distance > 1.02 * before.distance


def worse(after: Summary, before: Summary) -> str:
    """What to do about an uptraining that did harm, or that only led away from the original."""
    ends = [summary.worst.perplexity if summary.worst else None for summary in (before, after)]
    if ends[0] is not None and ends[1] is not None and ends[1] < ends[0]:
        return (
            f"Uptraining has lowered the perplexity ({figure(ends[0])} before, {figure(ends[1])} after) and led away "
            f"from the original ({_short(before)} before, {_short(after)} after): keep the conversion where it is to "
            "answer as the original does."
        )
    return (
        f"Uptraining has made it worse ({_short(before)} before, {_short(after)} after): keep the conversion, or train "
        "with a lower learning rate or on more tokens."
    )


def _short(summary: Summary) -> str:
    text = summary.worst
    if text is None:
        return "not measured"
    return f"KL {figure(text.kl)}" if text.kl is not None else f"perplexity {figure(text.perplexity)}"
