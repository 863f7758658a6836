"""The texts that choices are measured on: running text, and probes of what it hardly shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rehead.convert.budget.mix import Sample
from rehead.data.calibration import CalibrationText, load_calibration
from rehead.models.model import Model
from rehead.models.recall import BLOCK, LEAD, recall_texts

#: Tokens of a probe's distance at most, and texts of each probe.
_FARTHEST, _TRIALS = 1024, 2


def running_text(model: Model, texts: Any, tokens: int, length: int, seed: int) -> CalibrationText:
    """Text to measure on: other excerpts than those to calibrate on, where the texts are long enough."""
    vocabulary = int(model.config.vocab_size)
    return load_calibration(texts, model.source, vocabulary, max(tokens, length), (length,), seed + 1)


def samples(model: Model, text: CalibrationText, seed: int = 0) -> list[Sample]:
    """Running text, and copying from as far back as it and the model's positions allow.

    Args:
        model: an open checkpoint.
        text: sequences of one length.
        seed: of the probes.
    """
    tokens = text.tokens[0]
    length = tokens.shape[1]
    made = [Sample("text", tokens, torch.ones(length, dtype=torch.bool))]
    positions = getattr(model.config, "max_position_embeddings", None) or length
    distance = min(_FARTHEST, length, positions - LEAD - BLOCK)
    if distance >= BLOCK:
        for probe in recall_texts(tokens.flatten(), [distance], kinds=("copy",), trials=_TRIALS, seed=seed):
            made.append(_of_probe(f"{probe.kind} at {probe.distance}", probe.tokens, probe.recalled, probe.answers))
    return made


def _of_probe(name: str, tokens: Tensor, recalled: Tensor, answers: Tensor) -> Sample:
    scored = torch.zeros(tokens.shape[1] - 1, dtype=torch.bool)
    scored[-len(recalled) :] = recalled
    return Sample(name, tokens[:, :-1], scored, answers)
