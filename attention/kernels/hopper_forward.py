"""Forward attention for Hopper (compute capability 9.0), in Gluon: the fast path of
:func:`rehead.attention.kernels.attention`.

One persistent program runs per multiprocessor and takes its tiles from a counter in global memory (when tiles were
assigned beforehand, the unequal causal ones left some multiprocessors idle for a fifth of the time). A producer warp
takes them and keeps the bulk copy engine busy with blocks of K and V; two or three consumer warpgroups have 64 query
rows each. A consumer issues the next block's Q K^T before it turns the current scores into probabilities, so that the
tensor cores work during the exponentials. With TURNS the consumers also take turns at issuing, so that one's softmax
runs during the other's products (the schedule of FlashAttention-3, arXiv 2407.08608).

Handles causal masks, a sliding window with the first tokens beyond it, lists of key blocks, per-row key ranges, sinks
and grouped heads; all other calls run through the general kernels of ``forward.py``. Scores and the log-sum-exp for
backward are in base 2.
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

from rehead.attention.kernels.hopper_tiles import key_range, looks_back, start_of, tile_of
from rehead.attention.kernels.masks import LOG2E


@gluon.jit
def _draw(counter, LANES: gl.constexpr):
    """The counter's number, which goes up by one, in lane 0 of a warp and zero in the others; does not wait for it.

    ``gl.atomic_add`` waits, and hands its result to the warp by a branch and a word of shared memory. Where several
    processes take turns on a GPU, some programs read something else there and left a tile out.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.u32 $0, 0;"
        "@first atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }",
        "=r,l",
        [(counter + gl.full([32], 0, gl.int32, LANES)).to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _produce(q_desc, k_desc, v_desc, k_first_desc, v_first_desc, counter, tile_smem, q_smem, k_smem, v_smem,
             k_first_smem, v_first_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, first_full, first_empty,
             kv_start, kv_end, starts, index_ptr, stride_sb, stride_sh, num_q, num_k, q_offset, window, num_heads,
             group, num_m, num_bh, section, NUM_WG: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             CAUSAL: gl.constexpr, WINDOW: gl.constexpr, FIRST: gl.constexpr, RANGE: gl.constexpr,
             ROWS: gl.constexpr):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * NUM_WG
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile_count = 0
    block_count = 0
    first_count = 0
    index = gl.program_id(0)
    while index < num_m * num_bh:
        m_block, bh = tile_of(index, num_m, num_bh, section)
        b = bh // num_heads
        h = bh % num_heads
        start_m = m_block * BLOCK_M
        low, _, first, last = key_range(start_m, b, h, q_offset, num_q, num_k, window, kv_start, kv_end, starts,
                                        stride_sb, stride_sh, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGE,
                                        ROWS)  # fmt: skip
        q_stage = tile_count % 2
        mbarrier.wait(q_empty.index(q_stage), ((tile_count // 2) & 1) ^ 1)
        tile_smem.index(q_stage).store(gl.full([1], index, gl.int32, ONE))
        mbarrier.arrive(q_full.index(q_stage), count=1)
        mbarrier.expect(q_full.index(q_stage), NUM_WG * q_desc.block_type.nbytes)
        for wg in gl.static_range(NUM_WG):
            tma.async_copy_global_to_shared(q_desc, [b, h, start_m + wg * 64, 0], q_full.index(q_stage),
                                            q_smem.index(q_stage * NUM_WG + wg))  # fmt: skip
        tile_count += 1
        drawn = _draw(counter, ONE)
        for step in range(last - first):
            start_n = start_of(last - 1 - step, index_ptr, BLOCK_N, ROWS)
            stage = block_count % STAGES
            phase = ((block_count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [b, h // group, start_n, 0], k_full.index(stage), k_smem.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [b, h // group, start_n, 0], v_full.index(stage), v_smem.index(stage)
            )
            block_count += 1
        if FIRST > 0:  # noqa: SIM102
            if looks_back(start_m, low, q_offset, num_q, window, BLOCK_M):
                mbarrier.wait(first_empty, (first_count & 1) ^ 1)
                mbarrier.expect(first_full, k_first_desc.block_type.nbytes + v_first_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_first_desc, [b, h // group, low, 0], first_full, k_first_smem.index(0)
                )
                tma.async_copy_global_to_shared(
                    v_first_desc, [b, h // group, low, 0], first_full, v_first_smem.index(0)
                )
                first_count += 1
        index = gl.num_programs(0) + gl.max(drawn, 0)
    # A tile number past the end, without a Q, tells the consumers to stop.
    q_stage = tile_count % 2
    mbarrier.wait(q_empty.index(q_stage), ((tile_count // 2) & 1) ^ 1)
    tile_smem.index(q_stage).store(gl.full([1], index, gl.int32, ONE))
    mbarrier.arrive(q_full.index(q_stage), count=2)


@gluon.jit
def _next_tile(tile_count, tile_smem, q_full):
    """Waits for a tile's number and its Q."""
    stage = tile_count % 2
    mbarrier.wait(q_full.index(stage), (tile_count // 2) & 1)
    return gl.sum(tile_smem.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _mask(scores, start_n, low, high, q_offset, row, window, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr,
          WINDOW: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Scores with -inf wherever a query row (absolute position ``row``) must not see the key."""
    key = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    top = row * 0 + high
    if CAUSAL:
        top = gl.minimum(top, row + 1)
    bottom = row * 0 + low
    if WINDOW:
        bottom = gl.maximum(bottom, row - window + 1)
    keep = (key[None, :] < top[:, None]) & (key[None, :] >= bottom[:, None])
    return gl.where(keep, scores, float("-inf"))


@gluon.jit
def _consume(WG: gl.constexpr, o_desc, tile_smem, q_smem, k_smem, v_smem, k_first_smem, v_first_smem, q_full, q_empty,
             k_full, k_empty, v_full, v_empty, first_full, first_empty, turn, lse, sinks, kv_start, kv_end, starts,
             index_ptr, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window, first_tokens, num_heads, num_m,
             num_bh, section, D: gl.constexpr, DV: gl.constexpr, NUM_WG: gl.constexpr, BLOCK_N: gl.constexpr,
             STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, FIRST: gl.constexpr, RANGE: gl.constexpr,
             SINKS: gl.constexpr, ROWS: gl.constexpr, TURNS: gl.constexpr):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * NUM_WG
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = k_smem.dtype
    scale_log2 = scale * LOG2E
    # The consumer before this one hands over its turn; consumer 0 has the first one.
    NEXT: gl.constexpr = (WG + 1) % NUM_WG
    TURN_START: gl.constexpr = 1 if WG == 0 else 0
    no_scores = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)

    tile_count = 0
    block_count = 0
    first_count = 0
    turn_count = 0
    index = _next_tile(tile_count, tile_smem, q_full)
    while index < num_m * num_bh:
        m_block, bh = tile_of(index, num_m, num_bh, section)
        b = bh // num_heads
        start_m = m_block * BLOCK_M
        low, high, first, last = key_range(start_m, b, bh % num_heads, q_offset, num_q, num_k, window, kv_start, kv_end,
                                           starts, stride_sb, stride_sh, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, RANGE,
                                           ROWS)  # fmt: skip
        start_row = start_m + WG * 64
        row = q_offset + start_row + gl.arange(0, 64, S_ROWS)
        # Blocks that lie inside these bounds need no mask.
        clear_high = high
        clear_low = low
        if CAUSAL:
            clear_high = min(clear_high, q_offset + start_row + 1)
        if WINDOW:
            clear_low = max(clear_low, q_offset + start_row + 64 - window)

        q_stage = tile_count % 2
        q = q_smem.index(q_stage * NUM_WG + WG)
        tile_count += 1

        m_i = gl.full([64], -1.0e30, gl.float32, S_ROWS)
        l_i = gl.zeros([64], gl.float32, S_ROWS)
        acc = gl.zeros([64, DV], gl.float32, O_LAYOUT)
        if last > first:
            stage = block_count % STAGES
            phase = (block_count // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            start_n = start_of(last - 1, index_ptr, BLOCK_N, ROWS)
            k_block = k_smem.index(stage).reshape([BLOCK_N, D])
            s = warpgroup_mma(q.reshape([64, D]), k_block.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if (start_n + BLOCK_N > clear_high) | (start_n < clear_low):
                s = _mask(s, start_n, low, high, q_offset, row, window, BLOCK_N, CAUSAL, WINDOW, S_LAYOUT)
            m_i = gl.maximum(m_i, gl.max(s, 1))
            p = gl.exp2(s * scale_log2 - (m_i * scale_log2)[:, None])
            l_i = gl.sum(p, 1)
            p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)

            for step in range(1, last - first):
                v_stage = stage
                v_phase = phase
                block_count += 1
                stage = block_count % STAGES
                phase = (block_count // STAGES) & 1
                start_n = start_of(last - 1 - step, index_ptr, BLOCK_N, ROWS)
                mbarrier.wait(k_full.index(stage), phase)
                if TURNS:
                    mbarrier.wait(turn.index(WG), (turn_count & 1) ^ TURN_START)
                k_block = k_smem.index(stage).reshape([BLOCK_N, D])
                s = warpgroup_mma(q.reshape([64, D]), k_block.permute([1, 0]), no_scores, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(v_stage), v_phase)
                acc = warpgroup_mma(p16, v_smem.index(v_stage).reshape([BLOCK_N, DV]), acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(turn.index(NEXT), count=1)
                    turn_count += 1
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(stage), count=1)
                if (start_n + BLOCK_N > clear_high) | (start_n < clear_low):
                    s = _mask(s, start_n, low, high, q_offset, row, window, BLOCK_N, CAUSAL, WINDOW, S_LAYOUT)
                m_new = gl.maximum(m_i, gl.max(s, 1))
                alpha = gl.exp2((m_i - m_new) * scale_log2)
                p = gl.exp2(s * scale_log2 - (m_new * scale_log2)[:, None])
                l_i = l_i * alpha + gl.sum(p, 1)
                m_i = m_new
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
                p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)

            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(p16, v_smem.index(stage).reshape([BLOCK_N, DV]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            block_count += 1

        # The first tokens, for rows whose window leaves them out, as a short block of their own.
        if FIRST > 0:  # noqa: SIM102
            if looks_back(start_m, low, q_offset, num_q, window, BLOCK_M):
                F_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FIRST, 16])
                mbarrier.wait(first_full, first_count & 1)
                first_count += 1
                no_first = gl.zeros([64, FIRST], gl.float32, F_LAYOUT)
                k_block = k_first_smem.index(0).reshape([FIRST, D])
                s = warpgroup_mma(q.reshape([64, D]), k_block.permute([1, 0]), no_first, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                key = low + gl.arange(0, FIRST, gl.SliceLayout(0, F_LAYOUT))
                beyond = q_offset + start_row + gl.arange(0, 64, gl.SliceLayout(1, F_LAYOUT)) - window
                keep = (key[None, :] <= beyond[:, None]) & (key < min(high, low + first_tokens))[None, :]
                s = gl.where(keep, s, float("-inf"))
                m_new = gl.maximum(m_i, gl.convert_layout(gl.max(s, 1), S_ROWS))
                alpha = gl.exp2((m_i - m_new) * scale_log2)
                m_first = gl.convert_layout(m_new, gl.SliceLayout(1, F_LAYOUT))
                p = gl.exp2(s * scale_log2 - (m_first * scale_log2)[:, None])
                l_i = l_i * alpha + gl.convert_layout(gl.sum(p, 1), S_ROWS)
                m_i = m_new
                acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
                p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
                acc = warpgroup_mma(p16, v_first_smem.index(0).reshape([FIRST, DV]), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(first_empty, count=1)

        m_log2 = m_i * scale_log2
        if SINKS:
            sink = gl.load(sinks + bh % num_heads).to(gl.float32) * LOG2E
            m_new = gl.maximum(m_log2, sink)
            alpha = gl.exp2(m_log2 - m_new)
            l_i = l_i * alpha + gl.exp2(sink - m_new)
            m_log2 = m_new
            acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
        empty = l_i == 0.0
        inverse = 1.0 / gl.where(empty, 1.0, l_i)
        # A row without keys gets +inf: backward's exp2(s - lse) is then 0.
        lse_row = gl.where(empty, float("inf"), m_log2 + gl.log2(l_i))
        rows = start_row + gl.arange(0, 64, S_ROWS)
        gl.store(lse + bh.to(gl.int64) * num_q + rows, lse_row, mask=rows < num_q)
        out = (acc * gl.convert_layout(inverse, O_ROWS)[:, None]).to(dtype)
        # Q of this tile is no longer needed, so its buffer is reused for the output.
        o_smem = q._reinterpret(dtype, [1, 1, 64, DV], o_desc.layout)
        o_smem.reshape([64, DV]).store(out)
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [b, bh % num_heads, start_row, 0], o_smem)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(q_stage), count=1)
        index = _next_tile(tile_count, tile_smem, q_full)


@gluon.jit
def attention_forward(q_desc, k_desc, v_desc, k_first_desc, v_first_desc, o_desc, counter, lse, sinks, kv_start, kv_end,
                      starts, index, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window, first_tokens,
                      num_heads, group, num_m, num_bh, section, D: gl.constexpr, DV: gl.constexpr, NUM_WG: gl.constexpr,
                      BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
                      FIRST: gl.constexpr, RANGE: gl.constexpr, SINKS: gl.constexpr, ROWS: gl.constexpr,
                      TURNS: gl.constexpr):  # fmt: skip
    """Descriptors: 4-D ``[B, H, S, D]`` views; blocks of 64 query rows and BLOCK_N keys. ``lse`` [B, H, Sq] float32;
    ``counter`` one int32, zero at the start. FIRST is the height of the short block that has the first tokens, 0
    without them; ROWS the rows per row block of the lists, a multiple of the tile, 0 without lists."""
    gl.static_assert(D >= DV, "the output borrows Q's buffer")
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    tile_smem = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * NUM_WG, 1, 1, 64, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, DV], v_desc.layout)
    k_first_smem = k_smem
    v_first_smem = v_smem
    if FIRST > 0:
        k_first_smem = gl.allocate_shared_memory(k_desc.dtype, [1, 1, 1, FIRST, D], k_first_desc.layout)
        v_first_smem = gl.allocate_shared_memory(v_desc.dtype, [1, 1, 1, FIRST, DV], v_first_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    first_full = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    first_empty = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    mbarrier.init(first_full, count=1)
    mbarrier.init(first_empty, count=NUM_WG)
    turn = gl.allocate_shared_memory(gl.int64, [NUM_WG, 1], barrier_layout)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=2)  # the copy engine, and the producer for the tile's number
        mbarrier.init(q_empty.index(i), count=NUM_WG)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=NUM_WG)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=NUM_WG)
    for i in gl.static_range(NUM_WG):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()

    # fmt: off
    if NUM_WG == 2:
        gl.warp_specialize([
            (_consume, (gl.constexpr(0), o_desc, tile_smem, q_smem, k_smem, v_smem, k_first_smem, v_first_smem, q_full,
                        q_empty, k_full, k_empty, v_full, v_empty, first_full, first_empty, turn, lse, sinks, kv_start,
                        kv_end, starts, index, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window,
                        first_tokens, num_heads, num_m, num_bh, section, D, DV, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, SINKS, ROWS, TURNS)),
            (_consume, (gl.constexpr(1), o_desc, tile_smem, q_smem, k_smem, v_smem, k_first_smem, v_first_smem, q_full,
                        q_empty, k_full, k_empty, v_full, v_empty, first_full, first_empty, turn, lse, sinks, kv_start,
                        kv_end, starts, index, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window,
                        first_tokens, num_heads, num_m, num_bh, section, D, DV, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, SINKS, ROWS, TURNS)),
            (_produce, (q_desc, k_desc, v_desc, k_first_desc, v_first_desc, counter, tile_smem, q_smem, k_smem, v_smem,
                        k_first_smem, v_first_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, first_full,
                        first_empty, kv_start, kv_end, starts, index, stride_sb, stride_sh, num_q, num_k, q_offset,
                        window, num_heads, group, num_m, num_bh, section, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, ROWS)),
        ], [4, 1], [240, 24])
    else:
        gl.warp_specialize([
            (_consume, (gl.constexpr(0), o_desc, tile_smem, q_smem, k_smem, v_smem, k_first_smem, v_first_smem, q_full,
                        q_empty, k_full, k_empty, v_full, v_empty, first_full, first_empty, turn, lse, sinks, kv_start,
                        kv_end, starts, index, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window,
                        first_tokens, num_heads, num_m, num_bh, section, D, DV, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, SINKS, ROWS, TURNS)),
            (_consume, (gl.constexpr(1), o_desc, tile_smem, q_smem, k_smem, v_smem, k_first_smem, v_first_smem, q_full,
                        q_empty, k_full, k_empty, v_full, v_empty, first_full, first_empty, turn, lse, sinks, kv_start,
                        kv_end, starts, index, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window,
                        first_tokens, num_heads, num_m, num_bh, section, D, DV, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, SINKS, ROWS, TURNS)),
            (_consume, (gl.constexpr(2), o_desc, tile_smem, q_smem, k_smem, v_smem, k_first_smem, v_first_smem, q_full,
                        q_empty, k_full, k_empty, v_full, v_empty, first_full, first_empty, turn, lse, sinks, kv_start,
                        kv_end, starts, index, stride_sb, stride_sh, scale, num_q, num_k, q_offset, window,
                        first_tokens, num_heads, num_m, num_bh, section, D, DV, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, SINKS, ROWS, TURNS)),
            (_produce, (q_desc, k_desc, v_desc, k_first_desc, v_first_desc, counter, tile_smem, q_smem, k_smem, v_smem,
                        k_first_smem, v_first_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, first_full,
                        first_empty, kv_start, kv_end, starts, index, stride_sb, stride_sh, num_q, num_k, q_offset,
                        window, num_heads, group, num_m, num_bh, section, NUM_WG, BLOCK_N, STAGES, CAUSAL, WINDOW,
                        FIRST, RANGE, ROWS)),
        ], [4, 4, 1], [160, 160, 24])
    # fmt: on
