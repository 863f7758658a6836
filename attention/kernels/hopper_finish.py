"""The end of the Hopper backward pass, in Triton: dQ out of its buffer, and the first tokens beyond a window."""

import triton
import triton.language as tl

from rehead.attention.kernels.masks import LOG2E


@triton.jit
def _first_keys(dq, dk, dv_acc, q_ptr, do_ptr, k, v, key, high, rows, lse, delta, stride_qm, stride_dom, scale, num_q,
                q_offset, window, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_DV: tl.constexpr):  # fmt: skip
    """Adds what the first tokens ``key`` give to the gradients of a tile of rows, where the window leaves them out."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    inside = rows < num_q
    wide = rows[:, None].to(tl.int64)
    q = tl.load(q_ptr + wide * stride_qm + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)
    do = tl.load(do_ptr + wide * stride_dom + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
    s = tl.dot(q, tl.trans(k)) * (scale * LOG2E)
    keep = (key[None, :] <= (rows + q_offset - window)[:, None]) & (key < high)[None, :]
    p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)
    ds = (p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(k.dtype)
    dq = tl.dot(ds, k, dq)
    dk = tl.dot(tl.trans(ds), q, dk)
    dv_acc = tl.dot(tl.trans(p.to(do.dtype)), do, dv_acc)
    return dq, dk, dv_acc


@triton.jit
def finish_query(acc_ptr, dq_ptr, q_ptr, k_ptr, v_ptr, do_ptr, lse, delta, kv_start, kv_end, dk_ptr, dv_ptr, stride_qb,
                 stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_dob,
                 stride_doh, stride_dom, scale, num_q, num_k, padded_q, num_heads, group, q_offset, window,
                 first_tokens, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                 BLOCK_M: tl.constexpr, WARPS: tl.constexpr, FIRST: tl.constexpr, RANGE: tl.constexpr,
                 REPEAT: tl.constexpr):  # fmt: skip
    """dq [B, Sq, H, D] = scale * the buffer [B, H, padded_q, BLOCK_D], put back in order.

    Grid: runs of REPEAT query blocks (fastest) x B*H. WARPS is the number of consumer warps that filled the buffer.
    With FIRST it also adds the part of the first tokens beyond the window, to dq and to ``dk_ptr``, ``dv_ptr``
    [B, K, FIRST, D | DV] float32, which start at zero: reading the rows once here costs less than a tile of 128 keys
    that walks over all rows."""
    M_WARPS: tl.constexpr = BLOCK_M // 16
    N_WARPS: tl.constexpr = WARPS // M_WARPS
    blocks = padded_q // BLOCK_M
    runs = tl.cdiv(blocks, REPEAT)
    run = tl.program_id(0) % runs
    bh = (tl.program_id(0) // runs).to(tl.int64)
    b, h = bh // num_heads, bh % num_heads
    d = tl.arange(0, BLOCK_D)
    if FIRST > 0:
        dv = tl.arange(0, BLOCK_DV)
        j = tl.arange(0, FIRST)
        low = 0
        high = num_k
        if RANGE:
            low = tl.maximum(tl.load(kv_start + b), 0)
            high = tl.minimum(tl.load(kv_end + b), num_k)
        high = tl.minimum(high, low + first_tokens)
        key = low + j
        far = key[:, None].to(tl.int64)
        there = (key < num_k)[:, None]
        k = tl.load(k_ptr + b * stride_kb + h // group * stride_kh + far * stride_kn + d[None, :],
                    mask=there & (d[None, :] < D), other=0.0)  # fmt: skip
        v = tl.load(v_ptr + b * stride_vb + h // group * stride_vh + far * stride_vn + dv[None, :],
                    mask=there & (dv[None, :] < DV), other=0.0)  # fmt: skip
        dk = tl.zeros([FIRST, BLOCK_D], tl.float32)
        dv_acc = tl.zeros([FIRST, BLOCK_DV], tl.float32)
    for block in range(run * REPEAT, tl.minimum((run + 1) * REPEAT, blocks)):
        base = acc_ptr + (bh * padded_q + block * BLOCK_M) * BLOCK_D
        acc = tl.load(base + tl.arange(0, BLOCK_M * BLOCK_D))
        acc = tl.reshape(acc, (BLOCK_D // N_WARPS // 8, N_WARPS, M_WARPS, 8, 4, 2, 2))
        acc = tl.reshape(tl.permute(acc, (2, 5, 3, 1, 0, 4, 6)), (BLOCK_M, BLOCK_D))
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        if FIRST > 0:
            row_lse = tl.load(lse + bh * num_q + rows, mask=rows < num_q, other=float("inf"))
            row_delta = tl.load(delta + bh * num_q + rows, mask=rows < num_q, other=0.0)
            acc, dk, dv_acc = _first_keys(
                acc, dk, dv_acc, q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh, k, v,
                key, high, rows, row_lse, row_delta, stride_qm, stride_dom, scale, num_q, q_offset, window, D, DV,
                BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        out_rows = (b * num_q + rows) * num_heads + h
        keep = (rows[:, None] < num_q) & (d[None, :] < D)
        tl.store(dq_ptr + out_rows[:, None] * D + d[None, :], (acc * scale).to(dq_ptr.dtype.element_ty), mask=keep)
    if FIRST > 0:
        place = ((b * (num_heads // group) + h // group) * FIRST + j)[:, None]
        used = (key < high)[:, None]
        tl.atomic_add(dk_ptr + place * D + d[None, :], dk * scale, mask=used & (d[None, :] < D), sem="relaxed")
        tl.atomic_add(dv_ptr + place * DV + dv[None, :], dv_acc, mask=used & (dv[None, :] < DV), sem="relaxed")
