"""Proof that packed documents do not see each other in a model."""

from __future__ import annotations

from typing import Any

import torch

from rehead.errors import UnsupportedError
from rehead.models.modes import evaluating

_LENGTH = 12
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def prove_isolation(model: Any, name: str) -> float:
    """Run two documents packed into one row, and again with another first document: the second must not notice.

    Args:
        model: a causal language model; its attention is told of documents by ``position_ids`` that restart.
        name: what to call it.

    Returns:
        The largest change of the second document's logits, relative to their size.

    Raises:
        UnsupportedError: it did notice.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (2, 2 * _LENGTH), generator=generator)
    rows[1, _LENGTH:] = rows[0, _LENGTH:]
    positions = torch.arange(_LENGTH).repeat(2).expand(2, -1)
    with evaluating(model):
        logits = model(input_ids=rows.to(device), position_ids=positions.to(device), use_cache=False).logits
        alone = model(input_ids=rows[:1, _LENGTH:].to(device), use_cache=False).logits[0].float()
    packed = logits[:, _LENGTH:].float()
    size = packed.abs().max().clamp_min(1e-6)
    seen = float((packed[0] - packed[1]).abs().max() / size)
    moved = float((packed[0] - alone).abs().max() / size)
    limit = _TOLERANCE.get(dtype, 5e-2)
    if not (seen <= limit and moved <= limit):  # what is no number is over it
        raise UnsupportedError(
            f"{name}: packed documents see each other in this class (logits change by {max(seen, moved):.1e}); "
            "train with --packing joined"
        )
    return max(seen, moved)
