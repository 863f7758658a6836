"""Choosing every layer's form within a budget, by what is measured on the model as it changes.

What single layers lose does not add up: fifteen layers that lose little alone may lose fifteen times as much together.
So estimates only say what to try. The first layers to change, which hardly lose anything, are taken as predicted; the
last ones are changed one after another, each time the one whose change measures best beside all changes before it; then
pairs of layers swap; and what comes out is compared with the plain choices of the same bytes (one option everywhere, in
the first layers, in the last, in every other one), of which the best would win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rehead.console import Progress
from rehead.convert.budget.library import Choice, Library, Option
from rehead.convert.budget.mix import Measured, Meter
from rehead.convert.budget.search import Move, Predictor, patterns, uniform
from rehead.errors import UsageError

#: Changes measured at a step at most, and how much more than predicted the first may cost to be taken at once.
_WIDTH, _SURPRISE = 3, 1.5
#: Losses below this are noise between changes.
_FLOOR = 1e-4
#: Changes at the end of a choice that are measured one by one; those before them lose so little that the estimates do.
_STEPS = 8
#: Pairs of layers that are tried at the end.
_SWAPS = 6


@dataclass(frozen=True)
class Rival:
    """A plain choice within the same budget."""

    name: str
    total: int
    measured: Measured


@dataclass
class Selection:
    """The form of each layer, and why.

    Attributes:
        choice: layer -> option, of the layers that change.
        total: bytes of the cache.
        predicted: the loss that the estimates gave.
        measured: what was measured, in closed form: fits come later.
        origin: how it was found: ``sequential``, ``predicted``, or the plain choice that was no worse.
        path: (layer, option's name, bytes, measured loss), in the order of the changes.
        rivals: the plain choices, best first.
    """

    choice: dict[int, Option]
    total: int
    predicted: float
    measured: Measured
    origin: str
    path: list[tuple[int, str, int, float]] = field(default_factory=list)
    rivals: list[Rival] = field(default_factory=list)


def check_budget(options: Library, budget: int) -> None:
    """Refuse a budget that no choice meets.

    Raises:
        UsageError: with the nearest budget that can be met and what stands in the way.
    """
    if budget >= options.least:
        return
    share = options.least / options.whole
    dearest = min(options.layers, key=lambda layer: len(options.layers[layer]))
    rigid = [layer for layer, choices in options.layers.items() if len(choices) == 1]
    reason = (
        f"layer {rigid[0]} has no other form" if rigid else f"its smallest form is {options.layers[dearest][-1].name}"
    )
    blocked = "".join(f"; {name}: {why}" for name, why in list(options.blocked.items())[:2])
    raise UsageError(
        f"--kv-cache: {budget:,} bytes at {options.context:,} tokens cannot be met; the nearest is {options.least:,} "
        f"({share:.1%}), since {reason}{blocked}"
    )


def select(
    options: Library, predictor: Predictor, meter: Meter, budget: int, progress: Progress | None = None
) -> Selection:
    """The best choice within ``budget`` bytes.

    Args:
        options: every layer's options.
        predictor: of losses.
        meter: of losses.
        budget: bytes at the library's context.
        progress: called with ("choosing", bytes saved, bytes to save).

    Raises:
        UsageError: no choice meets the budget.
    """
    check_budget(options, budget)
    path: list[tuple[int, str, int, float]] = []
    predicted = predictor.path(budget)
    start = predicted[max(0, len(predicted) - 1 - _STEPS)]
    choice = dict(start)
    for choice, measured in steps(options, predictor, meter, budget, start):
        layer = next(reversed(choice))
        path.append((layer, choice[layer].name, options.total(choice), measured.loss))
        if progress is not None:
            progress("choosing", options.whole - options.total(choice), options.whole - budget)
    contenders = {"sequential": choice, "predicted": predictor.improved(predicted[-1], budget)}
    contenders["sequential, then improved"] = predictor.improved(choice, budget)
    rivals = plain_choices(options, budget)
    results = {name: meter.measure(each) for name, each in (contenders | rivals).items()}
    best = min(results, key=lambda name: results[name].loss)
    choice = _swapped(predictor, meter, (contenders | rivals)[best], budget)
    measured = meter.measure(choice)
    told = [Rival(name, options.total(each), results[name]) for name, each in rivals.items()]
    return Selection(
        choice=dict(sorted((layer, option) for layer, option in choice.items() if option.name)),
        total=options.total(choice),
        predicted=predictor.loss(choice),
        measured=measured,
        origin=best,
        path=path,
        rivals=sorted(told, key=lambda rival: rival.measured.loss),
    )


def steps(options: Library, predictor: Predictor, meter: Meter, budget: int, start: Choice | None = None):
    """Change one layer after another until ``budget`` bytes are met, from a choice or from none.

    Yields:
        (the choice so far, its last entry the newest; what it measures).
    """
    choice = dict(start or {})
    loss = meter.measure(choice).loss if choice else 0.0
    while options.total(choice) > budget:
        moves = predictor.next_moves(choice, budget)
        if not moves:
            return
        move = _best_measured(options, predictor, meter, choice, moves, loss, budget)
        ((layer, option),) = move.changes.items()
        choice = {key: value for key, value in choice.items() if key != layer} | {layer: option}
        measured = meter.measure(choice)
        loss = measured.loss
        yield choice, measured


def smallest(
    options: Library, predictor: Predictor, meter: Meter, kl: float, progress: Progress | None = None
) -> Selection:
    """The smallest cache whose choice loses at most ``kl`` nats per token on running text.

    Raises:
        UsageError: no change at all stays within it.
    """
    within, first = options.whole, None
    for choice, measured in steps(options, predictor, meter, options.least):
        first = measured.kl if first is None else first
        if measured.kl > kl:
            break
        within = options.total(choice)
    if within == options.whole:
        raise UsageError(f"--kl {kl:g}: the change that loses least loses {first or 0:.3g} nats; allow that or more")
    return select(options, predictor, meter, within, progress)


def plain_choices(options: Library, budget: int) -> dict[str, dict[int, Option]]:
    """The plain choices within a budget by name: one option in all layers, or in as few as will do."""
    plain: dict[str, dict[int, Option]] = {}
    kinds: dict[str, str] = {}
    for name in options.names:
        if name and options.total(uniform(options, name)) <= budget:
            kind = name.partition(":")[0]
            if kind not in kinds:  # the dearest that fits
                plain[f"{name} in all layers"] = uniform(options, name)
            kinds[kind] = name
    for name in kinds.values():  # the cheapest of its kind leaves most layers as they are
        for pattern, choice in patterns(options, name, budget).items():
            if len(choice) < len(options.layers):
                plain[f"{name} in the {_WORDS[pattern]}"] = choice
    return plain


_WORDS = {"first": "first layers", "last": "last layers", "alternate": "layers in turn"}


def _best_measured(
    options: Library,
    predictor: Predictor,
    meter: Meter,
    choice: Choice,
    moves: Sequence[Move],
    loss: float,
    budget: int,
) -> Move:
    """The change that costs least per byte as measured; the first that costs what was predicted is taken at once."""
    total, predicted = options.total(choice), predictor.loss(choice)
    best: tuple[float, Move] | None = None
    for move in moves[:_WIDTH]:
        added = meter.measure({**choice, **move.changes}).loss - loss
        rate = added / (total - max(move.total, budget))
        if best is None or rate < best[0]:
            best = rate, move
        if added <= _SURPRISE * max(move.predicted - predicted, 0.0) + _FLOOR:
            break
    assert best is not None
    return best[1]


def _swapped(predictor: Predictor, meter: Meter, choice: Choice, budget: int) -> dict[int, Option]:
    """A choice after the changes of one or two layers that measure better within the budget."""
    now, loss, tries = dict(choice), meter.measure(choice).loss, _SWAPS
    while tries:
        near = [move for move in predictor.moves(now) if move.total <= budget] + predictor.swaps(now, budget)
        near.sort(key=lambda move: move.predicted)
        for move in near[:tries]:
            tries -= 1
            after = {**now, **move.changes}
            if (measured := meter.measure(after).loss) < loss:
                now, loss = after, measured
                break
        else:
            break
    return now
