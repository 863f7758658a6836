"""Which calls the kernels support, and where the keys of a segment or a mask begin and end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rehead.attention.call import AttentionCall

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MAX_LATENT, MAX_TAIL = 1024, 128
"""Bytes of a key that is also the value, and columns that keys may have besides, in a decode step."""


def refusal(call: AttentionCall) -> str | None:
    """Why the GPU kernels cannot take the call (one line), or None when they can."""
    query, key, value = call.query, call.key, call.value
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not one of bfloat16, float16, float32"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query, key and value differ in dtype ({query.dtype}, {key.dtype}, {value.dtype})"
    tail = call.key_tail
    widest = max(query.shape[-1], value.shape[-1])
    if tail is not None:
        if not latent_fits(key, tail):
            return f"latents of {key.shape[-1]} {key.dtype} beside {tail.shape[-1]} are over {MAX_LATENT} bytes"
    elif widest > MAX_HEAD_DIM:
        return f"head_dim {widest} is over {MAX_HEAD_DIM}"
    for name, tensor in (("query", query), ("key", key), ("value", value), ("key_tail", tail)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} is not contiguous in its last dimension"
    if call.sink_tokens and call.window is not None and call.q_segments is not None:
        return "sink tokens in packed sequences, which rehead.attention.attend splits into two calls"
    if not math.isfinite(call.factor):
        return f"scale is {call.scale}"
    for name, added in (("bias", call.bias), ("alibi_slopes", call.alibi_slopes)):
        if added is not None and added.requires_grad and torch.is_grad_enabled():
            return f"{name} wants a gradient, which the kernels do not give"
    return None


def latent_fits(latents: Tensor, tail: Tensor) -> bool:
    """Whether the decode kernel holds latents of this size and dtype."""
    return latents.shape[-1] * latents.element_size() <= MAX_LATENT and tail.shape[-1] <= MAX_TAIL


def segment_bounds(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Where the segment of each entry of ``rows`` [B, M] begins and ends in ``columns`` [B, N].

    Returns int32 ``(begin, end)`` [B, M]: the first matching column and the last plus one, or (N, 0) without a match.
    Segments may be in any order: kernels use the bounds only to skip blocks, and compare the segments themselves.
    """
    count = columns.shape[1]
    ordered, index = columns.sort(dim=1, stable=True)
    left = torch.searchsorted(ordered, rows.contiguous(), right=False)
    right = torch.searchsorted(ordered, rows.contiguous(), right=True)
    present = right > left
    begin = torch.where(present, index.gather(1, left.clamp(max=count - 1)), count)
    end = torch.where(present, index.gather(1, (right - 1).clamp(min=0)) + 1, 0)
    return begin.to(torch.int32), end.to(torch.int32)


def mask_bounds(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First visible key and last plus one in each row of a ``[B, Skv]`` mask, int32 [B]; (Skv, 0) when none."""
    count = key_mask.shape[1]
    position = torch.arange(count, device=key_mask.device, dtype=torch.int32)
    begin = torch.where(key_mask, position, count).amin(1)
    end = torch.where(key_mask, position + 1, 0).amax(1)
    return begin.to(torch.int32), end.to(torch.int32)
