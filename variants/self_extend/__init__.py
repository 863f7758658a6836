"""Self-Extend (Jin et al. 2024, arXiv 2401.01325): far tokens share positions, near ones keep theirs.

A query sees the last w keys at their true distances and earlier ones at positions that groups of G neighbours share,
``i // G + w - w // G`` for the query and ``j // G`` for the key, so that distances stay below the trained length. Rows
within the trained length are computed as before. Nothing is trained; two tiled passes are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from rehead.attention.attend import merge, with_lse
from rehead.attention.call import AttentionCall
from rehead.counts import LONGEST, Length
from rehead.errors import UsageError
from rehead.variants.contract import Compute, Variant, register
from rehead.variants.positions import Placed, PositionOptions, attach, by_text, changes, keys_of


class SelfExtendOptions(PositionOptions):
    """Options of the variant ``self_extend``."""

    group: Length = Field(8, ge=1, description="Neighbours that share a position far away.")
    neighbours: Length | None = Field(
        None, ge=1, description="Last keys seen at their true distances; an eighth of the trained length."
    )


def near_keys(placed: Placed) -> int:
    """Last keys that are seen at their true distances."""
    return min(placed.options.neighbours or max(1, placed.length // 8), placed.length)


def reach(placed: Placed) -> int:
    """Tokens up to which all distances stay below the trained length."""
    near, group = near_keys(placed), placed.options.group
    return int((placed.length - near + near // group) * group)


def attend(call: AttentionCall, placed: Placed, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The layer's attention; rows within the trained length are computed as before.

    Raises:
        UsageError: the text is longer than the groups can bring below the trained length.
    """
    if not changes(call, placed):
        return compute(call)
    return by_text(call.with_int_offset(), lambda own: extended(own, placed, compute))


def extended(call: AttentionCall, placed: Placed, compute: Compute) -> Tensor:
    """Attention ``[B, Sq, H, Dv]`` of texts that begin at key 0."""
    first, end = call.offset, call.offset + call.query.shape[2]
    near, group, turn, most = near_keys(placed), placed.options.group, placed.turn, reach(placed)
    if end > max(most, placed.length):
        least = -(-(end - near) // max(1, placed.length - near))
        raise UsageError(f"self_extend: {end} tokens, and groups of {group} reach {most}; give group={least} or more")
    plain = max(0, min(end, placed.length) - first)
    out = []
    if plain:
        out.append(compute(call.with_(query=call.query[:, :, :plain], **keys_of(call, 0, first + plain))))
    if plain < end - first:
        assert turn is not None
        low = first + plain
        query = call.query[:, :, plain:]
        own = call.with_(query=query, q_offset=low, **keys_of(call, 0, end))
        row = torch.arange(low, end, device=query.device)
        moved = turn.by(call.key[:, :, : end - near], turn.grouped(group, end - near, query.device))
        grouped = own.with_(
            query=turn.by(query, row // group + near - near // group - row),
            **keys_of(call, 0, end - near) | {"key": moved},
            q_offset=low - near,
            sinks=None,
        )
        out.append(merge([with_lse(compute, own.with_(window=near)), with_lse(compute, grouped)])[0])
    return torch.cat(out, 1)


VARIANT = register(
    Variant(
        name="self_extend",
        summary="far tokens share positions in groups of group=, near ones keep theirs (exact up to its length)",
        source="Jin et al. 2024, arXiv 2401.01325",
        options=SelfExtendOptions,
        exact=lambda options: options.trained == LONGEST,
        off=lambda options: options.but(trained=LONGEST),
        attend=attend,
        cache=attach,
        reach=lambda options: options.trained or 0,
        longer=True,
    )
)
