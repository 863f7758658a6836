"""How much each block of keys weighs for some rows of a call: the measure by which blocks are chosen."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rehead.attention.call import AttentionCall

STEP_ELEMENTS = 1 << 24
"""Largest number of scores held at a time."""


@functools.lru_cache(maxsize=8)
def _whole(batch: int, num_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bounds of keys that are all visible, int32 ``[B]`` each."""
    return torch.zeros(batch, dtype=torch.int32, device=device), torch.full(
        (batch,), num_k, dtype=torch.int32, device=device
    )


def key_bounds(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The bounds of a call's keys, int32 ``[B]`` each."""
    start, end = _whole(call.key.shape[0], call.key.shape[2], call.key.device)
    return (
        start if call.kv_start is None else call.kv_start.int().contiguous(),
        end if call.ends is None else call.ends.int().contiguous(),
    )


def block_mass(call: AttentionCall, rows: Tensor, keys: int) -> Tensor:
    """The share of some rows' softmax that each block of keys has, without gradients.

    Args:
        call: a causal call whose only other rules are bounds of the keys.
        rows: int32 ``[B, H, R]``, rows of the call.
        keys: keys per block, a power of two from 16.

    Returns:
        Float32 ``[B, H, R, key blocks]``; the shares of a row that sees nothing are 0.
    """
    query, key = call.query.detach(), call.key.detach()
    batch, num_k, device = query.shape[0], key.shape[2], query.device
    start, end = key_bounds(call)
    pad = -num_k % keys
    group = query.shape[1] // key.shape[1]
    place = torch.arange(num_k + pad, device=device)
    work = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty(*rows.shape, (num_k + pad) // keys, device=device)
    for b in range(batch):
        for h in range(query.shape[1]):
            k = torch.nn.functional.pad(key[b, h // group].to(work), (0, 0, 0, pad))
            step = max(1, STEP_ELEMENTS // (num_k + pad))
            for first in range(0, rows.shape[2], step):
                some = rows[b, h, first : first + step].long()
                top = (some + call.offset + 1).clamp(max=int(end[b]))[:, None]
                scores = query[b, h, some].to(work) @ k.T * call.factor
                scores = scores.masked_fill((place < start[b]) | (place >= top), float("-inf"))
                shares = scores.softmax(-1).nan_to_num(0.0)
                out[b, h, first : first + step] = shares.unflatten(-1, (-1, keys)).sum(-1)
    return out
