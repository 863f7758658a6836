"""An attention function that shows what it computes: queries, keys and probabilities as the model itself has them.

It goes through transformers' attention interface under a name of its own, so norms, rotary positions, windows, sinks
and soft caps are whatever the model's own code makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor, nn

PROBE = "rehead_probe"


@dataclass(frozen=True)
class Seen:
    """What one attention call computed, for the R queries that are looked at.

    Attributes:
        scores: scaled dot products before soft cap and mask, [b, H, R, S].
        probabilities: [b, H, R, S].
        visible: which keys a query may see, broadcastable to the scores.
        scaling: the factor on the dot products.
    """

    scores: Tensor
    probabilities: Tensor
    visible: Tensor
    scaling: float


class Observed(Exception):
    """The probed attention has been seen; the rest of the layer is not needed."""


Observer = Callable[[Seen], None]

#: Whom to show what, and the positions of the queries that they want to see, int64 [R]; each thread has its own.
_observers: ContextVar[tuple[tuple[Observer, Tensor], ...]] = ContextVar("rehead_observers", default=())


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
) -> Never:
    """Plain attention for some of the queries, shown to the observers and to nobody else.

    Rows that nobody looks at are not computed, so that a long sequence costs R x S memory, not S x S.

    Args:
        query: [b, H, S, D]; key, value: [b, K, S, D].
        attention_mask: additive or boolean, [b or 1, 1 or H, S, S]; None for causal.

    Raises:
        Observed: always, when all have seen it; whoever runs the layer stops there.
    """
    for observer, rows in _observers.get():
        observer(_seen(query, key, rows, attention_mask, scaling, softcap, s_aux))
    raise Observed


def _seen(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Seen:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    asked = query[:, :, rows].unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the queries of a KV head in one product
    shown = (asked @ key.transpose(-1, -2)).reshape(*query.shape[:2], len(rows), -1).float() * scale
    scores = shown if softcap is None else softcap * torch.tanh(shown / softcap)
    if attention_mask is None:
        seen = (torch.arange(key.shape[2], device=key.device) <= rows[:, None])[None, None]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    elif attention_mask.dtype == torch.bool:
        seen = attention_mask[:, :, rows]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    else:
        mask = attention_mask[:, :, rows]
        seen = mask > torch.finfo(mask.dtype).min / 2
        scores = scores + mask
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores)
        probabilities = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return Seen(shown, probabilities, seen, scale)


def register_probe() -> None:
    """Make the probe known to transformers, with the mask that eager attention gets."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(PROBE, probe_attention)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def observing(observer: Observer, rows: Tensor) -> Iterator[None]:
    """Show the queries at ``rows`` (int64 [R]) of the probed attention inside the block to ``observer``.

    The block ends there: what follows the attention is not run.
    """
    token = _observers.set((*_observers.get(), (observer, rows)))
    try:
        yield
    except Observed:
        pass
    finally:
        _observers.reset(token)
