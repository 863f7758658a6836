"""Quality against bytes, before anything is trained or written: what each budget would cost a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rehead.console import Progress
from rehead.convert.budget.decode_time import DecodeTimes
from rehead.convert.budget.holders import holders, none_served
from rehead.convert.budget.library import Choice, Library
from rehead.convert.budget.mix import Measured
from rehead.convert.budget.options import CurveOptions
from rehead.convert.budget.search import uniform
from rehead.convert.budget.survey import Survey, survey
from rehead.models.live import resolve_device
from rehead.models.model import open_model
from rehead.options import takes

#: Shares of the cache that the curve is drawn at, and those that are measured by default.
SHARES = (0.75, 0.66, 0.5, 0.4, 0.33, 0.25, 0.2, 0.125)
MEASURED = (0.5, 0.33, 0.25)


@dataclass(frozen=True)
class Point:
    """One choice on the curve.

    Attributes:
        name: ``mix`` for a choice layer by layer, or the option that all layers take.
        share: of the model's cache.
        bytes: of the cache at the context.
        attention_flops: operations on the cache for one more token.
        decode_seconds: of attention in one step of decoding, over all layers; None where it was not timed.
        predicted: loss that the estimates give, nats per token; text and probes together.
        kl: measured on running text, nats per token; None where it was not.
        recall_kl: measured on the probes.
        recalled: share of what the original copies from afar that is still copied.
        layers: option of each layer that changes.
        budget: share of the cache that a mix had to keep within; None for other points.
    """

    name: str
    share: float
    bytes: int
    attention_flops: int
    predicted: float
    kl: float | None = None
    recall_kl: float | None = None
    recalled: float | None = None
    layers: dict[int, str] = field(default_factory=dict)
    budget: float | None = None
    decode_seconds: float | None = None

    @property
    def loss(self) -> float | None:
        """What was measured of what is predicted."""
        return None if self.kl is None else self.kl + (self.recall_kl or 0.0)


@dataclass(frozen=True)
class Curve:
    """What every budget would cost.

    Attributes:
        model: the model's name.
        context: tokens at which caches are compared.
        bytes: of the cache as it is.
        points: by falling bytes, mixes first.
        blocked: options that this model cannot have, and why.
        facts: what was run on which text.
    """

    model: str
    context: int
    bytes: int
    points: list[Point]
    blocked: dict[str, str]
    facts: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def best_plain(self, mix: Point) -> Point | None:
        """The point with one option in all layers that loses least, as measured, within the budget of a mix."""
        plain = [
            (point.loss, point)
            for point in self.points
            if point.budget is None and point.loss is not None and point.share <= (mix.budget or mix.share)
        ]
        return min(plain, key=lambda pair: pair[0])[1] if plain else None

    def comparisons(self) -> list[str]:
        """A sentence for each mix that was measured: how much it loses, and one option for all layers instead."""
        said = []
        for mix in self.points:
            if mix.budget is None or mix.loss is None:
                continue
            plain, start = self.best_plain(mix), f"{mix.budget:.0%} of the cache: {mix.loss:.3g} nats layer by layer"
            if plain is None or plain.loss is None:
                said.append(f"{start}; no form has been measured in all layers at that size")
            else:
                times = f"{mix.loss / plain.loss:.2f} times " if plain.loss else ""
                said.append(f"{start}, {times}the {plain.loss:.3g} of {plain.name} in all layers")
        return said


@takes(CurveOptions)
def curve(
    model: str | os.PathLike[str],
    *,
    device: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Curve:
    """Quality against cache for a model: the best mix of all layers' options at several budgets, and each option alone.

    Args:
        model: a local folder or a Hub id.
        device: where it runs: ``auto``, ``cpu``, ``cuda``, ...
        revision: Hub revision.
        progress: called with (stage, done, total).

    Raises:
        UsageError: an invalid argument.
        UnsupportedError: a model that cannot be run, or has no option with a smaller cache.
    """
    asked = CurveOptions.parse(options)
    where = resolve_device(device)
    opened = open_model(model, revision)
    with opened.source, survey(opened, asked, where, progress) as prepared:
        library = prepared.options
        ways, refused = holders(opened, library, asked.engine)
        if not ways:
            raise none_served(asked.engine, refused)
        plain = _best_of_each(prepared, [way.name for way in ways if way.name in library.names])
        points, rivals = [], set()
        for share in SHARES:
            budget = int(library.whole * share)
            choices = [choice for way in ways if (choice := way.predicted(prepared.predictor, budget)) is not None]
            if not choices:
                break
            measure = asked.measure and share in MEASURED
            choice = min(choices, key=prepared.predictor.loss)
            points.append(_point(prepared, "mix", choice, measure, share))
            within = [name for name, each in plain.items() if library.total(each) <= budget]
            if measure and within:  # the others are predicted to lose more for as many bytes
                rivals.add(min(within, key=lambda name: prepared.predictor.loss(plain[name])))
        points += [_point(prepared, name, choice, name in rivals) for name, choice in plain.items()]
        points.sort(key=lambda point: (point.name != "mix", -point.bytes))
        facts = prepared.facts
    if asked.decode_batch:
        points, facts["decoding"] = _timed(points, library, DecodeTimes(library.context, asked.decode_batch, where))
    return Curve(opened.source.id, library.context, library.whole, points, refused, facts)


def _timed(points: list[Point], library: Library, times: DecodeTimes) -> tuple[list[Point], dict[str, Any]]:
    """(the points with their time in decoding, what was timed and the original's time)."""

    def total(layers: Mapping[int, str]) -> float:
        return times.total(library.option(layer, layers.get(layer, "")).layout for layer in library.layers)

    timed = [replace(point, decode_seconds=total(point.layers)) for point in points]
    return timed, {"batch": times.batch, "original_seconds": total({})}


def _best_of_each(prepared: Survey, names: Sequence[str]) -> dict[str, Choice]:
    """The plain choices by the option that all layers take; of one kind and size the better, as predicted."""
    options = prepared.options
    best: dict[tuple[str, int], tuple[str, Choice]] = {}
    for name in names:
        choice = uniform(options, name)
        kind = name.partition(":")[0]
        size = ("heads" if kind in ("pool", "uneven") else kind, options.total(choice))
        if size not in best or prepared.predictor.loss(choice) < prepared.predictor.loss(best[size][1]):
            best[size] = name, choice
    return dict(best.values())


def _point(prepared: Survey, name: str, choice: Choice, measure: bool, budget: float | None = None) -> Point:
    options = prepared.options
    measured: Measured | None = prepared.meter.measure(choice) if measure else None
    return Point(
        name=name,
        share=round(options.total(choice) / options.whole, 4),
        bytes=options.total(choice),
        attention_flops=flops(options, choice),
        predicted=round(prepared.predictor.loss(choice), 6),
        kl=None if measured is None else round(measured.kl, 6),
        recall_kl=None if measured is None else round(measured.recall_kl, 6),
        recalled=None if measured is None else measured.recalled,
        layers={layer: option.name for layer, option in sorted(choice.items()) if option.name},
        budget=budget,
    )


def flops(options: Library, choice: Choice) -> int:
    """Operations on the whole model's cache for one more token at the library's context."""
    taken = (choice.get(layer, each[0]) for layer, each in options.layers.items())
    return sum(option.layout.attention_flops(options.context) for option in taken)


def summary(layers: dict[int, str], count: int) -> str:
    """A choice in a few words: how many layers take which option."""
    taken = Counter(layers.values())
    kept = count - len(layers)
    parts = [f"{number} x {name}" for name, number in taken.most_common()]
    return ", ".join([*parts, *([f"{kept} as they are"] if kept else [])])
