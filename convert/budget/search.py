"""Choices that the estimates alone find: fast, and as good as second-order predictions are."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rehead.convert.budget.library import Choice, Library, Option
from rehead.convert.budget.prepare import Estimates

#: Changes of two layers that are looked at.
_SWAPS = 16


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
        self.index = {key: at for at, key in enumerate(self.keys)} | {
            (layer, ""): len(self.keys) for layer in options.layers
        }
        if self.keys:
            effects = torch.stack([estimates.effects[key] for key in self.keys]).double()
            gram = (effects @ effects.T / 2).cpu()
        else:
            gram = torch.zeros(0, 0, dtype=torch.float64)
        # The last row and column are those of a layer that does not change, which has no effect.
        self.gram: Tensor = nn.functional.pad(gram, (0, 1, 0, 1))

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
        return _Changes.of(self, choice).moves()

    def swaps(self, choice: Choice, budget: int, most: int = _SWAPS) -> list[Move]:
        """The changes of two layers with the least predicted loss within ``budget`` bytes, ``most`` of them at most."""
        return _Changes.of(self, choice).swaps(budget, most)

    def improved(self, choice: Choice, budget: int, rounds: int = 200) -> dict[int, Option]:
        """A choice near another with the least predicted loss that ``budget`` bytes allow; steps that help, in turn."""
        now, loss = dict(choice), self.loss(choice)
        for _ in range(rounds):
            changes = _Changes.of(self, now)
            steps = [move for move in changes.moves() if move.total <= budget]
            best = min([*steps, *changes.swaps(budget)], key=lambda move: move.predicted, default=None)
            if best is None or best.predicted >= loss * (1 - 1e-9):
                break
            now, loss = {**now, **best.changes}, best.predicted
        return now

    def forward(self, budget: int) -> dict[int, Option]:
        """The choice that adding one change after another gives, the cheapest in loss per byte saved first."""
        return self.path(budget)[-1]

    def path(self, budget: int) -> list[dict[int, Option]]:
        """The choices on the way to :meth:`forward`'s, from none."""
        choices: list[dict[int, Option]] = [{}]
        while self.options.total(choices[-1]) > budget:
            best = self.next_moves(choices[-1], budget)
            if not best:
                break
            choices.append({**choices[-1], **best[0].changes})
        return choices

    def next_moves(self, choice: Choice, budget: int) -> list[Move]:
        """Changes of one layer that save bytes, the least predicted loss per byte first; bytes beyond ``budget`` are
        worth nothing."""
        total, loss = self.options.total(choice), self.loss(choice)
        saving = [move for move in self.moves(choice) if move.total < total]
        return sorted(saving, key=lambda move: (move.predicted - loss) / (total - max(move.total, budget)))

    def at(self, choice: Choice, layer: int) -> Option:
        """The option that a layer has in a choice."""
        return choice.get(layer, self.options.layers[layer][0])


@dataclass
class _Changes:
    """Every change of one layer of a choice.

    Attributes:
        made: (layer, its new option) of each.
        taken, left: int64 [changes], where the option that a change takes and the one that it leaves are among the
            predictor's; one past the last for a layer that does not change.
        products: [changes, options + 1]: the effects of each change times those of each option, halved.
        predicted: predicted loss after each; of none of them: ``loss``.
        totals: bytes after each; of none of them: ``total``.
    """

    made: list[tuple[int, Option]]
    taken: Tensor
    left: Tensor
    products: Tensor
    predicted: Tensor
    totals: Tensor
    loss: float
    total: int

    @classmethod
    def of(cls, predictor: Predictor, choice: Choice) -> _Changes:
        options, gram, index = predictor.options, predictor.gram, predictor.index
        made = [
            (layer, option)
            for layer, each in options.layers.items()
            for option in each
            if option.name != predictor.at(choice, layer).name
        ]
        befores = [predictor.at(choice, layer) for layer, _ in made]
        saved = [options.bytes_of(option) - options.bytes_of(before) for (_, option), before in zip(made, befores)]
        taken = torch.tensor([index[layer, option.name] for layer, option in made], dtype=torch.int64)
        left = torch.tensor([index[layer, before.name] for (layer, _), before in zip(made, befores)], dtype=torch.int64)
        now = [index[layer, option.name] for layer, option in choice.items() if option.name]
        loss, total, products = float(gram[now][:, now].sum()), options.total(choice), gram[taken] - gram[left]
        rows = torch.arange(len(made))
        predicted = loss + 2 * products[:, now].sum(1) + products[rows, taken] - products[rows, left]
        totals = torch.tensor(saved, dtype=torch.int64) + total
        return cls(made, taken, left, products, predicted, totals, loss, total)

    def moves(self) -> list[Move]:
        """Each change."""
        every = zip(self.made, self.predicted.tolist(), self.totals.tolist())
        return [Move({layer: option}, predicted, total) for (layer, option), predicted, total in every]

    def swaps(self, budget: int, most: int = _SWAPS) -> list[Move]:
        """As :meth:`Predictor.swaps`."""
        if not self.made:
            return []
        predicted = self.pairs()
        totals = self.totals[:, None] + self.totals[None] - self.total
        predicted[totals > budget] = torch.inf
        best = predicted.flatten().topk(min(most, predicted.numel()), largest=False)
        count = len(self.made)
        return [
            Move(dict((self.made[at // count], self.made[at % count])), loss, int(totals.flatten()[at]))
            for loss, at in zip(best.values.tolist(), best.indices.tolist())
            if loss < torch.inf
        ]

    def pairs(self) -> Tensor:
        """Predicted loss after any two changes, [changes, changes]; infinite for two of one layer and below the
        diagonal."""
        both = 2 * (self.products[:, self.taken] - self.products[:, self.left])
        predicted = self.predicted[:, None] + self.predicted[None] - self.loss + both
        layers = torch.tensor([layer for layer, _ in self.made])
        apart = (layers[:, None] != layers[None]).triu(1)
        return predicted.masked_fill(~apart, torch.inf)


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
