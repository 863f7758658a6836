"""Latent attention (MLA) over the latents themselves, without expanding the keys and values of all heads.

Keys are ``W_k c`` beside a rotated key that all heads share, values ``W_v c``, of a cached latent c. So a query may be
multiplied by ``W_k`` instead, and the output by ``W_v``: one shared head of keys, whose first columns are its values
(the absorbed form, DeepSeek-AI 2024, arXiv 2405.04434). It takes more arithmetic for each pair of query and key and
none for each key, so it pays for few queries over many keys, which is decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rehead.attention.call import AttentionCall
from rehead.attention.kernels.bounds import latent_fits
from rehead.attention.kernels.decode import MAX_QUERIES

LATENT = "_rehead_latent"
"""Attribute of an attention module that hands its latents to the attention function instead of expanding them."""


def attend_latents(
    module: Any,
    query: Tensor,
    latents: Tensor,
    shared: Tensor,
    scale: float | None,
    rules: dict[str, Any],
    compute: Callable[[AttentionCall], Tensor],
) -> Tensor:
    """A module's attention ``[B, Sq, H, Dv]``, absorbed or expanded, whichever takes less arithmetic.

    Args:
        module: has the sizes and ``kv_b_proj`` of transformers' latent attention, and its ``expand_kv``.
        query: ``[B, H, Sq, N + E]``, the E rotated numbers last.
        latents: ``[B, 1, Skv, R]``.
        shared: ``[B, 1, Skv, E]``, the rotated key.
        scale: factor of the scores, ``(N + E) ** -0.5`` if None.
        rules: other fields of the call.
        compute: the attention below.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not is_absorbed(module, query, latents, shared):
        key, value = type(module).expand_kv(module, latents, shared)
        return compute(AttentionCall(query, key, value, scale=scale, **rules))
    still, value_dim = module.qk_nope_head_dim, module.v_head_dim
    key_up, value_up = module.kv_b_proj.weight.unflatten(0, (-1, still + value_dim)).split([still, value_dim], 1)
    wide = torch.cat(
        [torch.einsum("bhsn,hnr->bhsr", query[..., :still], key_up), query[..., still:].to(latents.dtype)], -1
    )
    out = compute(AttentionCall(wide, latents, latents, key_tail=shared, scale=scale, **rules))
    return torch.einsum("bshr,hvr->bshv", out, value_up)


def is_absorbed(module: Any, query: Tensor, latents: Tensor, shared: Tensor) -> bool:
    """Whether a call is computed over the latents: no gradient, a plain projection, few enough queries."""
    rows, rank, turning = query.shape[2], latents.shape[-1], shared.shape[-1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, latents, module.kv_b_proj.weight)):
        return False
    if not _is_plain(module.kv_b_proj):
        return False
    if query.device.type != "cpu" and (rows > MAX_QUERIES or not latent_fits(latents, shared)):
        return False
    still, value_dim = module.qk_nope_head_dim, module.v_head_dim
    expanding = rank * (still + value_dim)  # for each key and head
    return rows * (2 * rank + turning) <= expanding + rows * (still + turning + value_dim)


def _is_plain(projection: nn.Module) -> bool:
    """Whether a projection is its weight and nothing else: not quantised, adapted, offloaded or watched."""
    return (
        type(projection) is nn.Linear
        and projection.bias is None
        and not projection.weight.is_meta
        and not (projection._forward_hooks or projection._forward_pre_hooks or "forward" in projection.__dict__)
    )
