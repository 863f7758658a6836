"""Dual-chunk attention (An et al. 2024, arXiv 2402.17463): texts of any length at distances that the model knows.

The text is cut into chunks of s tokens, fewer than the c that the model was trained to read. A query sees the keys of
its own chunk and of the chunk before at their true distances, as far as those stay below c, and all earlier ones as if
it stood at position c - 1 and they at their places within their chunk::

    own chunk           distance i - j
    the chunk before    distance min(i, first key's + c - 1) - j
    all before that     distance c - 1 - (j mod s)

Rows within the trained length are computed as before. Nothing is trained, and no scores are formed: three tiled passes
are merged by their log-sum-exp. The cache holds keys as the model rotated them, and the parts turn queries and keys
further from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rehead.attention.attend import merge, with_lse
from rehead.attention.call import AttentionCall
from rehead.counts import LONGEST, Length
from rehead.models.rotation import Turn
from rehead.variants.contract import Compute, Variant, register
from rehead.variants.positions import Placed, PositionOptions, attach, by_text, changes, keys_of


class DualChunkOptions(PositionOptions):
    """Options of the variant ``dual_chunk``."""

    chunk: Length | None = Field(
        None, ge=1, description="Tokens in a chunk, fewer than the model was trained to read; three quarters of them."
    )


def chunk_size(placed: Placed) -> int:
    """Tokens in a chunk."""
    return min(placed.options.chunk or max(1, 3 * placed.length // 4), placed.length - 1)


def attend(call: AttentionCall, placed: Placed, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The layer's attention in chunks; calls that end within the trained length pass unchanged."""
    if not changes(call, placed):
        return compute(call)
    return by_text(call.with_int_offset(), lambda own: chunked(own, placed, compute))


def chunked(call: AttentionCall, placed: Placed, compute: Compute) -> Tensor:
    """Attention ``[B, Sq, H, Dv]`` of texts that begin at key 0."""
    size, longest, turn = chunk_size(placed), placed.length, placed.turn
    begin, end = call.offset, call.offset + call.query.shape[2]
    first, out = max(begin, min(end, longest)), []
    if first > begin:  # rows within the trained length, whatever their chunk
        out.append(compute(call.with_(query=call.query[:, :, : first - begin], **keys_of(call, 0, first))))
    if first == end:
        return out[0]
    assert turn is not None
    device, last = call.query.device, (end - 1) // size
    chunks = max(0, last - 1)  # of keys that lie two or more back for some row
    # Where rows are few they are turned once for each of those chunks; else the chunks, as if each began at 0.
    few = (end - first) * call.query.shape[1] < size * call.key.shape[1]
    folded = None if few else _folded(call.key[:, :, : chunks * size], size, turn)
    for chunk in range(first // size, last + 1):
        low, high = max(first, chunk * size), min(end, (chunk + 1) * size)
        place = torch.arange(low, high, device=device)
        query = call.query[:, :, low - begin : high - begin]
        own = call.with_(query=query, q_offset=low)
        # Rows whose distances to the chunk before would pass the trained length are held there.
        held = (chunk - 1) * size + longest - 1
        near = max(0, chunk - 1) * size
        if chunk == 0 or high - 1 <= held:
            parts = [_part(own, near, high, compute)]
        else:
            parts = [_part(own, chunk * size, high, compute)]
            before = own.with_(query=turn.by(query, (held - place).clamp(max=0)), sinks=None)
            parts.append(_part(before, near, chunk * size, compute))
        if near and folded is not None:
            distant = own.with_(query=turn.by(query, longest - 1 - place), key=folded, sinks=None)
            parts.append(_part(distant, 0, near, compute))
        elif near:
            for start in range(0, near, size):
                distant = own.with_(query=turn.by(query, start + longest - 1 - place), sinks=None)
                parts.append(_part(distant, start, start + size, compute))
        out.append(merge(parts)[0] if len(parts) > 1 else parts[0][0])
    return torch.cat(out, 1)


def _folded(keys: Tensor, size: int, turn: Turn) -> Tensor:
    """Keys ``[B, K, chunks * size, D]``, each chunk turned back to begin at 0."""
    chunks = keys.unflatten(2, (-1, size))
    return turn.by(chunks, -size * torch.arange(chunks.shape[2], device=keys.device)[:, None]).flatten(2, 3)


def _part(call: AttentionCall, first: int, last: int, compute: Compute) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) over the keys [first, last), which keep their places for whatever stands below."""
    return with_lse(compute, call.with_(**keys_of(call, first, last), q_offset=call.offset - first))


def _off(options: Any) -> Any:
    return options.but(trained=LONGEST)


VARIANT = register(
    Variant(
        name="dual_chunk",
        summary="texts of any length in chunks at distances that the model knows (exact up to its length)",
        source="An et al. 2024, arXiv 2402.17463",
        options=DualChunkOptions,
        exact=lambda options: options.trained == LONGEST,
        off=_off,
        attend=attend,
        cache=attach,
        reach=lambda options: options.trained or 0,
        longer=True,
    )
)
