"""A checkpoint beside another on a little text, both read from disk as they run."""

from __future__ import annotations

from typing import Any

import torch

from rehead.checkpoints.source import Source
from rehead.data.sample import Sample
from rehead.models.config import resolve_config
from rehead.models.distance import Distances, distances
from rehead.models.predictions import vocabulary
from rehead.models.streamed import stream

#: Of the logits of each model that are in memory at once.
_LOGIT_BYTES = 256 << 20


@torch.no_grad()
def compare(source: Source, result: Source, text: Sample, device: torch.device) -> Distances:
    """How far one checkpoint is from another, both read from disk as they run."""
    models: list[Any] = [stream(part, resolve_config(part.config, part.id), device) for part in (source, result)]
    parts = []
    at_once = max(1, _LOGIT_BYTES // (4 * text.tokens.shape[1] * max(1, vocabulary(models[0]))))
    for rows in text.tokens.to(device).split(at_once):
        inputs = {"input_ids": rows, **({"decoder_input_ids": rows} if models[0].config.is_encoder_decoder else {})}
        parts.append(distances(*(model(**inputs, use_cache=False).logits for model in models)))
    return Distances.cat(parts)
