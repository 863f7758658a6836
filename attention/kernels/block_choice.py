"""Choosing key blocks on a GPU without waiting for it: weights of blocks for some rows, levels, losses, lists.

The steps are those of ``rehead.variants.sparse.select``, which has them in plain tensors for the CPU. Only numbers of
blocks go through memory, and their count is nowhere read back, so that a model's next kernels are queued meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rehead.attention.blocks import KeyBlocks, starts_of
from rehead.attention.kernels.general import interpreting
from rehead.attention.kernels.masks import LOG2E

ONE = 1 << 30
"""A loss of 1 in the sums of losses, which are whole numbers."""
ROWS_PER_PROGRAM = 4


@triton.jit
def _sums_of(sums, q, k_base, begin, end, wide, low, top, num_k, stride_kn, scale, D: tl.constexpr,
             BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``sums`` [M, WIDE] with the blocks [begin, end) filled in; MASKED where some row does not see all their keys."""
    d = tl.arange(0, BLOCK_D)
    cols = tl.arange(0, KEYS)
    for block in range(begin, end):
        key = block * KEYS + cols
        there = d[:, None] < D
        if MASKED:
            there = there & (key[None, :] < num_k)
        k = tl.load(k_base + key[None, :].to(tl.int64) * stride_kn + d[:, None], mask=there, other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        if MASKED:
            s = tl.where((key[None, :] >= low) & (key[None, :] < top[:, None]), s, float("-inf"))
        most = tl.maximum(tl.max(s, 1), -1.0e30)
        total = most + tl.log2(tl.sum(tl.exp2(s - most[:, None]), 1))
        sums = tl.where((wide == block)[None, :], total[:, None], sums)
    return sums


@triton.jit
def block_sums(q_ptr, k_ptr, rows_ptr, out_ptr, kv_start, kv_end, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
               stride_kn, scale, count, num_k, num_blocks, q_offset, num_heads, group, D: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Base-2 log-sum-exps of some rows' scores over each block of keys: [B, H, count, num_blocks] float32.

    Grid: tiles of rows (the last first) x runs of WIDE key blocks x B*H. ``rows_ptr`` [B, H, count] int32. What lies
    behind a row's own block is -inf or not written."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    first = tl.program_id(1) * WIDE
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < count
    rows = tl.load(rows_ptr + bh * count + place, mask=inside, other=0)
    low = tl.maximum(tl.load(kv_start + b), 0)
    high = tl.minimum(tl.load(kv_end + b), num_k)
    reach = tl.where(inside, rows + q_offset + 1, 0)
    stop = tl.minimum(first + WIDE, num_blocks)
    last = tl.minimum((tl.max(reach) + KEYS - 1) // KEYS, stop)
    if first < last:
        top = tl.minimum(reach, high)
        d = tl.arange(0, BLOCK_D)
        wide = first + tl.arange(0, WIDE)
        q = tl.load(q_ptr + b * stride_qb + h * stride_qh + rows[:, None].to(tl.int64) * stride_qm + d[None, :],
                    mask=inside[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
        k_base = k_ptr + b * stride_kb + h // group * stride_kh
        # Blocks that every row sees whole need no mask; rows outside are not written.
        clear = tl.min(tl.where(inside, top, high)) // KEYS
        before = tl.minimum(tl.maximum(first, (low + KEYS - 1) // KEYS), last)
        clear = tl.minimum(tl.maximum(clear, before), last)
        sums = tl.full([BLOCK_M, WIDE], float("-inf"), tl.float32)
        sums = _sums_of(sums, q, k_base, first, before, wide, low, top, num_k, stride_kn, scale, D, BLOCK_D, KEYS, True,
                        PRECISION)  # fmt: skip
        sums = _sums_of(sums, q, k_base, before, clear, wide, low, top, num_k, stride_kn, scale, D, BLOCK_D, KEYS,
                        False, PRECISION)  # fmt: skip
        sums = _sums_of(sums, q, k_base, clear, last, wide, low, top, num_k, stride_kn, scale, D, BLOCK_D, KEYS, True,
                        PRECISION)  # fmt: skip
        out = out_ptr + (bh * count + place) * num_blocks
        tl.store(out[:, None] + wide[None, :], sums, mask=inside[:, None] & (wide < num_blocks)[None, :])


@triton.jit
def _whole(base, reach, stop, KEYS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Base-2 log-sum-exp [ROWS] of rows of sums over the blocks that begin before ``reach`` [ROWS]."""
    m_i = tl.full([ROWS], -1.0e30, tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    for first in range(0, stop, WIDE):
        block = first + tl.arange(0, WIDE)
        seen = (block * KEYS)[None, :] < reach[:, None]
        sums = tl.load(base[:, None] + block[None, :], mask=seen & (block < stop)[None, :], other=float("-inf"))
        m_new = tl.maximum(m_i, tl.max(sums, 1))
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(sums - m_new[:, None]), 1)
        m_i = m_new
    return m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0))


@triton.jit
def block_levels(sums_ptr, rows_ptr, level_ptr, kv_start, count, lists, num_blocks, num_q, q_offset, num_heads,
                 keep_first, keep_local, even, SAMPLES: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
                 LEVELS: tl.constexpr, PER_OCTAVE: tl.constexpr):  # fmt: skip
    """The level of each block, int16 [B, H, lists, num_blocks]: of its mean share of the list's samples, ``even`` where
    that is one part in num_blocks; LEVELS - 1 where it is always kept, -1 where no row sees it. Grid: lists x B*H."""
    which = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    place = which * SAMPLES + tl.arange(0, SAMPLES)
    reach = tl.load(rows_ptr + bh * count + place) + q_offset + 1
    base = sums_ptr + (bh * count + place) * num_blocks
    opening = q_offset + which * KEYS
    closing = tl.minimum(opening + KEYS, q_offset + num_q)
    stop = tl.minimum((closing + KEYS - 1) // KEYS, num_blocks)
    begin = tl.maximum(tl.load(kv_start + bh // num_heads), 0) // KEYS
    whole = _whole(base, reach, stop, KEYS, WIDE, SAMPLES)
    out = level_ptr + (bh * lists + which) * num_blocks
    for first in range(0, num_blocks, WIDE):
        block = first + tl.arange(0, WIDE)
        seen = (block * KEYS)[None, :] < reach[:, None]
        sums = tl.load(base[:, None] + block[None, :], mask=seen & (block < stop)[None, :], other=float("-inf"))
        mean = tl.sum(tl.exp2(sums - whole[:, None]), 0) / SAMPLES
        level = tl.log2(tl.maximum(mean * num_blocks, 1e-30)) * PER_OCTAVE + even
        level = tl.minimum(tl.maximum(level, 0.0), LEVELS - 2.0).to(tl.int16)
        near = (block + 1 + keep_local) * KEYS > opening
        always = near | ((block >= begin) & (block < begin + keep_first))
        level = tl.where(always, LEVELS - 1, level)
        tl.store(out + block, tl.where(block < stop, level, -1).to(tl.int16), mask=block < num_blocks)


@triton.jit
def lost_by_level(sums_ptr, rows_ptr, level_ptr, moments_ptr, count, sampled, lists, num_blocks, q_offset,
                  KEYS: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, RUN: tl.constexpr,
                  ONE: tl.constexpr):  # fmt: skip
    """Adds to ``moments_ptr`` [2, LEVELS] int64 what checked rows lose where the blocks up to a level are left out, and
    its square, in units of 1 / ONE: whole numbers give the same sum in any order.

    Grid: runs of RUN checked rows x B*H; they follow the ``sampled`` ones in ``rows_ptr`` and ``sums_ptr``."""
    bh = tl.program_id(1).to(tl.int64)
    begin = sampled + tl.program_id(0) * RUN
    one = tl.arange(0, 1)
    threshold = tl.arange(0, LEVELS)
    total = tl.zeros([LEVELS], tl.int64)
    squares = tl.zeros([LEVELS], tl.int64)
    for place in range(begin, tl.minimum(begin + RUN, count)):
        row = tl.load(rows_ptr + bh * count + place)
        reach = row + q_offset + 1
        base = sums_ptr + (bh * count + place) * num_blocks
        levels = level_ptr + (bh * lists + row // KEYS) * num_blocks
        stop = tl.minimum((reach + KEYS - 1) // KEYS, num_blocks)
        whole = tl.sum(_whole(base + one, reach + one, stop, KEYS, 8 * WIDE, 1), 0)
        lost = tl.zeros([LEVELS], tl.float32)
        for first in range(0, stop, WIDE):
            block = first + tl.arange(0, WIDE)
            sums = tl.load(base + block, mask=block < stop, other=float("-inf"))
            level = tl.load(levels + block, mask=block < stop, other=-1).to(tl.int32)
            lost += tl.sum(tl.where(level[:, None] <= threshold[None, :], tl.exp2(sums - whole)[:, None], 0.0), 0)
        lost = tl.minimum(lost, 1.0)
        total += (lost * ONE).to(tl.int64)
        squares += (lost * lost * ONE).to(tl.int64)
    tl.atomic_add(moments_ptr + threshold, total, sem="relaxed")
    tl.atomic_add(moments_ptr + LEVELS + threshold, squares, sem="relaxed")


@triton.jit
def settle(moments_ptr, kept_ptr, figures_ptr, rows, log, allowed, LEVELS: tl.constexpr, ONE: tl.constexpr,
           WHOLE: tl.constexpr):  # fmt: skip
    """The lowest level that is kept into ``kept_ptr``, and the rows' mean loss and its bound into ``figures_ptr``.

    See ``rehead.variants.sparse.select.settle``. Grid: one program."""
    level = tl.arange(0, LEVELS)
    mean = tl.load(moments_ptr + level).to(tl.float64) / ONE / rows
    bound = mean
    if not WHOLE:
        square = tl.load(moments_ptr + LEVELS + level).to(tl.float64) / ONE / rows
        variance = tl.maximum(square - mean * mean, 0.0) * rows / (rows - 1)
        bound = mean + tl.sqrt(2 * log * variance / rows) + 7 * log / (3.0 * (rows - 1))
    kept = tl.min(tl.where((bound > allowed) | (level == LEVELS - 1), level, LEVELS), 0)
    lost = tl.sum(tl.where(level == kept - 1, mean, 0.0), 0).to(tl.float32)
    tl.store(kept_ptr, kept)
    tl.store(figures_ptr, lost)
    tl.store(figures_ptr + 1, lost if WHOLE else tl.where(kept > 0, allowed, 0.0))


@triton.jit
def write_lists(level_ptr, kept_ptr, starts_ptr, index_ptr, num_blocks, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """With COUNT the number of blocks of each list into ``starts_ptr``, else the blocks into ``index_ptr``.

    Kept are those of level ``kept_ptr`` or above. Grid: lists of all heads."""
    which = tl.program_id(0)
    kept = tl.load(kept_ptr).to(tl.int32)
    levels = level_ptr + which.to(tl.int64) * num_blocks
    at = 0
    if not COUNT:
        at = tl.load(starts_ptr + which)
    for first in range(0, num_blocks, WIDE):
        block = first + tl.arange(0, WIDE)
        keep = (tl.load(levels + block, mask=block < num_blocks, other=-1).to(tl.int32) >= kept).to(tl.int32)
        if not COUNT:
            tl.store(index_ptr + at + tl.cumsum(keep, 0) - 1, block, mask=keep != 0)
        at += tl.sum(keep, 0)
    if COUNT:
        tl.store(starts_ptr + which, at)


def levels(
    query: Tensor, key: Tensor, rows: Tensor, start: Tensor, end: Tensor, *, scale: float, offset: int, block: int,
    samples: int, first: int, local: int, steps: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(level of each block, int16 ``[B, H, lists, key blocks]``; sums over the checked rows of what they lose where the
    blocks up to a level are left out, and of its square, int64 ``[2, LEVELS]`` in units of 1 / :data:`ONE`).

    Args:
        query, key: ``[B, H, Sq, D]`` and ``[B, K, Skv, D]`` of a causal call.
        rows: int32 ``[B, H, lists * samples + n]``: those that choose, list by list, and those that check.
        start, end: int32 ``[B]``, bounds of the keys.
        scale, offset: factor of the scores, position of the first row.
        block: rows and keys per block.
        samples, first, local: as of ``rehead.variants.sparse.select.choose``; powers of two.
        steps: the number of levels, how many lie between a share and its half, and that of an even share.
    """
    batch, heads, num_q, dim = query.shape
    num_k, count = key.shape[2], rows.shape[2]
    blocks, lists = triton.cdiv(num_k, block), triton.cdiv(num_q, block)
    sampled = lists * samples
    sums = torch.empty((batch, heads, count, blocks), dtype=torch.float32, device=query.device)
    level = torch.empty((batch, heads, lists, blocks), dtype=torch.int16, device=query.device)
    moments = torch.zeros((2, steps[0]), dtype=torch.int64, device=query.device)
    width, half = max(16, triton.next_power_of_2(dim)), query.element_size() == 2
    block_m = 16 if interpreting() else 128 if half and width <= 128 else 64
    run = 4 if interpreting() else 16
    with torch.cuda.device_of(query):
        block_sums[(triton.cdiv(count, block_m), triton.cdiv(blocks, run), batch * heads)](
            query, key, rows, sums, start, end, *query.stride()[:3], *key.stride()[:3], scale, count, num_k, blocks,
            offset, heads, heads // key.shape[1], D=dim, BLOCK_D=width, BLOCK_M=block_m, KEYS=block, WIDE=run,
            PRECISION="tf32x3" if query.dtype == torch.float32 and not interpreting() else "ieee",
            num_warps=8 if block_m == 128 else 4, num_stages=3 if half and width <= 128 else 1,
        )  # fmt: skip
        block_levels[(lists, batch * heads)](
            sums, rows, level, start, count, lists, blocks, num_q, offset, heads, first, local, steps[2],
            SAMPLES=samples, KEYS=block, WIDE=max(16, 512 // samples), LEVELS=steps[0], PER_OCTAVE=steps[1],
        )  # fmt: skip
        lost_by_level[(triton.cdiv(count - sampled, ROWS_PER_PROGRAM), batch * heads)](
            sums, rows, level, moments, count, sampled, lists, blocks, offset, KEYS=block, WIDE=32, LEVELS=steps[0],
            RUN=ROWS_PER_PROGRAM, ONE=ONE,
        )  # fmt: skip
    return level, moments


def settled(moments: Tensor, rows: int, log: float, allowed: float, whole: bool) -> tuple[Tensor, Tensor]:
    """(the lowest level that is kept, int32 with one element; mean loss and its bound, float32 ``[2]``), by
    :func:`settle` from the sums of :func:`levels` over ``rows`` rows."""
    kept = torch.empty(1, dtype=torch.int32, device=moments.device)
    figures = torch.empty(2, dtype=torch.float32, device=moments.device)
    with torch.cuda.device_of(moments):
        settle[(1,)](moments, kept, figures, rows, log, allowed, LEVELS=moments.shape[1], ONE=ONE, WHOLE=whole)
    return kept, figures


def lists_of(level: Tensor, kept: Tensor, block: int, most: int) -> KeyBlocks:
    """The blocks whose level is at least ``kept`` (one integer on the device); ``most`` of them at most."""
    batch, heads, lists, blocks = level.shape
    counts = torch.empty((batch, heads, lists), dtype=torch.int32, device=level.device)
    index = torch.zeros(most, dtype=torch.int32, device=level.device)
    with torch.cuda.device_of(level):
        grid = (batch * heads * lists,)
        write_lists[grid](level, kept, counts, index, blocks, WIDE=256, COUNT=True)
        starts = starts_of(counts)
        write_lists[grid](level, kept, starts, index, blocks, WIDE=256, COUNT=False)
    return KeyBlocks(starts, index, block, block)
