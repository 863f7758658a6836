"""Forward attention for every card Triton compiles for: online softmax over blocks of keys, a tile of rows a program.

The general path: all mask rules, soft cap, ALiBi, sinks, additive bias, head_dim to 256, values of another width, bf16,
fp16 and fp32. Blocks that no row of the tile sees are never loaded, blocks that every row sees are never masked.
"""

import triton
import triton.language as tl

from rehead.attention.kernels.masks import LOG2E, key_bounds, listed_range, place, scores, split_range, visible


@triton.jit
def _blocks(acc, m_i, l_i, q, k_ptr, v_ptr, key_mask, kv_seg, bias_ptr, index, begin, end, rows, row, q_seg, low, high,
            num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap, slope, window, first_tokens, chunk,
            D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
            ALIBI: tl.constexpr, BIAS: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr,
            BLOCKS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    cols = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for at in range(begin, end, BLOCK_N):
        key = place(at, index, KEYS, BLOCKS) + cols
        if MASKED:
            k_keep = (d[:, None] < D) & (key[None, :] < num_k)
            v_keep = (key[:, None] < num_k) & (dv[None, :] < DV)
        else:
            k_keep = d[:, None] < D
            v_keep = dv[None, :] < DV
        k = tl.load(k_ptr + key[None, :].to(tl.int64) * stride_kn + d[:, None], mask=k_keep, other=0.0)
        bias = 0.0
        if BIAS:
            bias = tl.load(bias_ptr + rows[:, None].to(tl.int64) * stride_bm + key[None, :],
                           mask=(rows[:, None] < num_q) & (key[None, :] < num_k), other=0.0).to(tl.float32)  # fmt: skip
        raw = tl.dot(q, k, input_precision=PRECISION)
        s, _ = scores(raw, row[:, None], key[None, :], scale, softcap, slope, bias, SOFTCAP, ALIBI, BIAS)
        if MASKED:
            keep = visible(row[:, None], key[None, :], low, high, window, first_tokens, chunk, CAUSAL, WINDOW, FIRST,
                           CHUNK)  # fmt: skip
            if KEY_MASK:
                keep = keep & (tl.load(key_mask + key, mask=key < num_k, other=0) != 0)[None, :]
            if SEGMENTS:
                keep = keep & (q_seg[:, None] == tl.load(kv_seg + key, mask=key < num_k, other=-2)[None, :])
            s = tl.where(keep, s, float("-inf"))
        # The running maximum starts finite, so a row whose keys are all masked so far adds exp2(-inf) = 0, never NaN.
        m_new = tl.maximum(m_i, tl.max(s, 1))
        alpha = tl.exp2(m_i - m_new)
        p = tl.exp2(s - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        v = tl.load(v_ptr + key[:, None].to(tl.int64) * stride_vn + dv[None, :], mask=v_keep, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit
def attention_forward(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, kv_start, kv_end, key_mask, q_segments, kv_segments,
                      seg_begin, seg_end, starts, index, alibi, sinks, bias_ptr, stride_qb, stride_qh, stride_qm,
                      stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_bb, stride_bh, stride_bm,
                      stride_sb, stride_sh, scale, softcap, num_q, num_k, q_offset, window, first_tokens, chunk,
                      num_heads, group, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                      WINDOW: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
                      RANGE: tl.constexpr, KEY_MASK: tl.constexpr, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr,
                      ROWS: tl.constexpr, KEYS: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
                      BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid: query blocks (fastest) x B*H. Output [B, Sq, H, DV] contiguous; ``lse_ptr`` [B, H, Sq] float32, base 2,
    +inf for rows that see nothing. Pointers whose flag is off are never read."""
    num_m = tl.cdiv(num_q, BLOCK_M)
    m_block = num_m - 1 - tl.program_id(0) % num_m  # the longest causal tiles start first
    bh = tl.program_id(0) // num_m
    b = (bh // num_heads).to(tl.int64)
    h = (bh % num_heads).to(tl.int64)
    rows = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = rows + q_offset
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + rows[:, None].to(tl.int64) * stride_qm + d[None, :],
                mask=(rows[:, None] < num_q) & (d[None, :] < D), other=0.0)  # fmt: skip
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
    if SEGMENTS:
        q_seg = tl.load(q_segments + b * num_q + rows, mask=rows < num_q, other=-1)
        begin = tl.maximum(begin, tl.min(tl.load(seg_begin + b * num_q + rows, mask=rows < num_q, other=num_k)))
        end = tl.minimum(end, tl.max(tl.load(seg_end + b * num_q + rows, mask=rows < num_q, other=0)))
    if ALIBI:
        slope = tl.load(alibi + h).to(tl.float32)
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
    mask_base = key_mask
    seg_base = kv_segments
    bias_base = bias_ptr
    if KEY_MASK:
        mask_base = key_mask + b * num_k
    if SEGMENTS:
        seg_base = kv_segments + b * num_k
    if BIAS:
        bias_base = bias_ptr + b * stride_bb + h * stride_bh
    m_i = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if FIRST and not BLOCKS:
        first_stop = tl.minimum((low + first_tokens + BLOCK_N - 1) // BLOCK_N * BLOCK_N, start)
        acc, m_i, l_i = _blocks(acc, m_i, l_i, q, k_base, v_base, mask_base, seg_base, bias_base, index,
                                low // BLOCK_N * BLOCK_N, first_stop, rows, row, q_seg, low, high, num_q, num_k,
                                stride_kn, stride_vn, stride_bm, scale, softcap, slope, window, first_tokens, chunk, D,
                                DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST, CHUNK, SOFTCAP, ALIBI, BIAS,
                                KEY_MASK, SEGMENTS, BLOCKS, KEYS, True, PRECISION)  # fmt: skip
    acc, m_i, l_i = _blocks(acc, m_i, l_i, q, k_base, v_base, mask_base, seg_base, bias_base, index, start, clear, rows,
                            row, q_seg, low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap, slope,
                            window, first_tokens, chunk, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST,
                            CHUNK, SOFTCAP, ALIBI, BIAS, KEY_MASK, SEGMENTS, BLOCKS, KEYS, True,
                            PRECISION)  # fmt: skip
    if not (KEY_MASK or SEGMENTS):
        acc, m_i, l_i = _blocks(acc, m_i, l_i, q, k_base, v_base, mask_base, seg_base, bias_base, index, clear, masked,
                                rows, row, q_seg, low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale,
                                softcap, slope, window, first_tokens, chunk, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL,
                                WINDOW, FIRST, CHUNK, SOFTCAP, ALIBI, BIAS, KEY_MASK, SEGMENTS, BLOCKS, KEYS, False,
                                PRECISION)  # fmt: skip
    acc, m_i, l_i = _blocks(acc, m_i, l_i, q, k_base, v_base, mask_base, seg_base, bias_base, index, masked, stop, rows,
                            row, q_seg, low, high, num_q, num_k, stride_kn, stride_vn, stride_bm, scale, softcap, slope,
                            window, first_tokens, chunk, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, FIRST,
                            CHUNK, SOFTCAP, ALIBI, BIAS, KEY_MASK, SEGMENTS, BLOCKS, KEYS, True,
                            PRECISION)  # fmt: skip

    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        acc = acc * alpha[:, None]
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        m_i = m_new
    empty = l_i == 0.0
    lse = tl.where(empty, float("inf"), m_i + tl.log2(l_i))
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    tl.store(lse_ptr + bh.to(tl.int64) * num_q + rows, lse, mask=rows < num_q)
    o_rows = (b * num_q + rows.to(tl.int64)) * num_heads + h
    tl.store(o_ptr + o_rows[:, None] * DV + dv[None, :], out.to(o_ptr.dtype.element_ty),
             mask=(rows[:, None] < num_q) & (dv[None, :] < DV))  # fmt: skip
