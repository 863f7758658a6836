"""Keys in a cache that were rotated for a shorter text than the present one, under RoPE whose frequencies change."""

from __future__ import annotations

from typing import Any

import torch

from rehead.errors import UsageError
from rehead.models.families.spec import changing_rope, steady_length
from rehead.models.modeling.modeling_rehead_cache import passed_cache


def refuse_stale_keys(kind: str, limit: int, cached: int, start: int, end: int) -> None:
    """Refuse a text that outgrows a length over a cache of keys which were rotated for a shorter one.

    Args:
        kind: of RoPE: ``dynamic`` changes with every token beyond the limit, others change once.
        limit: tokens that are read under the original frequencies.
        cached: keys in the cache.
        start, end: positions [start, end) of the tokens that are read now.

    Raises:
        UsageError: keys in the cache would be wrong.
    """
    if cached and end > limit and (kind == "dynamic" or start <= limit):
        raise UsageError(
            f"rope_type {kind}: the text passes {limit} tokens, where its frequencies change, over a cache of {cached} "
            "keys that were rotated for less; read it again in one pass without that cache, or use yarn, whose "
            "frequencies stay"
        )


def refuse_stale_call(config: Any, kwargs: dict[str, Any], tokens: Any) -> None:
    """:func:`refuse_stale_keys` for a call of a whole model, whose config says how its RoPE changes.

    Args:
        config: resolved.
        kwargs: arguments of the model's forward pass.
        tokens: ``input_ids`` or ``inputs_embeds``, ``[B, S, ...]``.

    Raises:
        UsageError: as :func:`refuse_stale_keys`.
    """
    if (kind := changing_rope(config)) is None or torch.compiler.is_compiling():
        return
    cache, limit = passed_cache(kwargs), steady_length(config)
    if limit is None or cache is None or tokens is None:
        return
    cached, places = int(cache.get_seq_length()), kwargs.get("position_ids")
    end = cached + tokens.shape[1] if places is None else int(places.max()) + 1
    refuse_stale_keys(kind, limit, cached, end - tokens.shape[1], end)
