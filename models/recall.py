"""Two probes of how far back a model looks: copying a random stretch, and giving values by their keys.

Prose hides what a window takes away, since its next words hardly depend on what stands a thousand tokens before them;
these two depend on nothing else::

    copy    running text  [a b c d ...]  running text ... [a b c d ...]
    pairs   running text  [k1 v1 k2 v2 ...]  running text ... [k7 v7 k2 v2 ...]

Every token of the second block but the first can be copied from the first block; in ``pairs`` the second block has
another order, so that a value follows from its key alone. Both take the induction heads that copying, quoting and
retrieval are made of (Olsson et al. 2022, arXiv 2209.11895).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rehead.errors import UsageError
from rehead.models.distance import token_nll
from rehead.models.live import evaluating
from rehead.models.positions import readable
from rehead.models.predictions import Predictions, batch_size, predict

Kind = Literal["copy", "pairs"]
KINDS: tuple[Kind, ...] = ("copy", "pairs")
BLOCK = 64
"""Tokens of a block, fewer where the distance is shorter."""
LEAD = 16
"""Tokens before the first block, so that it does not stand on the tokens that a window keeps as sinks."""
KEY = 2
"""Tokens of a key; its value is one."""
SHORTEST = 2 * (KEY + 1)
"""The shortest distance: that of two pairs."""


@dataclass(frozen=True)
class RecallText:
    """Texts of one probe at one distance.

    Attributes:
        kind: ``copy`` or ``pairs``.
        distance: tokens from a block's start to its second one's; in ``copy`` from every token to its copy.
        tokens: int64 ``[N, S]``.
        recalled: bool ``[L]``, which of the last L tokens of every row follow from the first block.
    """

    kind: Kind
    distance: int
    tokens: Tensor
    recalled: Tensor

    def predictions(self, model: nn.Module) -> Predictions:
        """A model's predictions of the recalled tokens, ``[N recalled]``; the model is in evaluation mode."""
        device, count = next(model.parameters()).device, len(self.recalled)
        parts = [
            predict(model, {"input_ids": rows[:, :-1].to(device)}, count)[:, self.recalled.to(device)]
            for rows in self.tokens.split(batch_size(model, self.tokens.shape[1]))
        ]
        return Predictions.cat(parts)

    @property
    def answers(self) -> Tensor:
        """The recalled tokens, int64 ``[N, recalled]``."""
        return self.tokens[:, -len(self.recalled) :][:, self.recalled]


@dataclass(frozen=True)
class Recall:
    """What a model recalls at one distance.

    Attributes:
        kind: ``copy`` or ``pairs``.
        distance: tokens back.
        top1: share of the recalled tokens that are its most likely ones.
        nll: mean negative log-likelihood of the recalled tokens, nats.
        tokens: how many were asked for.
    """

    kind: Kind
    distance: int
    top1: float
    nll: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def recall_texts(
    tokens: Tensor,
    distances: Iterable[int],
    *,
    kinds: Sequence[Kind] = KINDS,
    words: Tensor | None = None,
    trials: int = 4,
    seed: int = 0,
    start: Tensor | None = None,
    block: int = BLOCK,
) -> list[RecallText]:
    """Texts for both probes at every distance.

    Args:
        tokens: int64 ``[T]``, running text, which stands before and between the blocks.
        distances: tokens from a block to its second one.
        kinds: which probes.
        words: int64 ``[W]``, what blocks are drawn from; all tokens of the text when None.
        trials: rows of each.
        seed: of everything that is drawn.
        start: int64 ``[p]``, how the tokenizer begins a text, if it does.
        block: tokens of a block, fewer where the distance is shorter.

    Raises:
        UsageError: a distance is too short for two pairs.
    """
    pool = torch.unique(tokens) if words is None else words
    tokens, pool = tokens.flatten().cpu(), pool.cpu()
    start = tokens[:0] if start is None else start
    texts = []
    for distance in distances:
        if distance < SHORTEST:
            raise UsageError(f"recall at a distance of {distance}: must be {SHORTEST} or more")
        for kind in kinds:
            make = _copy if kind == "copy" else _pairs
            rows, recalled = [], torch.empty(0)
            for trial in range(trials):
                draw = np.random.default_rng([seed, distance, KINDS.index(kind), trial])
                first, second, recalled = make(pool, min(block, distance), draw)
                lead, between = _passage(tokens, LEAD, draw), _passage(tokens, distance - len(first), draw)
                rows.append(torch.cat([start, lead, first, between, second]))
            texts.append(RecallText(kind, distance, torch.stack(rows), recalled))
    return texts


def length_of(distance: int) -> int:
    """Tokens of a text at a distance, at most, without what the tokenizer begins it with."""
    return LEAD + distance + min(BLOCK, distance)


def fitting(distances: Iterable[int], model: nn.Module, beyond: bool = False) -> list[int]:
    """The distances whose texts a model has positions for; with ``beyond`` also untrained ones."""
    limit = readable(model, beyond)
    return [distance for distance in distances if limit is None or length_of(distance) <= limit]


def recall(
    model: nn.Module, texts: Sequence[RecallText], progress: Callable[[float, float], None] | None = None
) -> list[Recall]:
    """What a model recalls, in the order of the texts.

    Args:
        model: a transformers causal language model.
        texts: of :func:`recall_texts`.
        progress: called with (texts done, texts).
    """
    rows = []
    with evaluating(model):
        for done, text in enumerate(texts, 1):
            predictions, answers = text.predictions(model), text.answers.flatten()
            right = predictions.argmax().cpu() == answers
            nll = token_nll(predictions, answers)
            rows.append(Recall(text.kind, text.distance, float(right.double().mean()), float(nll.mean()), len(answers)))
            if progress is not None:
                progress(done, len(texts))
    return rows


def _copy(pool: Tensor, size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(block, the same again, which of its tokens follow from the first)."""
    block = _drawn(pool, size, draw)
    recalled = torch.ones(size, dtype=torch.bool)
    recalled[0] = False
    return block, block, recalled


def _pairs(pool: Tensor, size: int, draw: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs, the same in another order, which of its tokens are values)."""
    count = size // (KEY + 1)
    pairs = _drawn(pool, count * (KEY + 1), draw).view(count, KEY + 1)
    order = torch.from_numpy(draw.permutation(count))
    return pairs.flatten(), pairs[order].flatten(), (torch.arange(count * (KEY + 1)) + 1) % (KEY + 1) == 0


def _drawn(pool: Tensor, count: int, draw: np.random.Generator) -> Tensor:
    """Tokens of a pool, none twice where there are enough of them."""
    return pool[torch.from_numpy(draw.choice(len(pool), count, replace=len(pool) < count))]


def _passage(tokens: Tensor, length: int, draw: np.random.Generator) -> Tensor:
    """Running text from a random place; begins again where the text ends."""
    first = int(draw.integers(0, max(1, len(tokens) - length + 1)))
    return tokens[(torch.arange(length) + first) % len(tokens)]
