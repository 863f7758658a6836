"""Which tiles of queries the Hopper forward kernel works on, and which blocks of keys each of them visits, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_of(index, num_m, num_bh, section):
    """Tile number -> (query block, batch*head). The longest tiles of a section of heads come first; a section is as
    many heads as have K and V in the L2 cache together."""
    per_section = num_m * section
    first = (index // per_section) * section
    rest = index % per_section
    width = min(section, num_bh - first)
    return num_m - 1 - rest // width, first + rest % width


@gluon.jit
def key_range(start_m, b, h, q_offset, num_q, num_k, window, kv_start, kv_end, starts, stride_sb, stride_sh,
              BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
              RANGE: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Keys a tile of queries may see: the bounds [low, high) of the sequence, the blocks [first, last) to visit.

    With ROWS (rows per row block) these are entries of the list of blocks."""
    low = 0
    high = num_k
    if RANGE:
        low = max(gl.load(kv_start + b), 0)
        high = min(gl.load(kv_end + b), num_k)
    first = low
    last = high
    if CAUSAL:
        last = min(high, q_offset + min(start_m + BLOCK_M, num_q))
    if WINDOW:
        first = max(low, q_offset + start_m - window + 1)
    first = first // BLOCK_N
    last = (max(last, 0) + BLOCK_N - 1) // BLOCK_N
    if ROWS > 0:
        row_block = starts + b * stride_sb + h * stride_sh + start_m // ROWS
        first = gl.load(row_block)
        last = gl.load(row_block + 1)
    return low, high, first, max(first, last)


@gluon.jit
def start_of(place, index, BLOCK_N: gl.constexpr, ROWS: gl.constexpr):
    """The key at which a block begins: the block at ``place``, or the one that the list names there."""
    if ROWS > 0:
        return gl.load(index + place) * BLOCK_N
    else:
        return place * BLOCK_N


@gluon.jit
def looks_back(start_m, low, q_offset, num_q, window, BLOCK_M: gl.constexpr):
    """Whether the window of a tile's last row leaves out the sequence's first tokens."""
    return q_offset + min(start_m + BLOCK_M, num_q) - window > low
