"""Attention over many keys in closed form, as if keys and values were normally distributed.

For N keys with mean m and covariance C, sum_j exp(s q k_j) is about N exp(s q m + s^2 q C q / 2), and the mean of the
values under these weights about v + s Cov(v, k) q: exact for a normal distribution, and else up to second order in
s q (k - m). A row needs N, the two means and the two covariances, whatever N is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rehead.attention.call import AttentionCall


def far_field(call: AttentionCall, begin: int, end: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Attention of each block of rows over the key blocks ``[begin, end)``, differentiable.

    Args:
        call: the queries, keys, values and scale; no other rule is applied.
        begin: first key block.
        end: int64 ``[row blocks]``, one behind the last key block of each; all are whole blocks.
        block: rows and keys per block.

    Returns:
        As :func:`rehead.attention.attend.attend_with_lse`: ``[B, Sq, H, Dv]``, and ``[B, H, Sq]`` in float32 (or
        float64), -inf for rows without such keys.
    """
    work = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(work) for x in (call.query, call.key, call.value))
    last = int(end.max()) * block
    key, value = key[:, :, begin * block : last], value[:, :, begin * block : last]
    middle = key.mean(2, keepdim=True)  # covariances as differences of large numbers would lose digits
    key = key - middle
    batch, kv_heads, _, dim = key.shape
    group = query.shape[1] // kv_heads
    count = (end - begin) * block
    keys, values = key.unflatten(2, (-1, block)), value.unflatten(2, (-1, block))
    sums = (keys.sum(3), values.sum(3), keys.transpose(-1, -2) @ keys, values.transpose(-1, -2) @ keys)
    there = count.clamp(min=1)
    which = (end - begin).clamp(min=0)

    def upto(part: Tensor) -> Tensor:
        """The mean over the keys of each block of rows."""
        total = F.pad(part.cumsum(2), (0, 0) * (part.ndim - 3) + (1, 0))[:, :, which]
        return total / there.view(-1, *[1] * (part.ndim - 3))

    mean, mean_v, square, cross = (upto(part) for part in sums)
    cov = square - mean[..., :, None] * mean[..., None, :]
    cov_v = cross - mean_v[..., :, None] * mean[..., None, :]
    num_q, scale = query.shape[2], call.factor
    rows = F.pad(query, (0, 0, 0, -num_q % block)).view(batch, kv_heads, group, -1, block, dim)
    rows = rows.transpose(2, 3).flatten(3, 4)  # [B, K, row blocks, group * block, D]
    spread = ((rows @ cov) * rows).sum(-1)
    lse = scale * (rows @ (mean + middle)[..., None])[..., 0] + scale**2 / 2 * spread
    lse = (lse + there.to(work).log()[:, None]).masked_fill((count <= 0)[:, None], float("-inf"))
    out = mean_v[..., None, :] + scale * rows @ cov_v.transpose(-1, -2)
    out = out.masked_fill((count <= 0)[:, None, None], 0.0)

    def back(part: Tensor) -> Tensor:
        """``[B, K, row blocks, group * block, ...]`` as ``[B, H, Sq, ...]``."""
        part = part.unflatten(3, (group, block)).transpose(2, 3).flatten(3, 4)
        return part.flatten(1, 2)[:, :, :num_q]

    return back(out).transpose(1, 2).to(call.query.dtype), back(lse)
