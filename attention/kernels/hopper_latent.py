"""Decode over latents for Hopper (compute capability 9.0), in Gluon: one tile of keys in shared memory serves twice.

A program has 64 query rows (heads of one sequence) and a part of its keys. With 128 heads, arithmetic and reading take
about as long as each other, so what counts is that the tensor cores never wait: a producer warp keeps the copy engine
busy, the first warpgroup computes the scores and their softmax and the left half of the output, the second the right
half, from probabilities that it is handed in shared memory (the division of work of FlashMLA). The first issues the
next tile's scores before the products of the present one, so that these run during the softmax.

The sums of 64 rows of 512 fill half of a multiprocessor's registers, two tiles of 64 keys and the queries its shared
memory: neither more rows nor more tiles fit.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rehead.attention.kernels.masks import LOG2E

ROWS = gl.constexpr(64)
KEYS = gl.constexpr(64)
HALF = gl.constexpr(256)
TAIL = gl.constexpr(64)


@gluon.jit
def _part(b, split, splits, start_ptr, end_ptr, offset_ptr, stride_start, stride_end, stride_offset, num_k, kv_end,
          q_offset, START: gl.constexpr, END: gl.constexpr, OFFSET: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """(first key visible, one past the last, first key of the part, number of its tiles)."""
    low = 0
    high = min(kv_end, num_k)
    if START:
        low = max(gl.load(start_ptr + b * stride_start).to(gl.int32), 0)
    if END:
        high = min(gl.load(end_ptr + b * stride_end).to(gl.int32), high)
    if CAUSAL:
        offset = q_offset
        if OFFSET:
            offset = gl.load(offset_ptr + b * stride_offset).to(gl.int32)
        high = min(high, offset + 1)
    begin = low // KEYS * KEYS
    tiles = (max(high - begin, 0) + KEYS - 1) // KEYS
    each = (tiles + splits - 1) // splits
    first = min(split * each, tiles)
    return low, high, begin + first * KEYS, min(each, tiles - first)


@gluon.jit
def _produce(q_desc, q_tail_desc, c_desc, t_desc, q_smem, q_tail_smem, c_smem, t_smem, q_full, full, empty, b, row,
             start, count):  # fmt: skip
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes + q_tail_desc.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q_desc, [b, row, half * HALF], q_full, q_smem.index(half))
    tma.async_copy_global_to_shared(q_tail_desc, [b, row, 0], q_full, q_tail_smem)
    for i in range(count):
        stage = i % 2
        phase = ((i // 2) & 1) ^ 1
        n = start + i * KEYS
        for half in gl.static_range(2):
            place = stage * 3 + half
            mbarrier.wait(empty.index(place), phase)
            mbarrier.expect(full.index(place), c_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(c_desc, [b, n, half * HALF], full.index(place),
                                            c_smem.index(stage * 2 + half))  # fmt: skip
        place = stage * 3 + 2
        mbarrier.wait(empty.index(place), phase)
        mbarrier.expect(full.index(place), t_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(t_desc, [b, n, 0], full.index(place), t_smem.index(stage))


@gluon.jit
def _scores(i, q_smem, q_tail_smem, c_smem, t_smem, full, LAYOUT: gl.constexpr):
    """Issue the products of a tile's scores, as its parts arrive."""
    stage = i % 2
    phase = (i // 2) & 1
    s = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    for half in gl.static_range(2):
        mbarrier.wait(full.index(stage * 3 + half), phase)
        keys = c_smem.index(stage * 2 + half).reshape([KEYS, HALF]).permute([1, 0])
        queries = q_smem.index(half).reshape([ROWS, HALF])
        s = warpgroup_mma(queries, keys, s, use_acc=half > 0, is_async=True)
    mbarrier.wait(full.index(stage * 3 + 2), phase)
    keys = t_smem.index(stage).reshape([KEYS, TAIL]).permute([1, 0])
    return warpgroup_mma(q_tail_smem.reshape([ROWS, TAIL]), keys, s, is_async=True)


@gluon.jit
def _store(acc, out_ptr, acc_ptr, rows, out_rows, inside, first, DV: gl.constexpr, DIRECT: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    """A half of the normalised output, from column ``first`` on."""
    column = first + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    here = inside[:, None] & (column < DV)[None, :]
    if DIRECT:
        gl.store(out_ptr + out_rows[:, None] * DV + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=here)
    else:
        gl.store(acc_ptr + rows[:, None] * (2 * HALF) + column[None, :], acc, mask=inside[:, None])


@gluon.jit
def _lead(q_smem, q_tail_smem, c_smem, t_smem, p_smem, factor_smem, q_full, full, empty, p_full, p_empty, out_ptr,
          acc_ptr, lse_ptr, scale, low, high, start, count, first_row, part_row, out_row, total, DV: gl.constexpr,
          DIRECT: gl.constexpr):  # fmt: skip
    """Scores, softmax, and the left half of the output."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = c_smem.dtype
    factor = scale * LOG2E
    m_i = gl.full([ROWS], -1.0e30, gl.float32, S_ROWS)
    l_i = gl.zeros([ROWS], gl.float32, S_ROWS)
    acc = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
    mbarrier.wait(q_full, 0)
    if count > 0:
        s = _scores(0, q_smem, q_tail_smem, c_smem, t_smem, full, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(empty.index(2), count=1)
        key = start + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(((key >= low) & (key < high))[None, :], s, float("-inf"))
        m_i = gl.maximum(m_i, gl.max(s, 1) * factor)
        p = gl.exp2(s * factor - m_i[:, None])
        l_i = gl.sum(p, 1)
        p16 = p.to(dtype)
        p_smem.store(p16)
        factor_smem.store(gl.full([ROWS], 1.0, gl.float32, S_ROWS))
        fence_async_shared()
        mbarrier.arrive(p_full, count=1)
        for i in range(1, count):
            before = (i - 1) % 2
            s = _scores(i, q_smem, q_tail_smem, c_smem, t_smem, full, S_LAYOUT)
            acc = warpgroup_mma(p_smem, c_smem.index(before * 2).reshape([KEYS, HALF]), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(empty.index((i % 2) * 3 + 2), count=1)
            n = start + i * KEYS
            if n + KEYS > high:
                key = n + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
                s = gl.where((key < high)[None, :], s, float("-inf"))
            m_new = gl.maximum(m_i, gl.max(s, 1) * factor)
            alpha = gl.exp2(m_i - m_new)
            p = gl.exp2(s * factor - m_new[:, None])
            l_i = l_i * alpha + gl.sum(p, 1)
            m_i = m_new
            p16 = p.to(dtype)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(before * 3), count=1)
            mbarrier.wait(p_empty, (i - 1) & 1)
            p_smem.store(p16)
            factor_smem.store(alpha)
            fence_async_shared()
            mbarrier.arrive(p_full, count=1)
            acc = acc * gl.convert_layout(alpha, O_ROWS)[:, None]
        last = (count - 1) % 2
        acc = warpgroup_mma(p_smem, c_smem.index(last * 2).reshape([KEYS, HALF]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.wait(p_empty, (count - 1) & 1)
    none = l_i == 0.0
    inverse = 1.0 / gl.where(none, 1.0, l_i)
    factor_smem.store(inverse)
    fence_async_shared()
    mbarrier.arrive(p_full, count=1)
    row = gl.arange(0, ROWS, S_ROWS)
    if not DIRECT:
        lse = gl.where(none, float("-inf"), m_i + gl.log2(gl.where(none, 1.0, l_i)))
        gl.store(lse_ptr + part_row + row, lse, mask=first_row + row < total)
    row = gl.arange(0, ROWS, O_ROWS)
    acc = acc * gl.convert_layout(inverse, O_ROWS)[:, None]
    _store(acc, out_ptr, acc_ptr, part_row + row, out_row + row, first_row + row < total, 0, DV, DIRECT, O_LAYOUT)


@gluon.jit
def _follow(c_smem, p_smem, factor_smem, empty, p_full, p_empty, out_ptr, acc_ptr, count, first_row, part_row, out_row,
            total, DV: gl.constexpr, DIRECT: gl.constexpr):  # fmt: skip
    """The right half of the output."""
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    acc = gl.zeros([ROWS, HALF], gl.float32, O_LAYOUT)
    for i in range(count):
        stage = i % 2
        mbarrier.wait(p_full, i & 1)
        acc = acc * factor_smem.load(O_ROWS)[:, None]
        # The keys are there: the scores of this tile have been computed from them.
        acc = warpgroup_mma(p_smem, c_smem.index(stage * 2 + 1).reshape([KEYS, HALF]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(p_empty, count=1)
        mbarrier.arrive(empty.index(stage * 3 + 1), count=1)
    mbarrier.wait(p_full, count & 1)
    acc = acc * factor_smem.load(O_ROWS)[:, None]
    row = gl.arange(0, ROWS, O_ROWS)
    _store(acc, out_ptr, acc_ptr, part_row + row, out_row + row, first_row + row < total, HALF, DV, DIRECT, O_LAYOUT)


@gluon.jit(do_not_specialize=["num_k", "kv_end", "q_offset", "splits"])
def partial_latents(q_desc, q_tail_desc, c_desc, t_desc, acc_ptr, lse_ptr, out_ptr, start_ptr, end_ptr, offset_ptr,
                    stride_start, stride_end, stride_offset, scale, num_k, kv_end, q_offset, total, splits,
                    DV: gl.constexpr, CAUSAL: gl.constexpr, START: gl.constexpr, END: gl.constexpr,
                    OFFSET: gl.constexpr, DIRECT: gl.constexpr):  # fmt: skip
    """Grid (row tiles, splits, B); writes what ``decode_kernels.partial_attention`` writes, for one query position.

    Descriptors: queries ``[B, H, 512]`` and ``[B, H, 64]``, keys ``[B, Skv, 512]`` and ``[B, Skv, 64]``, narrower ones
    filled up with zeros; blocks of 64 rows and 256 or 64 columns.
    """
    tile = gl.program_id(0)
    split = gl.program_id(1)
    b = gl.program_id(2)
    first_row = tile * ROWS
    out_row = b.to(gl.int64) * total + first_row
    part_row = (b.to(gl.int64) * splits + split) * total + first_row
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, KEYS], c_desc.dtype)
    q_smem = gl.allocate_shared_memory(c_desc.dtype, [2, 1, ROWS, HALF], q_desc.layout)
    q_tail_smem = gl.allocate_shared_memory(c_desc.dtype, [1, ROWS, TAIL], q_tail_desc.layout)
    c_smem = gl.allocate_shared_memory(c_desc.dtype, [4, 1, KEYS, HALF], c_desc.layout)
    t_smem = gl.allocate_shared_memory(c_desc.dtype, [2, 1, KEYS, TAIL], t_desc.layout)
    p_smem = gl.allocate_shared_memory(c_desc.dtype, [ROWS, KEYS], p_layout)
    factor_smem = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    p_full = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    p_empty = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    full = gl.allocate_shared_memory(gl.int64, [6, 1], barrier_layout)
    empty = gl.allocate_shared_memory(gl.int64, [6, 1], barrier_layout)
    mbarrier.init(q_full, count=1)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=1)
    for i in gl.static_range(6):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    # The merge may be launched at once; nothing is read here before the kernels in front have ended.
    gdc_launch_dependents()
    gdc_wait()
    low, high, start, count = _part(b, split, splits, start_ptr, end_ptr, offset_ptr, stride_start, stride_end,
                                    stride_offset, num_k, kv_end, q_offset, START, END, OFFSET, CAUSAL)  # fmt: skip
    gl.warp_specialize([
        (_lead, (q_smem, q_tail_smem, c_smem, t_smem, p_smem, factor_smem, q_full, full, empty, p_full, p_empty,
                 out_ptr, acc_ptr, lse_ptr, scale, low, high, start, count, first_row, part_row, out_row, total, DV,
                 DIRECT)),
        (_follow, (c_smem, p_smem, factor_smem, empty, p_full, p_empty, out_ptr, acc_ptr, count, first_row, part_row,
                   out_row, total, DV, DIRECT)),
        (_produce, (q_desc, q_tail_desc, c_desc, t_desc, q_smem, q_tail_smem, c_smem, t_smem, q_full, full, empty, b,
                    first_row, start, count)),
    ], [4, 1], [216, 24])  # fmt: skip
