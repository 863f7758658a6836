"""Choices that the estimates alone find: fast, and as good as second-order predictions are."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from rehead.convert.budget.library import Choice, Library, Option
from rehead.convert.budget.prepare import Estimates


@dataclass(frozen=True)
class Move:
    """One layer's change to another option, or two layers' at once.

    Attributes:
        changes: index of each layer -> its new option.
        predicted: the predicted loss of the choice after it.
        total: bytes of the cache after it.
    """

    changes: dict[int, Option]
    predicted: float
    total: int


class Predictor:
    """Predicted losses of choices and of their neighbours, from the products of all effects with one another."""

    def __init__(self, options: Library, estimates: Estimates) -> None:
        self.options = options
        self.keys = list(estimates.effects)
        self.index = {key: at for at, key in enumerate(self.keys)}
        if self.keys:
            effects = torch.stack([estimates.effects[key] for key in self.keys]).double()
            self.gram: Tensor = (effects @ effects.T / 2).cpu()
        else:
            self.gram = torch.zeros(0, 0, dtype=torch.float64)

    def among(self, options: Library) -> Predictor:
        """The same for fewer options of the same layers."""
        fewer = copy.copy(self)
        fewer.options = options
        return fewer

    def loss(self, choice: Choice) -> float:
        """The predicted loss of a choice."""
        rows = [self.index[layer, option.name] for layer, option in choice.items() if option.name]
        return float(self.gram[rows][:, rows].sum()) if rows else 0.0

    def moves(self, choice: Choice) -> list[Move]:
        """Every change of one layer."""
        return [
            self._after(choice, {layer: option})
            for layer, options in self.options.layers.items()
            for option in options
            if option.name != self._at(choice, layer).name
        ]

    def swaps(self, choice: Choice, budget: int) -> list[Move]:
        """Every change of one layer to a dearer option and another to a cheaper one within ``budget`` bytes."""
        total, size = self.options.total(choice), self.options.bytes_of
        up: list[tuple[int, Option, int]] = []
        down: list[tuple[int, Option, int]] = []
        for layer, options in self.options.layers.items():
            now = self._at(choice, layer)
            for option in options:
                (up if size(option) > size(now) else down).append((layer, option, size(option) - size(now)))
        down = [entry for entry in down if entry[1].name != self._at(choice, entry[0]).name]
        return [
            self._after(choice, {a: raised, b: lowered})
            for a, raised, more in up
            for b, lowered, less in down
            if a != b and total + more + less <= budget
        ]

    def improved(self, choice: Choice, budget: int, rounds: int = 200) -> dict[int, Option]:
        """A choice near another with the least predicted loss that ``budget`` bytes allow; steps that help, in turn."""
        now, loss = dict(choice), self.loss(choice)
        for _ in range(rounds):
            steps = [move for move in self.moves(now) if move.total <= budget]
            best = min([*steps, *self.swaps(now, budget)], key=lambda move: move.predicted, default=None)
            if best is None or best.predicted >= loss * (1 - 1e-9):
                break
            now, loss = {**now, **best.changes}, best.predicted
        return now

    def forward(self, budget: int) -> dict[int, Option]:
        """The choice that adding one change after another gives, the cheapest in loss per byte saved first."""
        choice: dict[int, Option] = {}
        total = self.options.total(choice)
        while total > budget:
            best = self.next_moves(choice, budget)
            if not best:
                break
            choice, total = {**choice, **best[0].changes}, best[0].total
        return choice

    def next_moves(self, choice: Choice, budget: int) -> list[Move]:
        """Changes of one layer that save bytes, the least predicted loss per byte first; bytes beyond ``budget`` are
        worth nothing."""
        total, loss = self.options.total(choice), self.loss(choice)
        saving = [move for move in self.moves(choice) if move.total < total]
        return sorted(saving, key=lambda move: (move.predicted - loss) / (total - max(move.total, budget)))

    def _at(self, choice: Choice, layer: int) -> Option:
        return choice.get(layer, self.options.layers[layer][0])

    def _after(self, choice: Choice, changes: dict[int, Option]) -> Move:
        total = self.options.total(choice)
        rows = [self.index[layer, option.name] for layer, option in choice.items() if option.name]
        weight = torch.zeros(len(self.keys), dtype=torch.float64)
        weight[rows] = 1
        for layer, option in changes.items():
            before = self._at(choice, layer)
            total += self.options.bytes_of(option) - self.options.bytes_of(before)
            if before.name:
                weight[self.index[layer, before.name]] -= 1
            if option.name:
                weight[self.index[layer, option.name]] += 1
        return Move(changes, float(weight @ self.gram @ weight), total)


def uniform(options: Library, name: str) -> dict[int, Option]:
    """Every layer in the option of one name."""
    return {layer: options.option(layer, name) for layer in options.layers}


def patterns(options: Library, name: str, budget: int) -> dict[str, dict[int, Option]]:
    """Plain choices that put as few layers as ``budget`` bytes allow into one option: first, last, spread evenly.

    Returns:
        A choice by the pattern's name; empty where even all layers would not do.
    """
    layers = list(options.layers)
    if options.total(uniform(options, name)) > budget:
        return {}
    made: dict[str, dict[int, Option]] = {}
    for pattern in ("first", "last", "alternate"):
        for count in range(len(layers) + 1):
            spread = {round(at * len(layers) / max(1, count)) for at in range(count)}
            picked = {
                "first": layers[:count],
                "last": layers[len(layers) - count :],
                "alternate": [layer for at, layer in enumerate(layers) if at in spread],
            }[pattern]
            choice = {layer: options.option(layer, name) for layer in picked}
            if options.total(choice) <= budget:
                made[pattern] = choice
                break
    return made
