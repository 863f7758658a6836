"""Plain attention, one line per rule: what every kernel is measured against. Holds the whole S x S matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.attention.blocks import KeyBlocks


def visible(
    num_q: int,
    num_k: int,
    device: torch.device | str,
    *,
    causal: bool = False,
    q_offset: int | Tensor = 0,
    window: int | None = None,
    sink_tokens: int = 0,
    chunk: int | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    blocks: KeyBlocks | None = None,
) -> Tensor:
    """Which key each query row sees: bool [B or 1, H or 1, Sq, Skv]. ``q_offset`` may be an int or a tensor [B]."""
    offset = torch.as_tensor(q_offset, device=device).reshape(-1, 1, 1, 1)
    row = torch.arange(num_q, device=device)[None, None, :, None] + offset
    key = torch.arange(num_k, device=device)[None, None, None, :]
    keep = torch.ones(1, 1, num_q, num_k, dtype=torch.bool, device=device) & (row >= row.amin())
    if causal:
        keep = keep & (key <= row)
    if window is not None:
        seen = row - key < window
        if sink_tokens:
            seen = seen | _first_tokens(key, sink_tokens, kv_start, key_mask, kv_segments)
        keep = keep & seen
    if chunk is not None:
        keep = keep & (row // chunk == key // chunk)
    if kv_start is not None:
        keep = keep & (key >= kv_start[:, None, None, None])
    if kv_end is not None:
        keep = keep & (key < kv_end[:, None, None, None])
    if key_mask is not None:
        keep = keep & key_mask[:, None, None, :]
    if q_segments is not None and kv_segments is not None:
        keep = keep & (q_segments[:, None, :, None] == kv_segments[:, None, None, :])
    if blocks is not None:
        keep = keep & blocks.seen(num_q, num_k)
    return keep


def _first_tokens(
    key: Tensor, count: int, kv_start: Tensor | None, key_mask: Tensor | None, kv_segments: Tensor | None
) -> Tensor:
    """Which keys are among the first ``count`` of their sequence, counted from its first visible key."""
    begin = torch.zeros_like(key) if kv_start is None else kv_start[:, None, None, None]
    if key_mask is not None:
        begin = torch.maximum(begin, key_mask.int().argmax(1)[:, None, None, None])
    if kv_segments is not None:
        same = kv_segments[:, None, :, None] == kv_segments[:, None, None, :]
        begin = torch.maximum(begin, same.int().argmax(2)[:, :, None, :])
    return key < begin + count


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    q_offset: int | Tensor = 0,
    dtype: torch.dtype = torch.float64,
    **mask: object,
) -> Tensor:
    """The function of :func:`rehead.attention.kernels.attention`, in ``dtype``, differentiable: [B, Sq, H, Dv]."""
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    num_q, num_k = query.shape[2], key.shape[2]
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        offset = torch.as_tensor(q_offset, device=query.device).reshape(-1, 1, 1, 1)
        row = torch.arange(num_q, device=query.device)[None, None, :, None] + offset
        distance = torch.arange(num_k, device=query.device)[None, None, None, :] - row
        scores = scores + alibi_slopes.to(dtype)[None, :, None, None] * distance
    keep = visible(num_q, num_k, query.device, q_offset=q_offset, **mask)  # type: ignore[arg-type]
    if bias is not None:
        if bias.dtype == torch.bool:
            keep = keep & bias
        else:
            scores = scores + bias.to(dtype)
    scores = scores.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        extra = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return (weights[..., :num_k] @ value).transpose(1, 2)
