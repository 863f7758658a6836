"""Sweeps: one recipe and its axes become independent cells, each a recipe of its own."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

from rehead.errors import UsageError
from rehead.recipes.pipeline.load import put

HEADS = "convert.num_key_value_heads"
MAX_CELLS = 10_000


@dataclass(frozen=True)
class Cell:
    """One point of a sweep.

    Attributes:
        index: its number, from 0, for ``--cell``.
        label: what sets it apart, e.g. ``"2 KV heads, svd"``; empty for a recipe without a sweep.
        series: the same without the number of KV heads, so that a curve over it has one name.
        overrides: the dotted keys that it sets.
        raw: the recipe with them set, without a sweep.
    """

    index: int
    label: str
    series: str
    overrides: dict[str, Any] = field(hash=False)
    raw: dict[str, Any] = field(hash=False)


def cells(raw: dict[str, Any], where: str) -> list[Cell]:
    """The cells of a recipe, the last axis running fastest; one cell where there is no sweep.

    Args:
        raw: the recipe's keys.
        where: its origin, for messages.

    Raises:
        UsageError: an axis is empty, of the wrong form, sets a key that another sets, or the product is absurd; or two
            cells have one name.
    """
    base = {key: value for key, value in raw.items() if key != "sweep"}
    sweep = raw.get("sweep")
    if not sweep:
        return [Cell(0, "", "", {}, base)]
    if not isinstance(sweep, dict):
        raise UsageError(f"{where}: sweep is no mapping; write `sweep: {{convert.method: [mean, svd]}}`")
    axes = [_axis(name, values, where) for name, values in sweep.items()]
    seen: dict[str, str] = {}
    count = 1
    for name, points in zip(sweep, axes):
        for key in {key for _, overrides in points for key in overrides}:
            if key in seen:
                raise UsageError(f"{where}: sweep: {name} and {seen[key]} both set {key}; put it into one of them")
            seen[key] = name
        count *= len(points)
    if count > MAX_CELLS:
        raise UsageError(f"{where}: sweep has {count:,} cells; more than {MAX_CELLS:,} is surely a mistake")
    found = []
    for index, point in enumerate(itertools.product(*axes)):
        overrides = {key: value for _, values in point for key, value in values.items()}
        table = copy.deepcopy(base)
        for key, value in overrides.items():
            put(table, key, value, f"{where}: sweep: {key}")
        labels = [label for label, _ in point]
        others = [label for label, values in point if list(values) != [HEADS]]
        found.append(Cell(index, ", ".join(labels), ", ".join(others), overrides, table))
    names = [cell.label for cell in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(
            f"{where}: sweep: two cells are called {twice!r}; leave one out, or name the points of its axis"
        )
    return found


def _axis(name: str, values: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """The points of an axis: (label, dotted keys it sets)."""
    if isinstance(values, list) and values:
        return [(label_of(name, value), {name: value}) for value in values]
    if isinstance(values, dict) and values and all(isinstance(point, dict) for point in values.values()):
        return [(str(label), dict(point)) for label, point in values.items()]
    raise UsageError(
        f"{where}: sweep: {name} is {values!r}; give it a list of values, or names with a mapping of keys each"
    )


def label_of(key: str, value: Any) -> str:
    """``"2 KV heads"``, ``"svd"``, ``"tokens 8M"``."""
    if key == HEADS:
        return f"{value} KV head{'s' if value != 1 else ''}"
    short = key.rsplit(".", 1)[-1]
    if short == "method":
        return str(value)
    return f"{short} {value}"
