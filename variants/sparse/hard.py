"""A bound on each row's lost mass that always holds: from the centre and radius of the key blocks that are left out.

A block of n keys with centre c and radius R adds at most n exp(q c + |q| R) to a row's sum. On real heads that is
e^15 to e^35 times what it adds, so nearly every block has to be computed; it pays where the keys of a block are alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rehead.attention.attend import attend_with_lse
from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import AttentionCall
from rehead.variants.sparse.select import Choice, places

STEP_ELEMENTS = 1 << 26
SLACK = 1e-3
"""Added to the bound's exponent, as a share of its size, for rounding."""


def secure(call: AttentionCall, choice: Choice, lost_mass: float, block: int) -> Choice:
    """The choice with those blocks added without which some row's bound would exceed ``lost_mass``.

    Returns:
        A choice whose ``bound`` is the largest of any row.
    """
    lse = attend_with_lse(call.with_(blocks=choice.blocks))[1]
    kept = choice.blocks.listed(call.key.shape[2])
    visible = places(call.query.device, call.offset, call.query.shape[2], block, kept.shape[3], 0)[0]
    share = _shares(call, lse, block).masked_fill_(kept | ~visible, 0.0)
    # The lightest are left out while they stay within the odds; what more is computed only lowers a share.
    ordered, order = share.sort(-1)
    total = ordered.cumsum(-1)
    leave = total <= lost_mass / (1 - lost_mass)
    keep = (kept | ~torch.zeros_like(leave).scatter_(-1, order, leave)) & visible
    odds = torch.where(leave, total, 0.0).amax()
    return replace(choice, blocks=KeyBlocks.of(keep, block, block), bound=odds / (1 + odds))


def _shares(call: AttentionCall, lse: Tensor, block: int) -> Tensor:
    """The most that each key block adds to a row's sum, over what is computed, ``[B, H, row blocks, key blocks]``."""
    query, key = call.query.detach().float(), call.key.detach().float()
    num_q, num_k = query.shape[2], key.shape[2]
    pad = -num_k % block
    there = (torch.arange(num_k + pad, device=key.device) < num_k).view(-1, block, 1)
    keys = torch.nn.functional.pad(key, (0, 0, 0, pad)).unflatten(2, (-1, block))
    count = there.sum(1)
    centre = keys.sum(3) / count
    radius = ((keys - centre[..., None, :]) * there).norm(dim=-1).amax(-1)
    group = query.shape[1] // key.shape[1]
    centre, radius = centre.repeat_interleave(group, 1), radius.repeat_interleave(group, 1)
    width = max(1, STEP_ELEMENTS // (query.shape[:2].numel() * centre.shape[2] * block)) * block
    parts = []
    for first in range(0, num_q, width):
        q = query[:, :, first : first + width]
        spread = abs(call.factor) * q.norm(dim=-1, keepdim=True) * radius[:, :, None]
        middle = call.factor * q @ centre.transpose(-1, -2)
        top = middle + spread + SLACK * (middle.abs() + spread) + torch.log(count.float()).view(-1)
        # A row that sees nothing yet has a log-sum-exp of -inf: every block may be all that it has.
        share = torch.exp((top - lse[:, :, first : first + width, None]).clamp(max=math.log(1e30)))
        share = torch.nn.functional.pad(share, (0, 0, 0, -share.shape[2] % block))
        parts.append(share.unflatten(2, (-1, block)).amax(3))
    return torch.cat(parts, 2)
