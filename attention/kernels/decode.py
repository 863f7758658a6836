"""Decode attention: a handful of query positions against a long cache, at the speed the cache can be read."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rehead.attention.kernels.api import unavailable
from rehead.attention.kernels.rules import DecodeRules, Rules, check, refusal
from rehead.errors import UnsupportedError, UsageError

MAX_QUERIES = 16


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    q_offset: Tensor | int = 0,
    kv_end: Tensor | int | None = None,
    kv_start: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of 1 to 16 new positions over a cache; no gradient. Rules mean what they mean in ``attention``.

    ``q_offset`` and ``kv_end`` may be integer tensors on the device, of shape ``[B]`` or with one element: the kernels
    read them there, and the grid depends on shapes alone, so a captured CUDA graph (or a StaticCache whose fill grows)
    replays correctly and skips what lies past the end. The cache is split evenly over its visible range
    (flash-decoding) and the parts are merged by log-sum-exp.

    Args:
        query: ``[B, H, Sq, D]``, Sq <= 16, bfloat16, float16 or float32.
        key: ``[B, K, Skv, D]``, the whole cache (a StaticCache's full length); any strides, last one 1.
        value: ``[B, K, Skv, Dv]``.
        scale: factor on q k^T.
        q_offset: position of the first query row.
        kv_end: visible keys end before it; None for all of them.
        kv_start: int ``[B]``, visible keys start there (left padding).
        key_mask: bool ``[B, Skv]``.
        window, chunk, softcap, alibi_slopes, sinks, bias: as in ``attention``.
        causal: j <= q_offset + i.

    Returns:
        ``[B, Sq, H, Dv]``, contiguous. Rows that see no key are zero.

    Raises:
        UsageError: shapes or rules that contradict each other, or more than 16 query positions.
        UnsupportedError: a dtype, head_dim or device the kernels do not take.
    """
    rules = DecodeRules(
        float(scale), *_number_or_tensor(q_offset), *_number_or_tensor(kv_end), kv_start, key_mask, window, chunk,
        softcap, alibi_slopes, sinks, bias, causal,
    )  # fmt: skip
    _check(query, key, value, rules)
    if torch.compiler.is_compiling():
        from rehead.attention.kernels import ops

        return ops.decode(query, key, value, *rules.values())
    return run_decode(query, key, value, rules)


def _number_or_tensor(item: Tensor | int | None) -> tuple[Any, Tensor | None]:
    return (0, item) if isinstance(item, Tensor) else (item, None)


def _check(query: Tensor, key: Tensor, value: Tensor, rules: DecodeRules) -> None:
    shared = Rules(
        rules.scale, True, 0, rules.window, rules.chunk, rules.kv_start, None, rules.key_mask, None, None,
        rules.softcap, rules.alibi_slopes, rules.bias,
    )  # fmt: skip
    check(query, key, value, shared, rules.sinks)
    if query.shape[2] > MAX_QUERIES:
        raise UsageError(f"decode takes at most {MAX_QUERIES} query positions, not {query.shape[2]}; call attention")
    for name, item in (("q_offset", rules.q_offset_tensor), ("kv_end", rules.kv_end_tensor)):
        if item is not None and (item.numel() not in (1, query.shape[0]) or item.is_floating_point()):
            raise UsageError(f"{name} must be an int or an integer tensor with 1 or {query.shape[0]} elements")
    reason = unavailable(query.device) or refusal(query, key, value, shared, rules.sinks)
    if reason is not None:
        raise UnsupportedError(f"no decode kernel for this call: {reason}; use attn_implementation='sdpa' or 'eager'")


@functools.lru_cache(maxsize=4096)
def split_count(pairs: int, length: int, slots: int, block: int) -> int:
    """Into how many parts to cut each of ``pairs`` (batch x KV head) caches of ``length`` keys.

    The fewest parts that keep ``slots`` program slots about evenly busy, given that a part is a whole number of blocks
    of ``block`` keys, at least two.
    """

    def evenness(parts: int) -> float:
        blocks = -(-length // (parts * block))
        busy = -(-length // (blocks * block))
        return pairs * length / (-(-pairs * busy // slots) * slots * blocks * block)

    most = max(1, min(length // (2 * block), 4 * slots))
    return max(range(1, most + 1), key=lambda parts: (min(evenness(parts), 0.93), -parts))


def run_decode(query: Tensor, key: Tensor, value: Tensor, rules: DecodeRules) -> Tensor:
    """Launch the kernels of ``decode_kernels.py``; shapes and rules as :func:`decode`, unchecked."""
    import triton

    from rehead.attention.kernels import decode_kernels
    from rehead.attention.kernels.general import float_bias, interpreting

    batch, heads, num_q, dim = query.shape
    kv_heads, num_k, dim_v = key.shape[1], key.shape[2], value.shape[3]
    out = torch.empty((batch, num_q, heads, dim_v), dtype=query.dtype, device=query.device)
    if 0 in query.shape or 0 in key.shape:
        return out.zero_()
    group = heads // kv_heads
    total = num_q * group
    block_d, block_dv = (max(16, triton.next_power_of_2(item)) for item in (dim, dim_v))
    early = _is_hopper(query.device)
    shape = launch_shape(query.device, query.element_size(), max(block_d, block_dv), total)
    row_tiles = triton.cdiv(total, shape.rows)
    length = num_k if num_k < 1024 else triton.cdiv(num_k, 256) * 256  # a growing cache asks anew every 256 keys only
    splits = split_count(batch * kv_heads * row_tiles, length, shape.slots, shape.block_n)
    parts = (batch * kv_heads, splits, total)
    acc = out if splits == 1 else torch.empty((*parts, block_dv), dtype=torch.float32, device=query.device)
    lse = out if splits == 1 else torch.empty(parts, dtype=torch.float32, device=query.device)
    start, start_step = _device_number(rules.kv_start, query)
    end, end_step = _device_number(rules.kv_end_tensor, query)
    offset, offset_step = _device_number(rules.q_offset_tensor, query)
    mask = key_mask = rules.key_mask
    if key_mask is not None:
        mask = (key_mask if key_mask.stride(1) == 1 else key_mask.contiguous()).view(torch.uint8)
    bias = None if rules.bias is None else float_bias(rules.bias).expand(batch, heads, num_q, num_k)
    unused = query  # stands in for pointers that no kernel reads
    alibi, sinks = (unused if item is None else item.contiguous() for item in (rules.alibi_slopes, rules.sinks))
    # The maximum of scaled scores is the scaled maximum only under a positive scale.
    plain = rules.scale > 0 and rules.softcap is None and rules.alibi_slopes is None and bias is None
    scan = 16 if interpreting() else max(256, min(4096, triton.next_power_of_2(triton.cdiv(length, splits))))
    launch: dict[str, Any] = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(query):
        decode_kernels.partial_attention[(splits, batch * kv_heads, row_tiles)](
            query, key, value, acc, lse, out, start, end, unused if mask is None else mask, offset, alibi, sinks,
            unused if bias is None else bias, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], start_step,
            end_step, 0 if mask is None else mask.stride(0), offset_step, *((0, 0, 0) if bias is None else
            bias.stride()[:3]), rules.scale, rules.softcap or 1.0, num_q, num_k,
            num_k if rules.kv_end is None or rules.kv_end_tensor is not None else rules.kv_end, rules.q_offset,
            rules.window or 0, rules.chunk or 1, kv_heads, splits,
            GROUP=group, D=dim, DV=dim_v, BLOCK_D=block_d, BLOCK_DV=block_dv, ROWS=shape.rows, BLOCK_N=shape.block_n,
            SCAN=scan, CAUSAL=rules.causal, WINDOW=rules.window is not None, CHUNK=rules.chunk is not None,
            SOFTCAP=rules.softcap is not None, START=rules.kv_start is not None, END=rules.kv_end_tensor is not None,
            MASK=mask is not None, OFFSET=rules.q_offset_tensor is not None, ALIBI=rules.alibi_slopes is not None,
            SINKS=rules.sinks is not None, BIAS=bias is not None, DIRECT=splits == 1, EARLY=early, AHEAD=shape.ahead,
            SINGLE=num_q == 1,
            PLAIN=plain, PRECISION="tf32x3" if query.dtype == torch.float32 and not interpreting() else "ieee",
            # A tile of biases in every stage would not fit beside those of K and V.
            num_warps=shape.warps, num_stages=shape.stages if bias is None else min(2, shape.stages), **launch,
        )  # fmt: skip
        if splits > 1:
            columns, wide = merge_shape(batch * kv_heads * total, splits, block_dv)
            decode_kernels.merge_parts[(batch * kv_heads, total, block_dv // columns)](
                acc, lse, out, sinks, num_q, kv_heads, splits, GROUP=group, DV=dim_v, BLOCK_DV=block_dv,
                COLUMNS=columns, PARTS=wide, SINKS=rules.sinks is not None, EARLY=early, ALONE=shape.alone,
                num_warps=max(1, min(4, wide * columns // 512)), **launch,
            )  # fmt: skip
    return out


def _device_number(item: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """A pointer to per-batch integers and the step between them (0 when one serves all)."""
    if item is None:
        return unused, 0
    return item, 0 if item.numel() == 1 else item.reshape(-1).stride(0)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


class LaunchShape(NamedTuple):
    """How the first kernel is cut.

    Attributes:
        rows: query rows a tile.
        block_n: keys a block.
        warps, stages: of a program, and of its pipeline.
        slots: programs that the whole GPU is to run at a time.
        ahead: keys that a waiting program prefetches. It pays where calls follow each other; after the write of a
            step's token, which is what a model does, reading the lengths twice costs more.
        alone: one program fills a multiprocessor.
    """

    rows: int
    block_n: int
    warps: int
    stages: int
    slots: int
    ahead: int = 0
    alone: bool = False


@functools.lru_cache(maxsize=256)
def launch_shape(device: torch.device, itemsize: int, width: int, total: int) -> LaunchShape:
    """The shape for ``total`` rows of ``width`` (padded head_dim) elements of ``itemsize`` bytes.

    On Hopper one program to a multiprocessor at a time halves what the merge has to read; from 17 rows it takes less
    than half of the shared memory, so that the next call's programs come up beside it. Hopper's warpgroup products take
    64 rows and keep each row inside one warp, so that the softmax needs no exchange between warps: worth padding to,
    except from 16 rows, which the older instructions take as they are.
    """
    import triton

    from rehead.attention.kernels.general import interpreting, shared_memory

    most = 64 if itemsize == 2 or interpreting() else 16  # three-product float32 needs the room
    rows = min(most, max(16, triton.next_power_of_2(total)))
    if interpreting():
        return LaunchShape(rows, 16, 4, 1, 12)
    roomy = shared_memory(device) > 150_000
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    slots = 2 * processors
    if _is_hopper(device) and itemsize == 2:
        rows = 64 if rows > 16 else rows
        if width <= 128 and rows > 16:
            return LaunchShape(rows, 64, 4, 3, processors, 0, True)
        if width <= 128:
            return LaunchShape(rows, 128, 8, 3, processors, 256, True)
    if width * itemsize > 512:
        return LaunchShape(rows, 16, 4, 2, slots)
    if width * itemsize > 256:
        return LaunchShape(rows, 32, 4, 3 if roomy else 2, slots)
    return LaunchShape(rows, 64, 4, 3 if roomy else 2, slots)


def merge_shape(rows: int, splits: int, width: int) -> tuple[int, int]:
    """Columns and parts that a program of the merge takes at a time, for ``rows`` rows of ``width`` (a power of two).

    Whole rows where there are many of them; where there are few, pieces down to a 128-byte line keep a GPU busy.
    """
    columns = width
    while columns > 32 and rows * (width // columns) < 132:
        columns //= 2
    return columns, min(256, 1 << (splits - 1).bit_length())
