"""How much each block of keys weighs for some rows: their softmax without values, summed up block by block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rehead.attention.kernels.general import interpreting
from rehead.attention.kernels.masks import LOG2E


@triton.jit
def block_sums(q_ptr, k_ptr, rows_ptr, out_ptr, kv_start, kv_end, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
               stride_kn, scale, count, num_k, num_blocks, q_offset, num_heads, group, D: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Grid: tiles of rows (the last first) x B*H. ``rows_ptr`` [B, H, count] int32, ``out_ptr`` [B, H, count,
    num_blocks] float32: each block's share of the row's softmax, causal; zeros for a row that sees nothing."""
    tiles = tl.cdiv(count, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < count
    d = tl.arange(0, BLOCK_D)
    cols = tl.arange(0, KEYS)
    rows = tl.load(rows_ptr + bh * count + place, mask=inside, other=0)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + rows[:, None].to(tl.int64) * stride_qm + d[None, :],
                mask=inside[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
    low = tl.maximum(tl.load(kv_start + b), 0)
    high = tl.minimum(tl.load(kv_end + b), num_k)
    top = tl.minimum(tl.where(inside, rows + q_offset + 1, 0), high)
    stop = (tl.max(top) + KEYS - 1) // KEYS
    k_base = k_ptr + b * stride_kb + h // group * stride_kh
    out = out_ptr + (bh * count + place) * num_blocks
    m_i = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for block in range(stop):
        key = block * KEYS + cols
        k = tl.load(k_base + key[None, :].to(tl.int64) * stride_kn + d[:, None],
                    mask=(d[:, None] < D) & (key[None, :] < num_k), other=0.0)  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        s = tl.where((key[None, :] >= low) & (key[None, :] < top[:, None]), s, float("-inf"))
        most = tl.maximum(tl.max(s, 1), -1.0e30)
        total = tl.sum(tl.exp2(s - most[:, None]), 1)
        tl.store(out + block, most + tl.log2(total), mask=inside)  # base 2, -inf where nothing is seen
        m_new = tl.maximum(m_i, most)
        l_i = l_i * tl.exp2(m_i - m_new) + total * tl.exp2(most - m_new)
        m_i = m_new
    whole = m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0))
    tl.debug_barrier()  # what follows reads what other threads of the program have written
    for first in range(0, num_blocks, WIDE):
        some = first + tl.arange(0, WIDE)
        where = out[:, None] + some[None, :]
        sums = tl.load(where, mask=inside[:, None] & (some < stop)[None, :], other=float("-inf"))
        tl.store(where, tl.exp2(sums - whole[:, None]), mask=inside[:, None] & (some < num_blocks)[None, :])


def run(
    query: Tensor, key: Tensor, rows: Tensor, keys: int, scale: float, offset: int, start: Tensor, end: Tensor
) -> Tensor:
    """Launch :func:`block_sums`; the arguments as for :func:`rehead.attention.block_scores.block_mass`."""
    batch, heads, _, dim = query.shape
    num_k, count = key.shape[2], rows.shape[2]
    blocks = triton.cdiv(num_k, keys)
    out = torch.empty((batch, heads, count, blocks), dtype=torch.float32, device=query.device)
    width = max(16, triton.next_power_of_2(dim))
    block_m = 16 if interpreting() else 128 if query.element_size() == 2 else 64
    with torch.cuda.device_of(query):
        block_sums[(triton.cdiv(count, block_m) * batch * heads,)](
            query, key, rows, out, start, end, *query.stride()[:3], *key.stride()[:3], scale, count, num_k, blocks,
            offset, heads, heads // key.shape[1], D=dim, BLOCK_D=width, BLOCK_M=block_m, KEYS=keys, WIDE=32,
            PRECISION="tf32x3" if query.dtype == torch.float32 and not interpreting() else "ieee",
            num_warps=8 if block_m == 128 else 4, num_stages=3 if width <= 128 and query.element_size() == 2 else 1,
        )  # fmt: skip
    return out
