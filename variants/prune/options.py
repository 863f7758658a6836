"""Options of the variant ``prune``, and what no model can be pruned by."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rehead.counts import Count
from rehead.errors import UnsupportedError, UsageError
from rehead.models.families.spec import Family
from rehead.variants.contract import VariantOptions


class PruneOptions(VariantOptions):
    """Options of the variant ``prune``."""

    heads: Count = Field(1, ge=0, description="Query heads that go in the group of each KV head.")
    by: Literal["outputs", "weights"] = Field(
        "outputs",
        description="Which heads go: those that the others make up for best on text, or those that write least, by the "
        "size of their weights alone.",
    )


def check_heads(count: int, heads: int, kv: int) -> None:
    """Refuse to drop ``count`` of the query heads in each group.

    Raises:
        UnsupportedError: each query head has a KV head of its own.
        UsageError: no head would be left.
    """
    size = heads // kv
    if size == 1:
        raise UnsupportedError(
            f"prune: each of the {heads} query heads has a KV head of its own, which would go unread; "
            "make them share KV heads first (--kv-heads)"
        )
    if count >= size:
        raise UsageError(f"prune: each KV head is read by {size} query heads; give heads=1 to heads={size - 1}")


def refusal(family: Family, config: Any) -> str | None:
    """Why heads of a model cannot go one by one; None where they can."""
    if getattr(config, "is_encoder_decoder", False):
        return "its layers share a position bias for each query head, so heads cannot go in some layers"
    if getattr(config, "alibi", False):
        return "its position biases depend on the number of heads"
    if any(family.norm_of(config, layer) == "rms_span" for layer in family.attention_layers(config)):
        return "a norm spans all of its query heads, so each head depends on the others"
    return None
