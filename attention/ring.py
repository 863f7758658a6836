"""Caches that keep a window, on live models and models with Rehead's modelling file: which positions their keys have.

The layer of the cache (:class:`~rehead.models.modeling.modeling_rehead_ring.WindowLayer`) drops tokens from the middle
of a text. Masks are made for the whole text; here they are moved to the keys that are left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rehead.attention.call import AttentionCall
from rehead.attention.mask import TiledMask
from rehead.errors import UnsupportedError

RING = "rehead_ring"
"""Attribute of an attention module that holds its layer of the present cache while that keeps a window."""
WINDOW = "rehead_window"
"""Attribute of an attention module of a modelling file: (window or None, sink tokens)."""


def ring_of(module: nn.Module) -> Any:
    """The module's cache layer if it has dropped tokens, else None."""
    ring = module.__dict__.get(RING)
    return ring if ring is not None and ring.shift else None


def fitted(mask: TiledMask | Tensor | None, ring: Any, query: Tensor, key: Tensor) -> TiledMask:
    """A mask of the whole text as one of the keys that a cache kept.

    Keys after the sinks are ``ring.shift`` places before their positions, and so are queries, so that windows and
    causality compare the same distances; padding that is left comes first.

    Raises:
        UnsupportedError: the mask is a tensor of values, or has chunks or packed texts.
    """
    count, shift = key.shape[2], ring.shift
    if mask is None:
        return TiledMask(query.shape[0], query.shape[2], count, query.device, q_offset=count - query.shape[2])
    if not isinstance(mask, TiledMask) or mask.dense is not None or mask.chunk or mask.q_segments is not None:
        raise UnsupportedError(
            "a cache that keeps a window takes a padding mask of 0 and 1 only; leave the 4-D mask or the packed texts "
            "out, or give no cache"
        )
    seen = mask.key_mask
    if seen is not None:
        at = ring.positions(count, seen.device).clamp(max=seen.shape[1] - 1)
        seen = seen.gather(1, at.expand(len(seen), -1))
    return replace(
        mask,
        kv_length=count,
        q_offset=mask.q_offset - shift,
        key_mask=seen,
        kv_start=None if mask.kv_start is None else (mask.kv_start - shift).clamp(min=0),
        kv_end=None if mask.kv_end is None else (mask.kv_end - shift).clamp(min=0, max=count),
    )


def with_file_window(module: nn.Module, call: AttentionCall) -> AttentionCall:
    """The call of a module of the modelling file for windows, which its window and its sink logits narrow."""
    window, sinks = module.__dict__[WINDOW]
    logits = module._parameters.get("sinks")
    if logits is not None:
        call = call.with_(sinks=logits.to(call.query.dtype))
    return call if window is None else call.narrowed(window, sinks)
