"""Copying and key-value recall by distance, for every compared model: what a window takes away and prose does not show.

The probes are those of :mod:`rehead.models.recall`; their blocks are words of the text at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rehead.data.beginning import text_start
from rehead.models.positions import readable
from rehead.models.recall import fitting, recall, recall_texts
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.needle import word_tokens


def recall_rows(
    models: Mapping[schema.Who, Any],
    tokens: Tensor,
    tokenizer: Any,
    distances: Sequence[int],
    trials: int = 8,
    seed: int = 0,
    *,
    beyond: bool = False,
    progress: Callable[[float, float], None] | None = None,
) -> tuple[list[schema.RecallRow], list[str]]:
    """Try both probes at every distance; each model reads the same texts.

    Args:
        models: transformers causal language models that share a vocabulary.
        tokens: int64 [T], running text.
        tokenizer: to tell words from other tokens and for BOS; None takes any token of the text as a word.
        distances: tokens back.
        trials: texts of each probe at each distance.
        seed: of words and passages.
        beyond: try distances too that the models were not trained for.
        progress: called with (texts read, texts).

    Returns:
        (rows, notes on distances that were left out and why).

    Raises:
        UsageError: the text has too few words.
    """
    words, start = word_tokens(tokens, tokenizer, "--recall"), text_start(tokenizer)
    rows: list[schema.RecallRow] = []
    notes: list[str] = []
    for at, (who, model) in enumerate(models.items()):
        fits = fitting(distances, model, beyond)
        notes += [
            f"recall at a distance of {distance} left out for the {who}: it has positions for {readable(model, beyond)}"
            for distance in distances
            if distance not in fits
        ]

        def stage(done: float, total: float, at: int = at) -> None:
            if progress is not None:
                progress(at + done / total, len(models))

        texts = recall_texts(tokens, fits, words=words, trials=trials, seed=seed, start=start)
        rows += [schema.RecallRow(who=who, **row.to_dict()) for row in recall(model, texts, stage)]
    return rows, notes
