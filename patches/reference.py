"""The definition that every tiled path is held to: attention with the whole score matrix, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(
    batch: int,
    n_query: int,
    n_key: int,
    *,
    causal: bool = True,
    q_offset: int | Tensor = 0,
    window: int | None = None,
    chunk: int | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bool ``[B, 1, Sq, Skv]``: which keys each row sees. Arguments as in :func:`rehead.patches.cpu.attention`."""
    position = torch.arange(n_query, device=device)[None, None, :, None] + q_offset
    key = torch.arange(n_key, device=device)[None, None, None, :]
    seen = torch.ones(batch, 1, n_query, n_key, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (position - key < window)
    if chunk is not None:
        seen = seen & (
            torch.div(position, chunk, rounding_mode="floor") == torch.div(key, chunk, rounding_mode="floor")
        )
    if kv_start is not None:
        seen = seen & (key >= kv_start[:, None, None, None])
    if kv_end is not None:
        seen = seen & (key < kv_end[:, None, None, None])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    if q_segments is not None and kv_segments is not None:
        seen = seen & (q_segments[:, None, :, None] == kv_segments[:, None, None, :])
    return seen


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    q_offset: int | Tensor = 0,
    deterministic: bool = False,
    **rules,
) -> Tensor:
    """What :func:`rehead.patches.cpu.attention` computes, in float64 and with ``[B, H, Sq, Skv]`` scores.

    Returns:
        ``[B, Sq, H, Dv]`` in float64.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    n_query, n_key = scores.shape[-2:]
    seen = visibility(
        query.shape[0], n_query, n_key, causal=causal, q_offset=q_offset, device=query.device, **rules
    )
    if alibi_slopes is not None:
        distance = torch.arange(n_key, device=query.device)[None, :] - (
            torch.arange(n_query, device=query.device)[:, None] + q_offset
        )
        scores = scores + alibi_slopes.double()[None, :, None, None] * distance
    if bias is not None:
        if bias.dtype == torch.bool:
            seen = seen & bias
        else:
            scores = scores + bias.double()
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[None, :, None, None].expand(scores.shape[0], -1, n_query, 1)
        scores = torch.cat([scores, sink], dim=-1)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0)[..., :n_key]
    return (weights @ value).transpose(1, 2).contiguous()
