"""Quality gates: limits that an evaluation must keep, for scripts and schedulers that cannot read a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from rehead.errors import QualityError, UsageError, unknown_name

if TYPE_CHECKING:
    from rehead.recipes.evaluation_schema import Evaluation, Gate


def _divergence(field: str) -> Callable[[Evaluation], list[float]]:
    return lambda found: [float(getattr(row, field)) for row in found.divergence if row.who == "model"]


def _perplexity(field: str) -> Callable[[Evaluation], list[float]]:
    def read(found: Evaluation) -> list[float]:
        values = [getattr(row, field) for row in found.perplexity if row.who == "model"]
        return [float(getattr(value, "value", value)) for value in values if value is not None]

    return read


def _needle(found: Evaluation) -> list[float]:
    return [row.hits / row.trials for row in found.needle if row.who == "model"]


def _recall(kind: str) -> Callable[[Evaluation], list[float]]:
    """The model's share of right tokens over the baseline's, or its own where there is no baseline."""

    def read(found: Evaluation) -> list[float]:
        original = {row.distance: row.top1 for row in found.recall if (row.kind, row.who) == (kind, "baseline")}
        rows = [row for row in found.recall if (row.kind, row.who) == (kind, "model")]
        return [row.top1 / (original.get(row.distance, 1.0) or 1.0) for row in rows]

    return read


def _damage(found: Evaluation) -> list[float]:
    return [row.kl for row in found.damage]


#: name -> (what it reads, what must be measured for it). Of several texts, layers or cells the worst counts.
GATES: dict[str, tuple[Callable[[Evaluation], list[float]], str]] = {
    "kl": (_divergence("mean"), "--baseline and --data"),
    "kl-median": (_divergence("median"), "--baseline and --data"),
    "kl-p99": (_divergence("p99"), "--baseline and --data"),
    "kl-max": (_divergence("max"), "--baseline and --data"),
    "top1-agreement": (_divergence("top1_agreement"), "--baseline and --data"),
    "perplexity": (_perplexity("value"), "--data"),
    "perplexity-ratio": (_perplexity("ratio"), "--baseline and --data"),
    "bits-per-byte": (_perplexity("bits_per_byte"), "--data"),
    "damage": (_damage, "--baseline and --damage"),
    "needle": (_needle, "--needle"),
    "copy": (_recall("copy"), "--recall"),
    "pairs": (_recall("pairs"), "--recall"),
}


def check_gates(above: Mapping[str, float], below: Mapping[str, float]) -> None:
    """Refuse names that no gate has.

    Raises:
        UsageError: the name is unknown; the nearest is suggested.
    """
    for flag, limits in (("--fail-above", above), ("--fail-below", below)):
        for name in limits:
            if name.lower() not in GATES:
                raise UsageError(f"{flag}: {unknown_name('gate', name.lower(), GATES)}")


def judge(found: Evaluation, above: Mapping[str, float], below: Mapping[str, float]) -> list[Gate]:
    """Hold an evaluation to its limits; a value that equals its limit passes.

    Raises:
        UsageError: a gate's figure was not measured.
    """
    from rehead.recipes.evaluation_schema import Gate

    gates = []
    sides: list[tuple[Literal["above", "below"], Mapping[str, float]]] = [("above", above), ("below", below)]
    for direction, limits in sides:
        for name, limit in limits.items():
            read, needs = GATES[name.lower()]
            values = read(found)
            if not values:
                raise UsageError(f"--fail-{direction} {name}: was not measured; it needs {needs}")
            value = max(values) if direction == "above" else min(values)
            passed = value <= limit if direction == "above" else value >= limit
            gates.append(Gate(name=name.lower(), limit=limit, value=value, passed=passed, direction=direction))
    return gates


def missing(options_above: Mapping[str, float], options_below: Mapping[str, float], measured: set[str]) -> None:
    """Refuse gates whose figures will not be measured, before hours are spent on those that will.

    Args:
        measured: what there will be: ``baseline``, ``data``, ``damage``, ``needle``, ``recall``.

    Raises:
        UsageError: a gate needs more.
    """
    for flag, limits in (("--fail-above", options_above), ("--fail-below", options_below)):
        for name in limits:
            needs = GATES[name.lower()][1]
            absent = [word for word in needs.replace("--", "").split(" and ") if word not in measured]
            if absent:
                raise UsageError(f"{flag} {name}: needs --{absent[0]}; give it or drop the gate")


def enforce(found: Evaluation, where: str = "") -> None:
    """Raise QualityError where a gate failed; the line names each with its value and limit.

    Args:
        found: with its gates judged.
        where: the report, for the line.
    """
    failed = [gate for gate in found.gates if not gate.passed]
    if failed:
        said = ", ".join(f"{gate.name} {gate.value:.4g} is {gate.direction} {gate.limit:g}" for gate in failed)
        raise QualityError(f"quality gate: {said}" + (f"; see {where}" if where else ""))
