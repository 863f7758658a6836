"""Mean pooling: the KV heads of a group are averaged (Ainslie et al. 2023, arXiv 2305.13245)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.lazy import late
from rehead.models.heads import Heads
from rehead.variants.pool.methods.registry import MethodContext, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

KV_FIELDS = ("k", "v", "k_bias", "v_bias")


def kv_fields(heads: Heads) -> dict[str, Tensor]:
    """Every weight with one row for each KV head: [K, ...] by field name."""
    fields = {name: tensor for name in KV_FIELDS if (tensor := getattr(heads, name)) is not None}
    if heads.k_norm is not None and heads.k_norm.ndim == 2:
        fields["k_norm"] = heads.k_norm
    return fields


def grouped(tensor: Tensor, kv: int) -> Tensor:
    """[K, ...] as [kv, K / kv, ...]."""
    return tensor.unflatten(0, (kv, -1))


def averaged(tensor: Tensor, kv: int) -> Tensor:
    """Float32 average [kv, ...] of every group of [K, ...], without a float32 copy of the whole."""
    groups = grouped(tensor, kv)
    total = groups[:, 0].to(torch.float32, copy=True)
    for i in range(1, groups.shape[1]):
        total += groups[:, i]
    return total.div_(groups.shape[1])


@register("mean", "average the KV heads of a group; needs no data (Ainslie et al. 2023)", any_dtype=True)
def mean(heads: Heads, kv: int, context: MethodContext) -> Heads:
    """Average every group's key and value heads; queries and output stay as they are."""
    pooled: dict[str, Any] = {name: averaged(tensor, kv) for name, tensor in kv_fields(heads).items()}
    return replace(heads, **pooled)
