"""Backward attention for every card: two deterministic kernels that rebuild each tile from (q, k, log-sum-exp).

``grad_key_value`` owns a block of keys and walks the queries that reach it, over all query heads of the group, so that
grouped heads need no repeat and no atomics; ``grad_query`` owns a block of queries and walks its keys. ``row_delta``
prepares delta_i = sum_d dO_id O_id. The formulas are those of FlashAttention-2 (arXiv 2307.08691), with ds = p * (dp -
delta) * (1 - tanh^2) where scores are soft-capped.
"""

import triton
import triton.language as tl

from rehead.attention.kernels.masks import key_bounds, listed_range, place, row_bounds, scores, split_range, visible


@triton.jit
def row_delta(o_ptr, do_ptr, delta_ptr, zero_ptr, stride_dob, stride_doh, stride_dom, num_q, padded_q, num_heads,
              DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
              WIDTH: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """delta [B, H, Sq] float32 from O (contiguous [B, Sq, H, DV]) and dO (any strides). Grid: rows, heads, B.

    With ZERO it also clears ``zero_ptr`` [B, H, padded_q, WIDTH] float32, the buffer dQ is added up in, on the way."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    b = tl.program_id(2).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)[None, None, :]
    keep = (row < num_q) & (h < num_heads)
    o_offset = ((b * num_q + row) * num_heads + h) * DV
    do_offset = b * stride_dob + h.to(tl.int64) * stride_doh + row.to(tl.int64) * stride_dom
    wide = keep[:, :, None] & (dv < DV)
    o = tl.load(o_ptr + o_offset[:, :, None] + dv, mask=wide, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + do_offset[:, :, None] + dv, mask=wide, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (b * num_heads + h) * num_q + row, tl.sum(o * do, 2), mask=keep)
    if ZERO:
        offset = (((b * num_heads + h) * padded_q + row) * WIDTH)[:, :, None] + tl.arange(0, WIDTH)[None, None, :]
        inside = ((row < padded_q) & (h < num_heads))[:, :, None]
        tl.store(zero_ptr + offset, tl.zeros([BLOCK_M, BLOCK_H, WIDTH], tl.float32), mask=inside)


@triton.jit
def _walk_rows(dk, dv_acc, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_seg_ptr, bias_ptr, index, begin, end, key, kv_seg,
               key_keep, low, high, num_q, num_k, q_offset, stride_qm, stride_dom, stride_bm, scale, softcap, slope,
               window, first_tokens, chunk, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               FIRST: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
               KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
               MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for at in range(begin, end, BLOCK_M):
        rows = place(at, index, ROWS, BLOCKS) + tl.arange(0, BLOCK_M)
        inside = rows < num_q
        wide = rows[:, None].to(tl.int64)
        q = tl.load(q_ptr + wide * stride_qm + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        do = tl.load(do_ptr + wide * stride_dom + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
        lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        row = rows[None, :] + q_offset
        bias = 0.0
        if BIAS:
            bias = tl.load(bias_ptr + rows[None, :].to(tl.int64) * stride_bm + key[:, None],
                           mask=inside[None, :] & (key[:, None] < num_k), other=0.0).to(tl.float32)  # fmt: skip
        raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # transposed tile: [keys, queries]
        s, capped = scores(raw, row, key[:, None], scale, softcap, slope, bias, SOFTCAP, ALIBI, BIAS)
        if MASKED:
            keep = visible(row, key[:, None], low, high, window, first_tokens, chunk, CAUSAL, WINDOW, FIRST, CHUNK)
            if KEY_MASK:
                keep = keep & key_keep[:, None]
            if SEGMENTS:
                keep = keep & (tl.load(q_seg_ptr + rows, mask=inside, other=-1)[None, :] == kv_seg[:, None])
            s = tl.where(keep, s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv_acc


@triton.jit
def grad_key_value(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, kv_start, kv_end, key_mask,
                   q_segments, kv_segments, seg_begin, seg_end, starts, index, alibi, bias_ptr, stride_qb, stride_qh,
                   stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_dob, stride_doh,
                   stride_dom, stride_bb, stride_bh, stride_bm, stride_sb, stride_sh, scale, softcap, num_q, num_k,
                   q_offset, window, first_tokens, chunk, num_heads, num_kv, splits, D: tl.constexpr, DV: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr,
                   SOFTCAP: tl.constexpr, RANGE: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr,
                   BLOCKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr,
                   BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (key blocks (fastest) x B*K, splits). Split s of the group's query heads writes dk, dv of
    [splits, B, Skv, K, D | DV]; the caller adds the splits up. ``seg_begin``/``seg_end`` [B, Skv]: the query rows of
    each key's segment. ``starts``, ``index``: the row blocks that see each key block."""
    num_n = tl.cdiv(num_k, BLOCK_N)
    n_block = tl.program_id(0) % num_n
    bk = tl.program_id(0) // num_n
    split = tl.program_id(1)
    b = (bk // num_kv).to(tl.int64)
    kv = (bk % num_kv).to(tl.int64)
    group = num_heads // num_kv
    start_n = n_block * BLOCK_N
    key = start_n + tl.arange(0, BLOCK_N)
    inside = key < num_k
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    wide = key[:, None].to(tl.int64)
    k = tl.load(k_ptr + b * stride_kb + kv * stride_kh + wide * stride_kn + d[None, :],
                mask=inside[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
    v = tl.load(v_ptr + b * stride_vb + kv * stride_vh + wide * stride_vn + dv[None, :],
                mask=inside[:, None] & (dv[None, :] < DV), other=0.0)  # fmt: skip
    low = 0
    high = num_k
    if RANGE:
        low = tl.maximum(tl.load(kv_start + b), 0)
        high = tl.minimum(tl.load(kv_end + b), num_k)
    last_key = tl.minimum(start_n + BLOCK_N, num_k) - 1
    begin, end, clear_begin, clear_end = row_bounds(start_n, last_key, num_q, q_offset, window, chunk, CAUSAL, WINDOW,
                                                    CHUNK)  # fmt: skip
    kv_seg = key * 0
    key_keep = inside
    if SEGMENTS:
        kv_seg = tl.load(kv_segments + b * num_k + key, mask=inside, other=-2)
        begin = tl.maximum(begin, tl.min(tl.load(seg_begin + b * num_k + key, mask=inside, other=num_q)))
        end = tl.minimum(end, tl.max(tl.load(seg_end + b * num_k + key, mask=inside, other=0)))
    if KEY_MASK:
        key_keep = tl.load(key_mask + b * num_k + key, mask=inside, other=0) != 0
    if FIRST:  # noqa: SIM102
        if (start_n < low + first_tokens) & (last_key >= low):  # seen from beyond the window too
            end = num_q
    if (start_n >= high) | (last_key < low):  # padding only: nothing reaches this block
        end = begin
    if (start_n < low) | (start_n + BLOCK_N > high):
        clear_begin = num_q
    if KEY_MASK or SEGMENTS:
        clear_begin = num_q
    start, clear, masked, stop = split_range(begin, end, clear_begin, clear_end, BLOCK_M)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    per_split = group // splits
    for i in range(per_split):
        h = kv * group + split * per_split + i
        bh = b * num_heads + h
        q_base = q_ptr + b * stride_qb + h * stride_qh
        do_base = do_ptr + b * stride_dob + h * stride_doh
        lse_base = lse_ptr + bh * num_q
        delta_base = delta_ptr + bh * num_q
        seg_base = q_segments
        bias_base = bias_ptr
        slope = 0.0
        if SEGMENTS:
            seg_base = q_segments + b * num_q
        if BIAS:
            bias_base = bias_ptr + b * stride_bb + h * stride_bh
        if ALIBI:
            slope = tl.load(alibi + h).to(tl.float32)
        if BLOCKS:
            start, clear, masked, stop = listed_range(starts + b * stride_sb + h * stride_sh, index, start_n // KEYS,
                                                      clear_begin, clear_end, ROWS)  # fmt: skip
            if end <= begin:
                clear, masked, stop = start, start, start
        dk, dv_acc = _walk_rows(dk, dv_acc, k, v, q_base, do_base, lse_base, delta_base, seg_base, bias_base, index,
                                start, clear, key, kv_seg, key_keep, low, high, num_q, num_k, q_offset, stride_qm,
                                stride_dom, stride_bm, scale, softcap, slope, window, first_tokens, chunk, D, DV,
                                BLOCK_D, BLOCK_DV, BLOCK_M, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP, ALIBI, BIAS,
                                KEY_MASK, SEGMENTS, BLOCKS, ROWS, True, PRECISION)  # fmt: skip
        if not (KEY_MASK or SEGMENTS):
            dk, dv_acc = _walk_rows(dk, dv_acc, k, v, q_base, do_base, lse_base, delta_base, seg_base, bias_base, index,
                                    clear, masked, key, kv_seg, key_keep, low, high, num_q, num_k, q_offset, stride_qm,
                                    stride_dom, stride_bm, scale, softcap, slope, window, first_tokens, chunk, D, DV,
                                    BLOCK_D, BLOCK_DV, BLOCK_M, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP, ALIBI, BIAS,
                                    KEY_MASK, SEGMENTS, BLOCKS, ROWS, False, PRECISION)  # fmt: skip
        dk, dv_acc = _walk_rows(dk, dv_acc, k, v, q_base, do_base, lse_base, delta_base, seg_base, bias_base, index,
                                masked, stop, key, kv_seg, key_keep, low, high, num_q, num_k, q_offset, stride_qm,
                                stride_dom, stride_bm, scale, softcap, slope, window, first_tokens, chunk, D, DV,
                                BLOCK_D, BLOCK_DV, BLOCK_M, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP, ALIBI, BIAS,
                                KEY_MASK, SEGMENTS, BLOCKS, ROWS, True, PRECISION)  # fmt: skip

    batches = (tl.num_programs(0) // (num_n * num_kv)).to(tl.int64)
    out_rows = ((split * batches + b) * num_k + key.to(tl.int64)) * num_kv + kv
    tl.store(dk_ptr + out_rows[:, None] * D + d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty),
             mask=inside[:, None] & (d[None, :] < D))  # fmt: skip
    tl.store(dv_ptr + out_rows[:, None] * DV + dv[None, :], dv_acc.to(dv_ptr.dtype.element_ty),
             mask=inside[:, None] & (dv[None, :] < DV))  # fmt: skip


@triton.jit
def _walk_keys(dq, q, do, lse, delta, k_ptr, v_ptr, key_mask, kv_seg_ptr, bias_ptr, index, begin, end, rows, row, q_seg,
               low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap, slope, window, first_tokens,
               chunk, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
               BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr,
               CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
               KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
               MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for at in range(begin, end, BLOCK_N):
        key = place(at, index, KEYS, BLOCKS) + tl.arange(0, BLOCK_N)
        inside = key < num_k
        wide = key[:, None].to(tl.int64)
        k = tl.load(k_ptr + wide * stride_kn + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
        v = tl.load(v_ptr + wide * stride_vn + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
        bias = 0.0
        if BIAS:
            bias = tl.load(bias_ptr + rows[:, None].to(tl.int64) * stride_bm + key[None, :],
                           mask=(rows[:, None] < num_q) & inside[None, :], other=0.0).to(tl.float32)  # fmt: skip
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, capped = scores(raw, row[:, None], key[None, :], scale, softcap, slope, bias, SOFTCAP, ALIBI, BIAS)
        if MASKED:
            keep = visible(row[:, None], key[None, :], low, high, window, first_tokens, chunk, CAUSAL, WINDOW, FIRST,
                           CHUNK)  # fmt: skip
            if KEY_MASK:
                keep = keep & (tl.load(key_mask + key, mask=inside, other=0) != 0)[None, :]
            if SEGMENTS:
                keep = keep & (q_seg[:, None] == tl.load(kv_seg_ptr + key, mask=inside, other=-2)[None, :])
            s = tl.where(keep, s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def grad_query(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, kv_start, kv_end, key_mask, q_segments,
               kv_segments, seg_begin, seg_end, starts, index, alibi, bias_ptr, stride_qb, stride_qh, stride_qm,
               stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
               stride_bb, stride_bh, stride_bm, stride_sb, stride_sh, scale, softcap, num_q, num_k, q_offset, window,
               first_tokens, chunk, num_heads, group, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
               RANGE: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr,
               ROWS: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Grid: query blocks (fastest) x B*H. dq is [B, Sq, H, D] contiguous; segment bounds as in the forward kernel."""
    num_m = tl.cdiv(num_q, BLOCK_M)
    m_block = num_m - 1 - tl.program_id(0) % num_m
    bh = tl.program_id(0) // num_m
    b = (bh // num_heads).to(tl.int64)
    h = (bh % num_heads).to(tl.int64)
    rows = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = rows + q_offset
    inside = rows < num_q
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    wide = rows[:, None].to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + wide * stride_qm + d[None, :],
                mask=inside[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
    do = tl.load(do_ptr + b * stride_dob + h * stride_doh + wide * stride_dom + dv[None, :],
                 mask=inside[:, None] & (dv[None, :] < DV), other=0.0)  # fmt: skip
    lse = tl.load(lse_ptr + bh.to(tl.int64) * num_q + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + bh.to(tl.int64) * num_q + rows, mask=inside, other=0.0)
    low = 0
    high = num_k
    if RANGE:
        low = tl.maximum(tl.load(kv_start + b), 0)
        high = tl.minimum(tl.load(kv_end + b), num_k)
    last_row = q_offset + tl.minimum((m_block + 1) * BLOCK_M, num_q) - 1
    begin, end, clear_begin, clear_end = key_bounds(q_offset + m_block * BLOCK_M, last_row, low, high, window, chunk,
                                                    CAUSAL, WINDOW, CHUNK)  # fmt: skip
    q_seg = rows * 0
    slope = 0.0
    mask_base = key_mask
    seg_base = kv_segments
    bias_base = bias_ptr
    if SEGMENTS:
        seg_base = kv_segments + b * num_k
        q_seg = tl.load(q_segments + b * num_q + rows, mask=inside, other=-1)
        begin = tl.maximum(begin, tl.min(tl.load(seg_begin + b * num_q + rows, mask=inside, other=num_k)))
        end = tl.minimum(end, tl.max(tl.load(seg_end + b * num_q + rows, mask=inside, other=0)))
    if ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
    if KEY_MASK:
        mask_base = key_mask + b * num_k
    if BIAS:
        bias_base = bias_ptr + b * stride_bb + h * stride_bh
    if KEY_MASK or SEGMENTS:
        clear_begin = num_k
        clear_end = 0
    if BLOCKS:
        start, clear, masked, stop = listed_range(starts + b * stride_sb + h * stride_sh, index,
                                                  m_block * BLOCK_M // ROWS, clear_begin, clear_end,
                                                  KEYS)  # fmt: skip
    else:
        start, clear, masked, stop = split_range(begin, end, clear_begin, clear_end, BLOCK_N)
    k_base = k_ptr + b * stride_kb + (h // group) * stride_kh
    v_base = v_ptr + b * stride_vb + (h // group) * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FIRST and not BLOCKS:
        first_stop = tl.minimum((low + first_tokens + BLOCK_N - 1) // BLOCK_N * BLOCK_N, start)
        dq = _walk_keys(dq, q, do, lse, delta, k_base, v_base, mask_base, seg_base, bias_base, index,
                        low // BLOCK_N * BLOCK_N, first_stop, rows, row, q_seg, low, high, num_q, num_k, stride_kn,
                        stride_vn, stride_bm, scale, softcap, slope, window, first_tokens, chunk, D, DV, BLOCK_D,
                        BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP, ALIBI, BIAS, KEY_MASK, SEGMENTS,
                        BLOCKS, KEYS, True, PRECISION)  # fmt: skip
    dq = _walk_keys(dq, q, do, lse, delta, k_base, v_base, mask_base, seg_base, bias_base, index, start, clear, rows,
                    row, q_seg, low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap, slope, window,
                    first_tokens, chunk, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP,
                    ALIBI, BIAS, KEY_MASK, SEGMENTS, BLOCKS, KEYS, True, PRECISION)  # fmt: skip
    if not (KEY_MASK or SEGMENTS):
        dq = _walk_keys(dq, q, do, lse, delta, k_base, v_base, mask_base, seg_base, bias_base, index, clear, masked,
                        rows, row, q_seg, low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap,
                        slope, window, first_tokens, chunk, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST,
                        CHUNK, SOFTCAP, ALIBI, BIAS, KEY_MASK, SEGMENTS, BLOCKS, KEYS, False, PRECISION)  # fmt: skip
    dq = _walk_keys(dq, q, do, lse, delta, k_base, v_base, mask_base, seg_base, bias_base, index, masked, stop, rows,
                    row, q_seg, low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap, slope, window,
                    first_tokens, chunk, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP,
                    ALIBI, BIAS, KEY_MASK, SEGMENTS, BLOCKS, KEYS, True, PRECISION)  # fmt: skip
    o_rows = (b * num_q + rows.to(tl.int64)) * num_heads + h
    tl.store(dq_ptr + o_rows[:, None] * D + d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty),
             mask=inside[:, None] & (d[None, :] < D))  # fmt: skip
