"""Which key blocks a call computes: chosen by a few rows' exact weights, and held to a bound by other rows.

Each block of rows shows what it looks at by ``samples`` of its rows, whose weights are computed over all keys (no
values): in tests on SmolLM2 they named the heavy blocks better than the antidiagonal sums of XAttention
(arXiv 2503.16428) at half the cost. Blocks are kept from the heaviest on. How far down is decided by rows drawn at
random, apart from the samples: their lost mass under each threshold is exact, and the empirical Bernstein bound (Maurer
and Pontil 2009, arXiv 0907.3740) turns it into a bound on the mean over all rows and heads. Since the loss only grows
with the threshold, and the first one whose bound is over the limit ends the search, the bound has to hold for a single
threshold, the first that truly loses too much (Bates et al. 2021, arXiv 2101.02703).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rehead.attention.block_scores import block_mass, key_bounds
from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import AttentionCall

CHECKED = 8192
"""Rows that are drawn to check the lost mass, over all batch rows and heads, at least."""
CHECKED_SHARE = 128
"""One row in so many is drawn where that is more."""
FAILURE = 1e-4
"""Largest probability that the bound of a call does not hold, over the draw of the checked rows."""
LOG = math.log(2 / FAILURE)
LEVELS, PER_OCTAVE, EVEN = 128, 8, 64
"""Thresholds of a block's mean weight that are tried (a power of two), how many of them lie between a weight and its
half, and the one where every block has the same weight."""


@dataclass(frozen=True)
class Choice:
    """The blocks that a call computes.

    Attributes:
        blocks: what each head's row blocks see.
        visible: how many blocks causality leaves, over all batch rows and heads.
        estimate: mean lost mass of the checked rows, a tensor of one element.
        bound: what the mean over all rows and heads exceeds with a probability of :data:`FAILURE` at most: the limit
            that was asked for, the truth where all rows were checked.
    """

    blocks: KeyBlocks
    visible: int
    estimate: Tensor
    bound: Tensor


@functools.lru_cache(maxsize=8)
def draw(
    device: torch.device, batch: int, heads: int, num_q: int, block: int, samples: int, seed: int
) -> tuple[Tensor, Tensor, bool]:
    """(rows int32 ``[B, H, row blocks * samples + n]``: those that choose, then n that check; the row blocks of these,
    ``[B, H, n]``; whether they are all rows)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-num_q // block)
    step = block / samples
    place = torch.arange(samples) * step + torch.rand(batch, heads, blocks, samples, generator=generator) * step
    sampled = (torch.arange(blocks)[:, None] * block + place.long()).clamp(max=num_q - 1)
    count = -(-max(CHECKED, batch * heads * num_q // CHECKED_SHARE) // (batch * heads))
    if count >= num_q:
        checked = torch.arange(num_q).expand(batch, heads, -1)
    else:
        checked = torch.randint(num_q, (batch, heads, count), generator=generator).sort(-1).values
    rows = torch.cat([sampled.flatten(2), checked], -1).int()
    return rows.to(device), (checked // block).to(device), count >= num_q


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
    rows, owner, all_rows = draw(call.query.device, batch, heads, num_q, block, samples, seed)
    visible = places(call.query.device, call.offset, num_q, block, -(-call.key.shape[2] // block), local)[2]
    most = visible * batch * heads
    sizes = {"block": block, "samples": samples, "first": first, "local": local}
    if call.query.device.type != "cpu":
        from rehead.attention.kernels.block_choice import lists_of, settled

        level, moments = _levels_on_gpu(call, rows, owner, **sizes)
        kept, figures = settled(moments, owner.numel(), LOG, lost_mass, all_rows)
        return Choice(lists_of(level, kept, block, most), most, figures[0], figures[1])
    level, lost = _levels(call, rows, owner, **sizes)
    kept, figures = settle(lost, lost_mass, all_rows)
    return Choice(KeyBlocks.of(level >= kept, block, block), most, figures[0], figures[1])


def settle(lost: Tensor, allowed: float, whole: bool) -> tuple[Tensor, Tensor]:
    """(the lowest level that is kept, of one element; mean loss without those below it, and its bound, ``[2]``).

    Args:
        lost: ``[n, LEVELS]``, what each checked row loses where the blocks up to a level are left out.
        allowed: the most that may be lost.
        whole: all rows were checked.
    """
    rows = lost.shape[0]
    variance, mean = torch.var_mean(lost.double(), 0)
    bound = mean if whole else mean + torch.sqrt(2 * LOG * variance / rows) + 7 * LOG / (3 * (rows - 1))
    over = bound > allowed
    over[-1] = True  # the highest level has the blocks that are always kept
    kept = over.int().argmax()
    estimate = torch.nn.functional.pad(mean, (1, 0)).index_select(0, kept[None])[0]
    return kept, torch.stack([estimate, estimate if whole else allowed * (kept > 0).double()])


def _levels(
    call: AttentionCall, rows: Tensor, owner: Tensor, *, block: int, samples: int, first: int, local: int
) -> tuple[Tensor, Tensor]:
    """(level of each block ``[B, H, row blocks, key blocks]``; losses ``[B * H * n, LEVELS]`` of the rows that check
    where the blocks up to a level are left out).

    Blocks that are always kept have the highest level, others at most the second, and those that no row sees -1.
    """
    mass = block_mass(call, rows, block)
    count = rows.shape[2] - owner.shape[2]
    chosen, shown = mass[:, :, :count], mass[:, :, count:]
    level = (chosen.unflatten(2, (-1, samples)).mean(3) * mass.shape[3]).log2() * PER_OCTAVE + EVEN
    level = level.clamp_(0, LEVELS - 2).long()
    visible, near, _ = places(mass.device, call.offset, call.query.shape[2], block, mass.shape[3], local)
    key = torch.arange(mass.shape[3], device=mass.device)
    begin = 0 if call.kv_start is None else (call.kv_start.clamp(min=0) // block).view(-1, 1, 1, 1)
    level = level.masked_fill(near | ((key >= begin) & (key < begin + first)), LEVELS - 1)
    lost = torch.zeros(shown.shape[:3].numel(), LEVELS, device=mass.device)
    of_rows = level.gather(2, owner[..., None].expand(-1, -1, -1, level.shape[3]))
    lost.scatter_add_(1, of_rows.flatten(0, 2), shown.flatten(0, 2))
    return level.masked_fill(~visible, -1), lost.cumsum(1)


def _levels_on_gpu(call: AttentionCall, rows: Tensor, owner: Tensor, **sizes: int) -> tuple[Tensor, Tensor]:
    """:func:`_levels` by kernels: the level of each block, and sums of the losses and of their squares."""
    from rehead.attention.kernels.block_choice import levels

    query, key = call.query.detach(), call.key.detach()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query.to(key.dtype), key))
    start, end = key_bounds(call)
    return levels(
        query, key, rows, start, end, scale=call.factor, offset=call.offset, steps=(LEVELS, PER_OCTAVE, EVEN), **sizes
    )


@functools.lru_cache(maxsize=8)
def places(
    device: torch.device, offset: int, num_q: int, block: int, key_blocks: int, local: int
) -> tuple[Tensor, Tensor, int]:
    """(bool ``[row blocks, key blocks]``: causality leaves some of the block; it is the rows' own or just before; how
    many blocks causality leaves)."""
    row = torch.arange(-(-num_q // block), device=device)[:, None]
    key = torch.arange(key_blocks, device=device)
    opening = offset + row * block
    closing = (opening + block).clamp(max=offset + num_q)
    visible = key * block < closing
    return visible, (key + 1 + local) * block > opening, int(visible.sum())


def lost_mass(call: AttentionCall, blocks: KeyBlocks) -> Tensor:
    """The mass that a call really loses under a choice of blocks, ``[B, H, Sq]``; costs two dense calls."""
    from rehead.attention.attend import attend_with_lse

    with torch.no_grad():
        whole, kept = attend_with_lse(call)[1], attend_with_lse(call.with_(blocks=blocks))[1]
    return (1 - torch.exp(kept - whole)).nan_to_num(0.0).clamp(min=0.0)
