"""An attention function that shows what it computes: queries, keys and probabilities as the model itself has them.

It goes through transformers' attention interface under a name of its own, so norms, rotary positions, windows, sinks
and soft caps are whatever the model's own code makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBE = "rehead_probe"


@dataclass(frozen=True)
class Seen:
    """What one attention call computed.

    Attributes:
        scores: scaled dot products before soft cap and mask, [b, H, S, S].
        probabilities: [b, H, S, S].
        visible: which keys a query may see, broadcastable to the scores.
        scaling: the factor on the dot products.
    """

    scores: Tensor
    probabilities: Tensor
    visible: Tensor
    scaling: float


Observer = Callable[[Seen], None]

_observers: list[Observer] = []


def probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Plain attention that shows its scores and probabilities to the current observer.

    Args:
        query: [b, H, S, D]; key, value: [b, K, S, D].
        attention_mask: additive, [b or 1, 1 or H, S, S]; None for causal.

    Returns:
        ([b, S, H, D], None), as the interface asks.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)).float() * scale
    shown = scores
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = scores.shape[-1]
    if attention_mask is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()[None, None]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    elif attention_mask.dtype == torch.bool:
        seen = attention_mask
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    else:
        seen = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        scores = scores + attention_mask
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores)
        probabilities = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    for observer in _observers:
        observer(Seen(shown, probabilities, seen, scale))
    return (probabilities.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


def register_probe() -> None:
    """Make the probe known to transformers, with the mask that eager attention gets."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(PROBE, probe_attention)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show every probed attention inside the block to ``observer``."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
