"""Decode attention: few query positions, a long cache. Two kernels, flash-decoding style: partial sums, then a merge.

The tile's rows are the query heads of one group times the query positions, so that K and V are read once for all of
them. The visible range of the cache is split into ``splits`` parts of equal work. The range is read from device memory,
so lengths may change between replays of a CUDA graph while the grid stays the same.

Both kernels let the next one start at once (programmatic dependent launch, EARLY). With AHEAD, a program that waits for
the kernels before it prefetches its keys into the L2 cache; a prefetch returns no value, so it cannot read a stale one.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rehead.attention.kernels.masks import LOG2E, key_bounds, scores, visible


@triton.jit
def prefetch(address, wanted):
    """Bring the lines of ``address`` (a tensor of pointers) into the L2 cache, where ``wanted``."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [address.to(tl.uint64), wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def part_range(b, split, tile, start_ptr, end_ptr, offset_ptr, stride_start, stride_end, stride_offset, num_q, num_k,
               kv_end, q_offset, window, chunk, splits, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
               OFFSET: tl.constexpr):  # fmt: skip
    """(start_n, stop_n, clear_low, clear_high, low, offset) of a part.

    Its keys are [start_n, stop_n), and every row of the tile sees those in [clear_low, clear_high). ``low`` is the
    sequence's first key, ``offset`` the position of query 0. Lengths are read without the L1 cache, which may have old
    ones.
    """
    low = 0
    high = tl.minimum(kv_end, num_k)
    offset = q_offset
    if START:
        low = tl.maximum(tl.load(start_ptr + b * stride_start, cache_modifier=".cg").to(tl.int32), 0)
    if END:
        high = tl.minimum(tl.load(end_ptr + b * stride_end, cache_modifier=".cg").to(tl.int32), high)
    if OFFSET:
        offset = tl.load(offset_ptr + b * stride_offset, cache_modifier=".cg").to(tl.int32)
    first_row = offset + tile * ROWS // GROUP
    last_row = offset + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, num_q - 1)
    begin, end, clear_low, clear_high = key_bounds(first_row, last_row, low, high, window, chunk, CAUSAL, WINDOW, CHUNK)
    begin = (begin // BLOCK_N) * BLOCK_N
    span = tl.maximum(end - begin, 0)
    part = ((span + splits - 1) // splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    start_n = begin + split * part
    return start_n, tl.minimum(start_n + part, end), clear_low, clear_high, low, offset


@triton.jit
def _join(first_a, last_a, count_a, first_b, last_b, count_b):
    return tl.minimum(first_a, first_b), tl.maximum(last_a, last_b), count_a + count_b


@triton.jit
def seen_range(mask_row, start_n, stop_n, SCAN: tl.constexpr):
    """(first visible key of a mask row in [start_n, stop_n), last plus one, number of visible keys)."""
    first = tl.full([SCAN], 0, tl.int32) + stop_n
    last = tl.full([SCAN], 0, tl.int32) + start_n
    count = tl.full([SCAN], 0, tl.int32)
    for n in range(start_n, stop_n, SCAN):
        key = n + tl.arange(0, SCAN)
        seen = tl.load(mask_row + key, mask=key < stop_n, other=0) != 0
        first = tl.where(seen, tl.minimum(first, key), first)
        last = tl.where(seen, key + 1, last)
        count += seen.to(tl.int32)
    return tl.reduce((first, last, count), 0, _join)


@triton.jit
def attend(q, q_tail, m_i, l_i, acc, n, k_tile, v_tile, mask_row, bias_rows, inside, row, slope, scale, softcap,
           clear_low, low, stop_n, window, chunk, stride_kn, stride_vn, D: tl.constexpr, DV: tl.constexpr,
           BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
           WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr,
           BIAS: tl.constexpr, SINGLE: tl.constexpr, PLAIN: tl.constexpr, TAIL: tl.constexpr, EDGE: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Add the keys n..n+BLOCK_N to the running softmax. Without EDGE every row sees all of them. With TAIL the values
    are the keys, read once, and ``k_tile`` has the columns that the keys have besides."""
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    key = n + columns
    here = key < stop_n
    k_here = k_tile + tl.cast(n, tl.int64) * stride_kn
    v_here = v_tile + tl.cast(n, tl.int64) * stride_vn
    if EDGE:
        k = tl.load(k_here, mask=here[None, :] & (d[:, None] < D), other=0.0)
        v = tl.load(v_here, mask=here[:, None] & (dv[None, :] < DV), other=0.0)
    elif D == BLOCK_D and DV == BLOCK_DV:
        k = tl.load(k_here)
        v = tl.load(v_here)
    else:
        k = tl.load(k_here, mask=d[:, None] < D, other=0.0)
        v = tl.load(v_here, mask=dv[None, :] < DV, other=0.0)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_rows[:, None] + key[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        bias = bias.to(tl.float32)
    if TAIL:
        raw = tl.dot(q, tl.trans(v), input_precision=PRECISION)
        raw = tl.dot(q_tail, k, raw, input_precision=PRECISION)
    else:
        raw = tl.dot(q, k, input_precision=PRECISION)
    if PLAIN and not EDGE:  # one multiply-add per element; the scale is positive, so the maximum may come before it
        factor = scale * LOG2E
        m_new = tl.maximum(m_i, tl.max(raw, 1) * factor)
        p = tl.exp2(raw * factor - m_new[:, None])
    else:
        s, _ = scores(raw, row[:, None], key[None, :], scale, softcap, slope, bias, SOFTCAP, ALIBI, BIAS)
        if EDGE:
            if SINGLE:  # all rows are at one position, so its bounds decide everything
                keep = ((key >= clear_low) & here)[None, :]
            else:
                keep = visible(row[:, None], key[None, :], low, stop_n, window, 0, chunk, CAUSAL, WINDOW, False, CHUNK)
            if MASK:
                keep = keep & (tl.load(mask_row + key, mask=here, other=0) != 0)[None, :]
            s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


# Lengths change with every token: compiling again for each divisibility of each would stall a generation.
@triton.jit(do_not_specialize=["stride_mask", "stride_bb", "stride_bh", "stride_bm", "num_k", "kv_end", "q_offset",
                               "splits"])  # fmt: skip
def partial_attention(q_ptr, k_ptr, v_ptr, acc_ptr, lse_ptr, out_ptr, start_ptr, end_ptr, mask_ptr, offset_ptr, alibi,
                      sinks, bias_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb,
                      stride_vh, stride_vn, stride_start, stride_end, stride_mask, stride_offset, stride_bb, stride_bh,
                      stride_bm, scale, softcap, num_q, num_k, kv_end, q_offset, window, chunk, num_kv, splits,
                      GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
                      CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
                      START: tl.constexpr, END: tl.constexpr, MASK: tl.constexpr, OFFSET: tl.constexpr,
                      ALIBI: tl.constexpr, SINKS: tl.constexpr, BIAS: tl.constexpr, DIRECT: tl.constexpr,
                      EARLY: tl.constexpr, AHEAD: tl.constexpr, SINGLE: tl.constexpr, PLAIN: tl.constexpr,
                      TAIL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (splits, B*K, row tiles). With TAIL, k_ptr has the last D columns of the keys and v_ptr the others, which
    are also the values. Writes the normalised partial output [B*K, splits, rows, BLOCK_DV] float32 and its
    base-2 log-sum-exp; with DIRECT (one split) the output [B, Sq, H, DV] itself, sinks included. With EARLY, the first
    AHEAD keys of a part are prefetched."""
    split = tl.program_id(0)
    bk = tl.program_id(1)
    b = (bk // num_kv).to(tl.int64)
    kv = (bk % num_kv).to(tl.int64)
    tile = tl.program_id(2)
    r = tile * ROWS + tl.arange(0, ROWS)
    total = num_q * GROUP
    inside = r < total
    position = tl.minimum(r // GROUP, num_q - 1)
    head = kv * GROUP + r % GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    columns = tl.arange(0, BLOCK_N)
    q_rows = b * stride_qb + head * stride_qh + position.to(tl.int64) * stride_qm
    k_base = k_ptr + b * stride_kb + kv * stride_kh
    v_base = v_ptr + b * stride_vb + kv * stride_vh
    mask_row = mask_ptr + b * stride_mask
    if EARLY:
        gdc_launch_dependents()
        if AHEAD > 0:
            # The kernels before may still be writing lengths; here they only decide what to prefetch.
            start_n, stop_n, clear_low, clear_high, low, offset = part_range(
                b, split, tile, start_ptr, end_ptr, offset_ptr, stride_start, stride_end, stride_offset, num_q, num_k,
                kv_end, q_offset, window, chunk, splits, GROUP, ROWS, BLOCK_N, CAUSAL, WINDOW, CHUNK, START, END,
                OFFSET,
            )  # fmt: skip
            LINE: tl.constexpr = 1024 // q_ptr.dtype.element_ty.primitive_bitwidth
            line = tl.arange(0, (BLOCK_D + LINE - 1) // LINE) * LINE
            line_v = tl.arange(0, (BLOCK_DV + LINE - 1) // LINE) * LINE
            soon = start_n + tl.arange(0, AHEAD)
            wanted = (soon >= 0) & (soon < stop_n)
            far = soon.to(tl.int64)[:, None]
            if MASK:
                bytes_ahead = start_n + tl.arange(0, 64) * 128
                prefetch(mask_row + bytes_ahead, (bytes_ahead >= 0) & (bytes_ahead < stop_n))
            prefetch(k_base + far * stride_kn + line[None, :], wanted[:, None] & (line < D)[None, :])
            prefetch(v_base + far * stride_vn + line_v[None, :], wanted[:, None] & (line_v < DV)[None, :])
            prefetch(q_ptr + q_rows[:, None] + line[None, :], inside[:, None] & (line < D)[None, :])
        gdc_wait()
    start_n, stop_n, clear_low, clear_high, low, offset = part_range(
        b, split, tile, start_ptr, end_ptr, offset_ptr, stride_start, stride_end, stride_offset, num_q, num_k, kv_end,
        q_offset, window, chunk, splits, GROUP, ROWS, BLOCK_N, CAUSAL, WINDOW, CHUNK, START, END, OFFSET,
    )  # fmt: skip
    if TAIL:
        q = tl.load(q_ptr + q_rows[:, None] + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
        q_tail = tl.load(q_ptr + q_rows[:, None] + DV + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
    else:
        q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        q_tail = q
    row = offset + position
    solid = True
    if MASK:  # looking once saves looking at every block, unless there are holes between the visible keys
        first, last, count = seen_range(mask_row, start_n, stop_n, SCAN)
        solid = count == last - first
        start_n = first // BLOCK_N * BLOCK_N
        stop_n = tl.where(count == 0, start_n, last)
        clear_low = tl.maximum(clear_low, first)
    clear = (tl.maximum(start_n, clear_low) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    clear_end = tl.minimum(stop_n, clear_high) // BLOCK_N * BLOCK_N
    if (not solid) | (clear_end <= clear):
        clear = start_n
        clear_end = start_n

    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi + head, mask=inside, other=0.0).to(tl.float32)[:, None]
    bias_rows = bias_ptr + b * stride_bb + head.to(tl.int64) * stride_bh + position * stride_bm
    k_tile = k_base + columns[None, :] * stride_kn + d[:, None]
    v_tile = v_base + columns[:, None] * stride_vn + dv[None, :]
    m_i = tl.full([ROWS], -1.0e30, tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for n in range(clear, clear_end, BLOCK_N):
        m_i, l_i, acc = attend(
            q, q_tail, m_i, l_i, acc, n, k_tile, v_tile, mask_row, bias_rows, inside, row, slope, scale, softcap,
            clear_low, low, stop_n, window, chunk, stride_kn, stride_vn, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL,
            WINDOW, CHUNK, SOFTCAP, MASK, ALIBI, BIAS, SINGLE, PLAIN, TAIL, False, PRECISION,
        )  # fmt: skip
    # What is left: an incomplete block at either end, or all of them where the mask has holes.
    skipped = clear_end - clear
    for left in range(start_n, stop_n - skipped, BLOCK_N):
        n = left + tl.where(left >= clear, skipped, 0)
        m_i, l_i, acc = attend(
            q, q_tail, m_i, l_i, acc, n, k_tile, v_tile, mask_row, bias_rows, inside, row, slope, scale, softcap,
            clear_low, low, stop_n, window, chunk, stride_kn, stride_vn, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL,
            WINDOW, CHUNK, SOFTCAP, MASK, ALIBI, BIAS, SINGLE, PLAIN, TAIL, True, PRECISION,
        )  # fmt: skip

    if DIRECT and SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        acc = acc * alpha[:, None]
        l_i = l_i * alpha + tl.exp2(sink - m_new)
    empty = l_i == 0.0
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    if DIRECT:
        out_rows = (b * num_q + position) * (num_kv * GROUP) + head
        tl.store(out_ptr + out_rows[:, None] * DV + dv[None, :], out.to(out_ptr.dtype.element_ty),
                 mask=inside[:, None] & (dv[None, :] < DV))  # fmt: skip
    else:
        # An empty part weighs nothing in the merge; its rows of acc are zeros, not garbage.
        lse = tl.where(empty, float("-inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i)))
        rows = (bk.to(tl.int64) * splits + split) * total + r
        tl.store(lse_ptr + rows, lse, mask=inside)
        tl.store(acc_ptr + rows[:, None] * BLOCK_DV + dv[None, :], out, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits"])
def merge_parts(acc_ptr, lse_ptr, out_ptr, sinks, num_q, num_kv, splits, GROUP: tl.constexpr, DV: tl.constexpr,
                BLOCK_DV: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr,
                EARLY: tl.constexpr, ALONE: tl.constexpr):  # fmt: skip
    """Grid (B*K, rows, column blocks): out = sum_s 2^(lse_s - m) acc_s / (sum_s 2^(lse_s - m) + 2^(sink - m))."""
    bk = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    b = bk // num_kv
    head = (bk % num_kv) * GROUP + r % GROUP
    total = num_q * GROUP
    dv = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.arange(0, PARTS)
    if EARLY:
        # The next call's programs may start at once, unless two share a multiprocessor and would start unevenly.
        if ALONE:
            gdc_launch_dependents()
        gdc_wait()
        if not ALONE:
            gdc_launch_dependents()
    m_i = -1.0e30
    l_i = 0.0
    if SINKS:
        m_i = tl.load(sinks + head).to(tl.float32) * LOG2E
        l_i = 1.0
    acc = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, splits, PARTS):
        there = first + parts < splits
        rows = (bk * splits + first + parts) * total + r
        lse = tl.load(lse_ptr + rows, mask=there, other=float("-inf"))
        part = tl.load(acc_ptr + rows[:, None] * BLOCK_DV + dv[None, :], mask=there[:, None], other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        weight = tl.exp2(lse - m_new)
        alpha = tl.exp2(m_i - m_new)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        l_i = l_i * alpha + tl.sum(weight, 0)
        m_i = m_new
    out = acc / tl.where(l_i == 0.0, 1.0, l_i)
    out_row = (b * num_q + r // GROUP) * (num_kv * GROUP) + head
    tl.store(out_ptr + out_row * DV + dv, out.to(out_ptr.dtype.element_ty), mask=dv < DV)
