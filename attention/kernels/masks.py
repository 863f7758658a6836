"""Score and mask arithmetic shared by the general Triton kernels, written for either orientation of a tile.

A query row has the absolute position ``q_offset + row``, a key its column number. Positions come in already expanded
(``[M, 1]`` and ``[1, N]``, or the other way round for transposed tiles), so that forward and backward share every rule.
Scores are in base 2: they carry a factor log2(e), so that ``exp2`` is the only exponential.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh without a library call, to a few float32 ulp: a series near zero, where 1 - 2 / (e^2x + 1) cancels."""
    t = x * x
    series = x * (1.0 + t * (-1.0 / 3 + t * (2.0 / 15 + t * (-17.0 / 315 + t * (62.0 / 2835)))))
    rest = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(t < 0.04, series, rest)


@triton.jit
def scores(raw, row, key, scale, softcap, slope, bias, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr):
    """Base-2 scores from raw dot products, and tanh of the capped score (its derivative is all backward needs)."""
    capped = raw
    if SOFTCAP:
        capped = tanh(raw * (scale / softcap))
        s = capped * (softcap * LOG2E)
    else:
        s = raw * (scale * LOG2E)
    if ALIBI:
        s += (slope * LOG2E) * (key - row).to(tl.float32)
    if BIAS:
        s += bias * LOG2E
    return s, capped


@triton.jit
def visible(row, key, low, high, window, first_tokens, chunk, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
            FIRST: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The positional rules: key range, causal, window and first tokens beyond it, chunk. ``row`` is absolute."""
    keep = (key >= low) & (key < high)
    if CAUSAL:
        keep = keep & (key <= row)
    if WINDOW:
        if FIRST:
            keep = keep & ((row - key < window) | (key < low + first_tokens))
        else:
            keep = keep & (row - key < window)
    if CHUNK:
        keep = keep & (row // chunk == key // chunk)
    return keep


@triton.jit
def key_bounds(first_row, last_row, low, high, window, chunk, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    """For the rows first_row..last_row (absolute, inclusive): keys any of them sees, and keys all of them see.

    Returns ``(begin, end, clear_begin, clear_end)``, half-open ranges; the clear one may be empty or inverted.
    """
    begin = low
    end = high
    clear_begin = low
    clear_end = high
    if CAUSAL:
        end = tl.minimum(end, last_row + 1)
        clear_end = tl.minimum(clear_end, first_row + 1)
    if WINDOW:
        begin = tl.maximum(begin, first_row - window + 1)
        clear_begin = tl.maximum(clear_begin, last_row - window + 1)
    if CHUNK:
        begin = tl.maximum(begin, (first_row // chunk) * chunk)
        end = tl.minimum(end, (last_row // chunk + 1) * chunk)
        clear_begin = tl.maximum(clear_begin, (last_row // chunk) * chunk)
        clear_end = tl.minimum(clear_end, (first_row // chunk + 1) * chunk)
    return begin, end, clear_begin, clear_end


@triton.jit
def row_bounds(first_key, last_key, num_q, q_offset, window, chunk, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    """The transpose of :func:`key_bounds`: query rows (relative) that any, and all, of first_key..last_key reach."""
    begin = 0
    end = num_q
    clear_begin = 0
    clear_end = num_q
    if CAUSAL:
        begin = tl.maximum(begin, first_key - q_offset)
        clear_begin = tl.maximum(clear_begin, last_key - q_offset)
    if WINDOW:
        end = tl.minimum(end, last_key + window - q_offset)
        clear_end = tl.minimum(clear_end, first_key + window - q_offset)
    if CHUNK:
        begin = tl.maximum(begin, (first_key // chunk) * chunk - q_offset)
        end = tl.minimum(end, (last_key // chunk + 1) * chunk - q_offset)
        clear_begin = tl.maximum(clear_begin, (last_key // chunk) * chunk - q_offset)
        clear_end = tl.minimum(clear_end, (first_key // chunk + 1) * chunk - q_offset)
    return begin, end, clear_begin, clear_end


@triton.jit
def split_range(begin, end, clear_begin, clear_end, BLOCK: tl.constexpr):
    """Cut [begin, end) into whole blocks: masked up to ``a``, clear from ``a`` to ``b``, masked from ``b`` to the end.

    Returns multiples of BLOCK ``(start, a, b, stop)`` with start <= a <= b <= stop.
    """
    start = (tl.maximum(begin, 0) // BLOCK) * BLOCK
    stop = tl.maximum(((tl.maximum(end, 0) + BLOCK - 1) // BLOCK) * BLOCK, start)
    a = ((tl.maximum(clear_begin, 0) + BLOCK - 1) // BLOCK) * BLOCK
    b = (tl.maximum(clear_end, 0) // BLOCK) * BLOCK
    a = tl.minimum(tl.maximum(a, start), stop)
    b = tl.minimum(tl.maximum(b, a), stop)
    return start, a, b, stop


@triton.jit
def listed_range(starts, index, row_block, clear_begin, clear_end, KEYS: tl.constexpr):
    """:func:`split_range` for the blocks of a list, on an axis on which listed blocks lie one behind the other.

    Position p of that axis is place ``p % KEYS`` of block ``index[p // KEYS]``. Blocks that lie in [clear_begin,
    clear_end) form one run, since lists ascend.
    """
    first = tl.load(starts + row_block)
    last = tl.load(starts + row_block + 1)
    before = 0
    through = 0
    for at in range(first, last, 64):
        entry = at + tl.arange(0, 64)
        block = tl.load(index + entry, mask=entry < last, other=0)
        before += tl.sum(((entry < last) & (block * KEYS < clear_begin)).to(tl.int32), 0)
        through += tl.sum(((entry < last) & (block * KEYS + KEYS <= clear_end)).to(tl.int32), 0)
    return first * KEYS, (first + before) * KEYS, (first + tl.maximum(through, before)) * KEYS, last * KEYS


@triton.jit
def place(at, index, KEYS: tl.constexpr, BLOCKS: tl.constexpr):
    """The key (or row) at which the block at ``at`` begins, on the axis of :func:`listed_range` with BLOCKS."""
    if BLOCKS:
        return tl.load(index + at // KEYS) * KEYS + at % KEYS
    else:
        return at
