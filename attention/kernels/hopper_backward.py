"""Backward attention for Hopper (compute capability 9.0), in Gluon: one pass over the tiles, five products per tile.

A program has BLOCK_N keys of one KV head and loops over the query blocks that see them, of every query head of the
group. A producer warp copies Q, dO, the log-sum-exp and delta to shared memory; two warpgroups keep dK and dV in
registers and work on transposed tiles (keys by queries), so that P and dS enter the next products from registers. Only
dS goes through shared memory, for dQ = dS K, which is added to a float32 buffer in the L2 cache. The order of these
additions varies, so dQ may differ in its last bits from run to run; ``backward.py`` has two deterministic kernels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from rehead.attention.kernels.masks import LOG2E


@gluon.jit
def row_range(start_n, b, q_offset, num_q, num_k, window, kv_start, kv_end, BLOCK_M: gl.constexpr,
              BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, RANGE: gl.constexpr):  # fmt: skip
    """The key bounds [low, high) and the blocks of query rows [first, last) that reach the keys from ``start_n`` on."""
    low = 0
    high = num_k
    if RANGE:
        low = max(gl.load(kv_start + b), 0)
        high = min(gl.load(kv_end + b), num_k)
    first = 0
    last = num_q
    if CAUSAL:
        first = max(start_n - q_offset, 0)
    if WINDOW:
        last = min(last, min(start_n + BLOCK_N, num_k) - 1 + window - q_offset)
    first = first // BLOCK_M
    last = (max(last, 0) + BLOCK_M - 1) // BLOCK_M
    if (start_n >= high) | (start_n + BLOCK_N <= low):
        last = first
    return low, high, first, max(first, last)


@gluon.jit
def _produce(q_desc, k_desc, v_desc, do_desc, lse, delta, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem,
             kv_full, q_full, do_full, empty, b, kv, first_head, heads, start_n, first, last, num_q, num_heads,
             BLOCK_M: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [b, kv, start_n, 0], kv_full, k_smem.index(0))
    tma.async_copy_global_to_shared(v_desc, [b, kv, start_n, 0], kv_full, v_smem.index(0))
    h = first_head
    block = first
    for i in range(heads * (last - first)):
        start_m = block * BLOCK_M
        stage = i % STAGES
        rows = start_m + gl.arange(0, BLOCK_M, ROWS)
        offsets = (b * num_heads + h).to(gl.int64) * num_q + rows
        lse_rows = gl.load(lse + offsets, mask=rows < num_q, other=float("inf"))
        delta_rows = gl.load(delta + offsets, mask=rows < num_q, other=0.0)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, h, start_m, 0], q_full.index(stage), q_smem.index(stage))
        mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, [b, h, start_m, 0], do_full.index(stage), do_smem.index(stage))
        lse_smem.index(stage).store(lse_rows)
        delta_smem.index(stage).store(delta_rows)
        mbarrier.arrive(q_full.index(stage), count=1)
        block += 1
        if block == last:
            block = first
            h += 1


@gluon.jit
def _probabilities(s, lse_rows, start_m, start_n, low, high, q_offset, window, scale_log2, BLOCK_M: gl.constexpr,
                   BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
                   LAYOUT: gl.constexpr):  # fmt: skip
    """exp2(s - lse) of a transposed tile [keys, rows], zero where the row must not see the key."""
    masked = (start_n < low) | (start_n + BLOCK_N > high)
    if CAUSAL:
        masked = masked | (start_n + BLOCK_N - 1 > start_m + q_offset)
    if WINDOW:
        masked = masked | (start_m + BLOCK_M - 1 + q_offset - start_n >= window)
    if masked:
        key = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
        row = start_m + q_offset + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
        keep = ((key >= low) & (key < high))[:, None]
        if CAUSAL:
            keep = keep & (key[:, None] <= row[None, :])
        if WINDOW:
            keep = keep & (key[:, None] > (row - window)[None, :])
        s = gl.where(keep, s, float("-inf"))
    return gl.exp2(s * scale_log2 - lse_rows[None, :])


@gluon.jit
def _unseen_zero(i):
    """Zero, but not known to the compiler.

    So it computes the addresses of buffers indexed by it inside the loop, with a few additions, instead of keeping (and
    spilling) dozens of registers across the loop.
    """
    return i >> 30


@gluon.jit
def _issue_scores(i, k_smem, q_smem, q_full, zero, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
                  STAGES: gl.constexpr):  # fmt: skip
    stage = i % STAGES
    mbarrier.wait(q_full.index(stage), (i // STAGES) & 1)
    q = q_smem.index(stage).reshape([BLOCK_M, D])
    k = k_smem.index(_unseen_zero(i)).reshape([BLOCK_N, D])
    return warpgroup_mma(k, q.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _issue_dp(i, v_smem, do_smem, do_full, zero, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DV: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    stage = i % STAGES
    mbarrier.wait(do_full.index(stage), (i // STAGES) & 1)
    do = do_smem.index(stage).reshape([BLOCK_M, DV])
    v = v_smem.index(_unseen_zero(i)).reshape([BLOCK_N, DV])
    return warpgroup_mma(v, do.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _add_dq(base, dq, D: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Adds a tile of dQ to its part of the buffer, in the registers' order, which :func:`finish_query` undoes.

    So a warp adds 512 contiguous bytes at a time; row by row, with 8 bytes per lane, the additions made the kernel take
    half as long again. From the slowest index: (columns / 8, warp, row % 8, column / 2 % 4, row / 8 % 2, column % 2).
    Four consecutive registers (two columns of rows r and r + 8) share one addition, at the address of the first.
    """
    WARPS: gl.constexpr = gl.num_warps()
    M_WARPS: gl.constexpr = BLOCK_M // 16
    WIDTH: gl.constexpr = D * M_WARPS // WARPS  # columns of a warp
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    warp = row // 16 + M_WARPS * (col // WIDTH)
    lane = (row % 8) * 4 + (col // 2) % 4
    offset = ((col % WIDTH // 8 * WARPS + warp) * 32 + lane) * 4
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f",
        [(base + offset).to(gl.int64, bitcast=True), dq],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _tile(i, s, dk, dv, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, q_full, do_full, empty, dq_base,
          start_m, start_n, low, high, q_offset, window, scale_log2, D: gl.constexpr, DV: gl.constexpr,
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
          WINDOW: gl.constexpr, S_LAYOUT: gl.constexpr, DK_LAYOUT: gl.constexpr, DV_LAYOUT: gl.constexpr,
          DQ_LAYOUT: gl.constexpr, MORE: gl.constexpr, FREE_P: gl.constexpr):  # fmt: skip
    """Process one block of query rows, whose raw scores are in ``s``.

    With MORE, the next block's scores start as soon as this block's registers are free. FREE_P waits for dV first, to
    free P's registers too, which head_dim 128 needs.
    """
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    zero_s = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    zero_dq = gl.zeros([BLOCK_M, D], gl.float32, DQ_LAYOUT)
    stage = i % STAGES
    q = q_smem.index(stage).reshape([BLOCK_M, D])
    do = do_smem.index(stage).reshape([BLOCK_M, DV])
    dp = _issue_dp(i, v_smem, do_smem, do_full, zero_s, BLOCK_M, BLOCK_N, DV, STAGES)
    p = _probabilities(s, lse_smem.index(stage).load(ROW), start_m, start_n, low, high, q_offset, window, scale_log2,
                       BLOCK_M, BLOCK_N, CAUSAL, WINDOW, S_LAYOUT)  # fmt: skip
    p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, DV_LAYOUT, 2))
    dv = warpgroup_mma(p16, do, dv, is_async=True)
    delta_rows = delta_smem.index(stage).load(ROW)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds16 = (p * (dp - delta_rows[None, :])).to(dtype)
    if FREE_P:
        dv = warpgroup_mma_wait(0, deps=[dv])
    if MORE:
        s = _issue_scores(i + 1, k_smem, q_smem, q_full, zero_s, BLOCK_M, BLOCK_N, D, STAGES)
    ds_block = ds_smem.index(_unseen_zero(i))
    ds_block.store(ds16)
    fence_async_shared()
    k = k_smem.index(_unseen_zero(i)).reshape([BLOCK_N, D])
    dq = warpgroup_mma(ds_block.permute([1, 0]), k, zero_dq, use_acc=False, is_async=True)
    dk = warpgroup_mma(gl.convert_layout(ds16, gl.DotOperandLayout(0, DK_LAYOUT, 2)), q, dk, is_async=True)
    if MORE:
        s, dv, dq = warpgroup_mma_wait(1, deps=[s, dv, dq])
    else:
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq])
    _add_dq(dq_base + start_m * D, dq, D, BLOCK_M, DQ_LAYOUT)  # while dK is computed
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(empty.index(stage), count=1)
    return s, dk, dv


@gluon.jit
def _consume(dk_desc, dv_desc, dk_part, dv_part, dq_acc, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem,
             kv_full, q_full, do_full, empty, b, kv, part, first_head, heads, start_n, first, last, low, high, scale,
             num_q, num_k, q_offset, window, num_heads, num_kv, padded_q, D: gl.constexpr, DV: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
             WINDOW: gl.constexpr, SPLIT: gl.constexpr, FREE_P: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    M_WARPS: gl.constexpr = BLOCK_M // 16
    N_WARPS: gl.constexpr = WARPS // M_WARPS
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [M_WARPS, N_WARPS], [16, D // N_WARPS, 16])
    dtype: gl.constexpr = k_smem.dtype
    scale_log2 = scale * LOG2E
    dk = gl.zeros([BLOCK_N, D], gl.float32, DK_LAYOUT)
    dv = gl.zeros([BLOCK_N, DV], gl.float32, DV_LAYOUT)
    mbarrier.wait(kv_full, 0)
    count = heads * (last - first)
    if count > 0:
        zero_s = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
        dq_base = dq_acc + (b * num_heads + first_head).to(gl.int64) * padded_q * D
        block = first
        s = _issue_scores(0, k_smem, q_smem, q_full, zero_s, BLOCK_M, BLOCK_N, D, STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        for i in range(count - 1):
            s, dk, dv = _tile(i, s, dk, dv, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, q_full,
                              do_full, empty, dq_base, block * BLOCK_M, start_n, low, high, q_offset, window,
                              scale_log2, D, DV, BLOCK_M, BLOCK_N, STAGES, CAUSAL, WINDOW, S_LAYOUT, DK_LAYOUT,
                              DV_LAYOUT, DQ_LAYOUT, True, FREE_P)  # fmt: skip
            block += 1
            if block == last:
                block = first
                dq_base += padded_q * D
        s, dk, dv = _tile(count - 1, s, dk, dv, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem, ds_smem, q_full,
                          do_full, empty, dq_base, block * BLOCK_M, start_n, low, high, q_offset, window, scale_log2, D,
                          DV, BLOCK_M, BLOCK_N, STAGES, CAUSAL, WINDOW, S_LAYOUT, DK_LAYOUT, DV_LAYOUT, DQ_LAYOUT,
                          False, FREE_P)  # fmt: skip

    dk = dk * scale
    if SPLIT:
        dk_rows = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, DK_LAYOUT))
        dv_rows = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, DV_LAYOUT))
        dk_cols = gl.arange(0, D, gl.SliceLayout(0, DK_LAYOUT))
        dv_cols = gl.arange(0, DV, gl.SliceLayout(0, DV_LAYOUT))
        dk_offsets = (part.to(gl.int64) * num_k + dk_rows) * num_kv + kv
        dv_offsets = (part.to(gl.int64) * num_k + dv_rows) * num_kv + kv
        gl.store(dk_part + dk_offsets[:, None] * D + dk_cols[None, :], dk, mask=(dk_rows < num_k)[:, None])
        gl.store(dv_part + dv_offsets[:, None] * DV + dv_cols[None, :], dv, mask=(dv_rows < num_k)[:, None])
    else:
        # K and V are no longer needed, so their buffers are reused for the gradients.
        k_smem.index(0).reshape([BLOCK_N, D]).store(dk.to(dtype))
        v_smem.index(0).reshape([BLOCK_N, DV]).store(dv.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_desc, [b, kv, start_n, 0], k_smem.index(0))
        tma.async_copy_shared_to_global(dv_desc, [b, kv, start_n, 0], v_smem.index(0))
        tma.store_wait(0)


@gluon.jit
def attention_backward(q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, dk_part, dv_part, dq_acc, lse, delta,
                       kv_start, kv_end, scale, num_q, num_k, q_offset, window, num_heads, num_kv, splits, padded_q,
                       num_n, D: gl.constexpr, DV: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                       STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, RANGE: gl.constexpr,
                       SPLIT: gl.constexpr, FREE_P: gl.constexpr):  # fmt: skip
    """Grid: key blocks (fastest, the longest causal ones first) by splits of the group by KV heads by batches.

    ``dq_acc`` [B, H, padded_q, D] float32 starts at zero and gets dQ / scale. With SPLIT, dk and dv of each part of the
    group go to ``dk_part``, ``dv_part`` [splits, B, Skv, K, D] float32, to be added up by the caller.
    """
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = k_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, DV], do_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], row_layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)  # the copy engine, and the producer for the rows' log-sum-exp and delta
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()

    index = gl.program_id(0)
    start_n = (index % num_n) * BLOCK_N
    split = (index // num_n) % splits
    bk = index // (num_n * splits)
    b = bk // num_kv
    kv = bk % num_kv
    heads = num_heads // num_kv // splits
    first_head = (kv * splits + split) * heads
    part = split * (gl.num_programs(0) // (num_n * splits * num_kv)) + b
    low, high, first, last = row_range(start_n, b, q_offset, num_q, num_k, window, kv_start, kv_end, BLOCK_M, BLOCK_N,
                                       CAUSAL, WINDOW, RANGE)  # fmt: skip
    # fmt: off
    gl.warp_specialize([
        (_consume, (dk_desc, dv_desc, dk_part, dv_part, dq_acc, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem,
                    ds_smem, kv_full, q_full, do_full, empty, b, kv, part, first_head, heads, start_n, first,
                    last, low, high, scale, num_q, num_k, q_offset, window, num_heads, num_kv, padded_q, D, DV, BLOCK_M,
                    BLOCK_N, STAGES, CAUSAL, WINDOW, SPLIT, FREE_P)),
        (_produce, (q_desc, k_desc, v_desc, do_desc, lse, delta, q_smem, k_smem, v_smem, do_smem, lse_smem, delta_smem,
                    kv_full, q_full, do_full, empty, b, kv, first_head, heads, start_n, first, last, num_q,
                    num_heads, BLOCK_M, STAGES)),
    ], [1], [24])
    # fmt: on
