"""Which key blocks a call computes: chosen by a few rows' exact weights, and held to a bound by other rows.

Each block of rows shows what it looks at by ``samples`` of its rows, whose weights are computed over all keys (no
values): in tests on SmolLM2 they named the heavy blocks better than the antidiagonal sums of XAttention
(arXiv 2503.16428) at half the cost. Blocks are kept from the heaviest on. How far down is decided by rows drawn at
random, apart from the samples: their lost mass under each threshold is exact, and the empirical Bernstein bound (Maurer
and Pontil 2009, arXiv 0907.3740) turns it into a bound on the mean over all rows and heads.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rehead.attention.block_scores import block_lse
from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import AttentionCall

CHECKED = 8192
"""Rows that are drawn to check the lost mass, over all batch rows and heads."""
FAILURE = 1e-4
"""Largest probability that the bound of a call does not hold, over the draw of the checked rows."""
LEVELS, PER_OCTAVE = 160, 8
"""Thresholds of a block's mean weight that are tried: 2 ** -(level / PER_OCTAVE)."""


@dataclass(frozen=True)
class Choice:
    """The blocks that a call computes.

    Attributes:
        keep: bool ``[B, H, row blocks, key blocks]``.
        visible: bool ``[row blocks, key blocks]``: the blocks that causality leaves.
        estimate: mean lost mass of the checked rows, a tensor of one element.
        bound: what the mean over all rows and heads exceeds with a probability of :data:`FAILURE` at most.
    """

    keep: Tensor
    visible: Tensor
    estimate: Tensor
    bound: Tensor


@functools.lru_cache(maxsize=8)
def draw(
    device: torch.device, batch: int, heads: int, num_q: int, block: int, samples: int, seed: int
) -> tuple[Tensor, Tensor, bool]:
    """(sampled rows int32 ``[B, H, row blocks * samples]``, checked rows ``[B, H, n]``, whether these are all rows)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-num_q // block)
    step = block / samples
    place = torch.arange(samples) * step + torch.rand(batch, heads, blocks, samples, generator=generator) * step
    sampled = (torch.arange(blocks)[:, None] * block + place.long()).clamp(max=num_q - 1)
    count = -(-CHECKED // (batch * heads))
    if count >= num_q:
        checked = torch.arange(num_q).expand(batch, heads, -1)
    else:
        checked = torch.randint(num_q, (batch, heads, count), generator=generator).sort(-1).values
    return sampled.flatten(2).int().to(device), checked.int().to(device).contiguous(), count >= num_q


def choose(
    call: AttentionCall, lost_mass: float, *, block: int, samples: int, first: int, local: int, seed: int
) -> Choice:
    """The blocks that keep the mean lost mass of a call within a bound.

    Args:
        call: a causal call whose only other rules are bounds of the keys.
        lost_mass: the share of the softmax's mass that may be left out, on average over rows and heads.
        block: rows and keys per block.
        samples: rows of each block that choose.
        first, local: blocks at the beginning of the sequence, and before a row block's own, that are always kept.
        seed: of the rows that are drawn.
    """
    batch, heads, num_q, _ = call.query.shape
    device = call.query.device
    sampled, checked, all_rows = draw(device, batch, heads, num_q, block, samples, seed)
    lse = block_lse(call, torch.cat([sampled, checked], -1), block)
    mass = torch.exp(lse - lse.logsumexp(-1, keepdim=True)).nan_to_num_(0.0)  # rows of padding see nothing
    chosen, shown = mass[:, :, : sampled.shape[2]], mass[:, :, sampled.shape[2] :]
    level = (-PER_OCTAVE * torch.log2(chosen.unflatten(2, (-1, samples)).mean(3))).clamp_(0, LEVELS - 1).long()
    visible, always = _fixed(level, call, block, first, local)
    level = level.masked_fill_(always, 0).masked_fill_(~visible, LEVELS - 1)
    owner = (checked // block).long()[..., None].expand(-1, -1, -1, level.shape[3])
    lost = torch.zeros(shown.shape[:3].numel(), LEVELS, device=device)
    lost.scatter_add_(1, level.gather(2, owner).flatten(0, 2), shown.flatten(0, 2))
    # Left out under level t is what lies at higher levels.
    lost = lost.flip(1).cumsum(1).flip(1)[:, 1:]
    mean = lost.mean(0)
    bound = mean if all_rows else _bernstein(mean, lost.var(0), lost.shape[0])
    enough = torch.cat([bound <= lost_mass, bound.new_ones(1, dtype=torch.bool)])
    level_kept = enough.int().argmax()
    zero = mean.new_zeros(1)
    estimate, bound = (torch.cat([part, zero])[level_kept] for part in (mean, bound))
    return Choice((level <= level_kept) & visible, visible, estimate, bound)


def _fixed(level: Tensor, call: AttentionCall, block: int, first: int, local: int) -> tuple[Tensor, Tensor]:
    """(bool ``[row blocks, key blocks]``: any row sees the block; bool ``[B or 1, 1, row blocks, key blocks]``: it is
    kept whatever it weighs)."""
    row, key = (torch.arange(size, device=level.device) for size in level.shape[2:])
    opening = call.offset + row[:, None] * block
    closing = (opening + block).clamp(max=call.offset + call.query.shape[2])
    visible = key * block < closing
    begin = key.new_zeros(1) if call.kv_start is None else call.kv_start // block
    begin = begin.view(-1, 1, 1, 1)
    near = (key + 1 + local) * block > opening
    return visible, visible & (near | ((key >= begin) & (key < begin + first)))


def _bernstein(mean: Tensor, variance: Tensor, count: int) -> Tensor:
    """Upper bounds of the expectations of means of ``count`` independent numbers in [0, 1], all of them at once."""
    log = math.log(2 * LEVELS / FAILURE)
    return mean + torch.sqrt(2 * variance * log / count) + 7 * log / (3 * (count - 1))


def lost_mass(call: AttentionCall, blocks: KeyBlocks) -> Tensor:
    """The mass that a call really loses under a choice of blocks, ``[B, H, Sq]``; costs two dense calls."""
    from rehead.attention.attend import attend_with_lse

    with torch.no_grad():
        whole, kept = attend_with_lse(call)[1], attend_with_lse(call.with_(blocks=blocks))[1]
    return (1 - torch.exp(kept - whole)).nan_to_num(0.0).clamp(min=0.0)
