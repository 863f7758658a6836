"""What a report says, taken from evaluations and training logs: plain values, no layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehead.errors import UsageError
from rehead.models.distance import judged
from rehead.recipes.evaluation_schema import Divergence, Evaluation, Interval, Perplexity
from rehead.recipes.report.wording import heads_phrase, latent_phrase, short
from rehead.recipes.training.log import LOG_NAME

CONVERTED, UPTRAINED = "converted", "uptrained"
#: Tokens of context at which caches are compared, or the longest below that were measured.
CONTEXT = 8192


@dataclass(frozen=True)
class Entry:
    """One evaluated model in a report.

    Attributes:
        label: what it is called; must be unique in a report.
        evaluation: what was found.
        series: the curve it belongs to where quality is drawn against KV size; the label when empty.
        stage: ``"converted"`` before its uptraining, ``"uptrained"`` after, or empty.
    """

    label: str
    evaluation: Evaluation
    series: str = ""
    stage: str = ""


@dataclass(frozen=True)
class OnText:
    """An entry on one text: perplexities, and the divergence from the baseline.

    Attributes:
        ratio: perplexity over the baseline's, with its 95% interval where it was measured.
        against_control: perplexity over the control's.
        kl, kl_low, kl_high, top1_agreement: of the model, KL with its 95% interval.
        control_kl, control_top1: of the control, which has moved too.
    """

    name: str
    perplexity: float | None
    baseline: float | None
    control: float | None
    ratio: float | None
    low: float | None
    high: float | None
    against_control: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    top1_agreement: float | None
    control_kl: float | None
    control_top1: float | None


@dataclass(frozen=True)
class Faster:
    """Throughput of the model beside its baseline's at one size, tokens per second; factor is model over baseline.

    ``factor_low`` and ``factor_high`` are its 95% interval; None in documents that have none.
    """

    phase: str
    batch: int
    context: int
    model: float
    baseline: float | None
    factor: float | None
    factor_low: float | None = None
    factor_high: float | None = None


@dataclass(frozen=True)
class Summary:
    """An entry in the few figures that a decision needs.

    Attributes:
        context: tokens at which caches are compared.
        kv_bytes, baseline_kv_bytes: bytes of one sequence's cache at that context; saving is the second over the first.
        kv_bytes_per_token: that one more token takes before any window is full.
        texts: by text, the most damaged first.
        speed: by phase, batch and context.
        trained_tokens: of its uptraining; None without one.
    """

    entry: Entry
    kv_heads: list[int]
    baseline_kv_heads: list[int]
    context: int
    kv_bytes_per_token: float | None
    kv_bytes: float | None
    baseline_kv_bytes: float | None
    saving: float | None
    texts: list[OnText]
    speed: list[Faster]
    trained_tokens: float | None

    @property
    def worst(self) -> OnText | None:
        """The text on which the model is damaged most."""
        return self.texts[0] if self.texts else None

    @property
    def verdict(self) -> str:
        """``usable``, ``uptrain first`` (``uptrain more`` where it was) or ``broken``; empty where nothing says."""
        text = self.worst
        if text is None or text.kl is None:
            return ""
        word = judged(text.kl, text.top1_agreement)
        return "uptrain more" if word == "uptrain first" and self.trained_tokens else word

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.entry.label

    @property
    def distance(self) -> float:
        """How far it is from the original, for comparing models of one report: KL, else perplexity, else infinite."""
        text = self.worst
        if text is None:
            return float("inf")
        return text.kl if text.kl is not None else text.perplexity or float("inf")

    @property
    def shape(self) -> tuple[Any, ...]:
        """What decides a model's speed: two models of one shape differ in their weights only."""
        facts = self.entry.evaluation.model
        return self.kv_bytes, facts.model_type, facts.head_dim, *facts.num_key_value_heads, *facts.patches


@dataclass(frozen=True)
class Training:
    """One uptraining's curve.

    Attributes:
        label: as its entry's series.
        tokens, loss: of every logged step.
        kl_tokens, kl: of every evaluation on the way; empty where there was none.
    """

    label: str
    tokens: list[float]
    loss: list[float]
    kl_tokens: list[float]
    kl: list[float]


def as_entries(evaluations: Iterable[Entry | tuple[str, Evaluation]]) -> list[Entry]:
    """Entries of a report.

    Raises:
        UsageError: there is none, or two have one label.
    """
    entries = [item if isinstance(item, Entry) else Entry(*item) for item in evaluations]
    if not entries:
        raise UsageError("report: there is no evaluation to report; run `rehead evaluate` first")
    labels = [entry.label for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UsageError(f"report: two evaluations are called {twice[0]!r}; give each a label of its own")
    return entries


def summarise(entry: Entry) -> Summary:
    """The figures of one entry."""
    found = entry.evaluation
    model, baseline = found.model, found.baseline
    context = _context(found)
    ours, theirs = _cache(found, "model", context), _cache(found, "baseline", context)
    names = list(dict.fromkeys([*(p.data for p in found.perplexity), *(d.data for d in found.divergence)]))
    texts = sorted((_on_text(found, name) for name in names), key=lambda text: -(text.kl or text.ratio or 0.0))
    return Summary(
        entry=entry,
        kv_heads=model.num_key_value_heads,
        baseline_kv_heads=baseline.num_key_value_heads if baseline else [],
        context=context,
        kv_bytes_per_token=_cache(found, "model", 1),
        kv_bytes=ours,
        baseline_kv_bytes=theirs,
        saving=theirs / ours if ours and theirs else None,
        texts=texts,
        speed=_speed(found),
        trained_tokens=_trained(model.uptraining),
    )


def _context(found: Evaluation) -> int:
    """The longest context up to :data:`CONTEXT` that all caches were measured at."""
    measured = [{size.context for size in row.sizes} for row in found.kv_cache if row.sizes]
    shared = set.intersection(*measured) if measured else set()
    return max((size for size in shared if size <= CONTEXT), default=min(shared, default=CONTEXT))


def _cache(found: Evaluation, who: str, context: int) -> float | None:
    """Bytes of a cache at a context; of one token, those that it takes before any window is full."""
    for item in found.kv_cache:
        if item.who == who:
            if context == 1:
                return item.measured_bytes_per_token or item.computed_bytes_per_token
            return item.bytes_at(context)
    facts = found.facts().get(who)  # type: ignore[call-overload]
    return context * facts.kv_bytes_per_token if facts and facts.kv_bytes_per_token else None


def _on_text(found: Evaluation, name: str) -> OnText:
    perplexity = {who: _perplexity(found.perplexity, who, name) for who in ("model", "baseline", "control")}
    divergence = {who: _divergence(found.divergence, who, name) for who in ("model", "control")}
    ours, base, control = (perplexity[who] for who in ("model", "baseline", "control"))
    ratio = ours.ratio if ours else None
    kl, moved = divergence["model"], divergence["control"]
    return OnText(
        name=name,
        perplexity=ours.value if ours else None,
        baseline=base.value if base else None,
        control=control.value if control else None,
        ratio=ratio.value if ratio else ours.value / base.value if ours and base else None,
        low=ratio.low if ratio else None,
        high=ratio.high if ratio else None,
        against_control=ours.value / control.value if ours and control else None,
        kl=kl.mean if kl else None,
        kl_low=kl.low if kl else None,
        kl_high=kl.high if kl else None,
        top1_agreement=kl.top1_agreement if kl else None,
        control_kl=moved.mean if moved else None,
        control_top1=moved.top1_agreement if moved else None,
    )


def _perplexity(items: Sequence[Perplexity], who: str, name: str) -> Perplexity | None:
    """The perplexity to quote: disjoint windows where they were measured, else what was."""
    fitting = [item for item in items if item.who == who and item.data == name]
    return min(fitting, key=lambda item: item.convention != "disjoint", default=None)


def _divergence(items: Sequence[Divergence], who: str, name: str) -> Divergence | None:
    return next((item for item in items if item.who == who and item.data == name), None)


def _speed(found: Evaluation) -> list[Faster]:
    base = {(s.phase, s.batch, s.context): s.tokens_per_second for s in found.speed if s.who == "baseline"}
    rows = []
    for item in found.speed:
        if item.who == "model":
            other = base.get((item.phase, item.batch, item.context))
            ratio = item.ratio or Interval(value=item.tokens_per_second / other) if other else None
            bounds = (ratio.value, ratio.low, ratio.high) if ratio else (None, None, None)
            rows.append(Faster(item.phase, item.batch, item.context, item.tokens_per_second, other, *bounds))
    return rows


def _trained(uptraining: dict[str, Any] | None) -> float | None:
    for place in (uptraining or {}, (uptraining or {}).get("options") or {}):
        tokens = place.get("tokens")
        if isinstance(tokens, int | float) and not isinstance(tokens, bool):
            return float(tokens)
    return None


def read_training(label: str, log: Path) -> Training:
    """A training log, as ``rehead uptrain`` writes it.

    Args:
        label: what it is called.
        log: the JSONL file, or the folder it lies in.

    Raises:
        UsageError: there is none, or it is none.
    """
    path = log / LOG_NAME if log.is_dir() else log
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{path}: cannot be read ({reason}); give a folder that `rehead uptrain` wrote") from None
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except ValueError:
            if number == len(lines):  # a line that a killed run did not finish
                break
            raise UsageError(f"{path}: line {number} is no JSON; give a log that `rehead uptrain` wrote") from None
        if isinstance(event, dict):
            events.append(event)
    # A resumed run logs some steps again: the later ones are what the weights come from.
    steps = _by_tokens(events, "step", "loss")
    kl = _by_tokens(events, "evaluation", "kl")
    return Training(label, list(steps), list(steps.values()), list(kl), list(kl.values()))


def _by_tokens(events: list[dict[str, Any]], kind: str, key: str) -> dict[float, float]:
    found = {}
    for event in events:
        tokens, value = event.get("tokens"), event.get(key)
        if event.get("event") == kind and isinstance(tokens, int | float) and isinstance(value, int | float):
            found[float(tokens)] = float(value)
    return dict(sorted(found.items()))


def heads_change(summary: Summary) -> str:
    """``"8 KV heads to 1"``; empty where the number stays or is not known."""
    latent = (summary.entry.evaluation.model.conversion or {}).get("latent")
    if isinstance(latent, dict):
        return f"{heads_phrase(summary.baseline_kv_heads)} to a {latent_phrase(latent)}"
    if not summary.kv_heads or not summary.baseline_kv_heads or summary.kv_heads == summary.baseline_kv_heads:
        return ""
    return f"{heads_phrase(summary.baseline_kv_heads)} to {heads_phrase(summary.kv_heads).split(' KV')[0]}"


def how(summary: Summary) -> str:
    """How a model came about: ``"8 KV heads to 1, svd + refit + fit 300, uptrained on 8M tokens"``."""
    conversion = summary.entry.evaluation.model.conversion or {}
    options = conversion.get("options") if isinstance(conversion.get("options"), dict) else conversion
    # Latents have a method of their own, whatever stands in the options for pooling.
    parts = [str(options["method"])] if options and options.get("method") and "latent" not in conversion else []
    parts += ["refit"] if options and options.get("refit") else []
    parts += [f"fit {options['fit']}"] if options and options.get("fit") else []
    parts += [f"{options['block']} blocks"] if options and options.get("block") else []
    steps = [heads_change(summary), " + ".join(parts)]
    steps += [f"uptrained on {short(summary.trained_tokens)} tokens"] if summary.trained_tokens else []
    steps += [f"patched: {patch}" for patch in summary.entry.evaluation.model.patches]
    return ", ".join(filter(None, steps))
