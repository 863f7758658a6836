"""First: the first KV head of a group stands for all (Ainslie et al. 2023, arXiv 2305.13245)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rehead.models.heads import Heads
from rehead.variants.pool.methods.mean import grouped, kv_fields
from rehead.variants.pool.methods.registry import MethodContext, register


@register("first", "keep the first KV head of a group (Ainslie et al. 2023)", any_dtype=True)
def first(heads: Heads, kv: int, context: MethodContext) -> Heads:
    """Keep every group's first key and value head."""
    kept: dict[str, Any] = {name: grouped(tensor, kv)[:, 0].float() for name, tensor in kv_fields(heads).items()}
    return replace(heads, **kept)
