"""Launches the decode kernels: a few query positions against a long cache, at the speed of reading the cache."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rehead.attention.call import AttentionCall
from rehead.attention.kernels.device import device_number, is_hopper

MAX_QUERIES = 16


@functools.lru_cache(maxsize=4096)
def split_count(pairs: int, length: int, slots: int, block: int) -> int:
    """Number of parts to split each of ``pairs`` (batch x KV head) caches of ``length`` keys into.

    The fewest parts that keep ``slots`` program slots about evenly busy, given that a part is a whole number of blocks
    of ``block`` keys, at least two.
    """

    def evenness(parts: int) -> float:
        blocks = -(-length // (parts * block))
        busy = -(-length // (blocks * block))
        return pairs * length / (-(-pairs * busy // slots) * slots * blocks * block)

    most = max(1, min(length // (2 * block), 4 * slots))
    return max(range(1, most + 1), key=lambda parts: (min(evenness(parts), 0.93), -parts))


def run_decode(call: AttentionCall) -> Tensor:
    """Launch the kernels of ``decode_kernels.py``; shapes and rules as :func:`decode`, unchecked."""
    import triton

    from rehead.attention.kernels import decode_kernels, hopper
    from rehead.attention.kernels.general import float_bias, interpreting

    query, key, value, scale = call.query, call.key, call.value, call.factor
    latent, halves = call.key_tail is not None, hopper.takes_latents(call)
    if call.key_tail is not None:  # the kernel takes the values as the first columns of the keys
        key, value = call.key_tail, call.key
    end_tensor, offset_tensor = (x if isinstance(x, Tensor) else None for x in (call.kv_end, call.q_offset))
    batch, heads, num_q, _ = query.shape
    kv_heads, num_k, dim, dim_v = *key.shape[1:], value.shape[3]
    out = torch.empty((batch, num_q, heads, dim_v), dtype=query.dtype, device=query.device)
    if 0 in query.shape or 0 in key.shape:
        return out.zero_()
    group = heads // kv_heads
    total = num_q * group
    block_d, block_dv = (max(16, triton.next_power_of_2(item)) for item in (dim, dim_v))
    early = is_hopper(query.device)
    shapes = latent_shape if latent else launch_shape
    shape = shapes(query.device, query.element_size(), max(block_d, block_dv), total)
    if halves:
        shape = shape._replace(rows=hopper.LATENT_ROWS, block_n=hopper.LATENT_KEYS)
    row_tiles = triton.cdiv(total, shape.rows)
    # Rounded up, so that a growing cache changes the split only every 256 keys.
    length = num_k if num_k < 1024 else triton.cdiv(num_k, 256) * 256
    splits = split_count(batch * kv_heads * row_tiles, length, shape.slots, shape.block_n)
    parts = (batch * kv_heads, splits, total)
    acc = out if splits == 1 else torch.empty((*parts, block_dv), dtype=torch.float32, device=query.device)
    lse = out if splits == 1 else torch.empty(parts, dtype=torch.float32, device=query.device)
    start, start_step = device_number(call.kv_start, query)
    end, end_step = device_number(end_tensor, query)
    offset, offset_step = device_number(offset_tensor, query)
    mask = key_mask = call.key_mask
    if key_mask is not None:
        mask = (key_mask if key_mask.stride(1) == 1 else key_mask.contiguous()).view(torch.uint8)
    bias = None if call.bias is None else float_bias(call.bias).expand(batch, heads, num_q, num_k)
    unused = query  # placeholder for pointers that no kernel reads
    alibi, sinks = (unused if item is None else item.contiguous() for item in (call.alibi_slopes, call.sinks))
    # The maximum of scaled scores is the scaled maximum only under a positive scale.
    plain = scale > 0 and call.softcap is None and call.alibi_slopes is None and bias is None
    scan = 16 if interpreting() else max(256, min(4096, triton.next_power_of_2(triton.cdiv(length, splits))))
    launch: dict[str, Any] = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(query):
        if halves:
            hopper.partial_latents(call, acc, lse, out, splits)
        else:
            decode_kernels.partial_attention[(splits, batch * kv_heads, row_tiles)](
                query, key, value, acc, lse, out, start, end, unused if mask is None else mask, offset, alibi, sinks,
                unused if bias is None else bias, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
                start_step, end_step, 0 if mask is None else mask.stride(0), offset_step, *((0, 0, 0) if bias is None
                else bias.stride()[:3]), scale, call.softcap or 1.0, num_q, num_k,
                call.kv_end if isinstance(call.kv_end, int) else num_k,
                0 if offset_tensor is not None else call.q_offset, call.window or 0, call.chunk or 1, kv_heads, splits,
                GROUP=group, D=dim, DV=dim_v, BLOCK_D=block_d, BLOCK_DV=block_dv, ROWS=shape.rows,
                BLOCK_N=shape.block_n, SCAN=scan, CAUSAL=call.causal, WINDOW=call.window is not None,
                CHUNK=call.chunk is not None, SOFTCAP=call.softcap is not None, START=call.kv_start is not None,
                END=end_tensor is not None, MASK=mask is not None, OFFSET=offset_tensor is not None,
                ALIBI=call.alibi_slopes is not None, SINKS=call.sinks is not None, BIAS=bias is not None,
                DIRECT=splits == 1, EARLY=early, AHEAD=shape.ahead,
                SINGLE=num_q == 1, PLAIN=plain, TAIL=latent,
                PRECISION="tf32x3" if query.dtype == torch.float32 and not interpreting() else "ieee",
                # A tile of biases in every stage would not fit beside those of K and V.
                num_warps=shape.warps, num_stages=shape.stages if bias is None else min(2, shape.stages), **launch,
            )  # fmt: skip
        if splits > 1:
            columns, wide = merge_shape(batch * kv_heads * total, splits, block_dv)
            decode_kernels.merge_parts[(batch * kv_heads, total, block_dv // columns)](
                acc, lse, out, sinks, num_q, kv_heads, splits, GROUP=group, DV=dim_v, BLOCK_DV=block_dv,
                COLUMNS=columns, PARTS=wide, SINKS=call.sinks is not None, EARLY=early, ALONE=shape.alone,
                num_warps=max(1, min(4, wide * columns // 512)), **launch,
            )  # fmt: skip
    return out


class LaunchShape(NamedTuple):
    """How the first kernel's work is split.

    Attributes:
        rows: query rows per tile.
        block_n: keys per block.
        warps, stages: warps per program, and stages of its pipeline.
        slots: programs to run at a time on the whole GPU.
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

    On Hopper one program per multiprocessor at a time halves what the merge has to read. From 17 rows on it takes less
    than half of the shared memory, so that the next call's programs can start beside it. Hopper's warpgroup products
    need 64 rows and keep each row inside one warp, so the softmax needs no exchange between warps. That is worth
    padding, except from 16 rows, which the older instructions take without padding.
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
    if is_hopper(device) and itemsize == 2:
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


@functools.lru_cache(maxsize=256)
def latent_shape(device: torch.device, itemsize: int, width: int, total: int) -> LaunchShape:
    """As :func:`launch_shape` where one tile, ``width`` wide, is both keys and values.

    The sums of 64 rows of 512 take half of a multiprocessor's registers, so no more rows go together.
    """
    from rehead.attention.kernels.general import interpreting, shared_memory

    if interpreting():
        return launch_shape(device, itemsize, width, total)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    room = shared_memory(device)
    rows = 16
    if total > 16 and itemsize == 2 and room > 150_000:
        rows = 64 if is_hopper(device) else 32
    block_n = 16 if itemsize == 4 or room < 150_000 else 32 if rows > 16 else 64
    return LaunchShape(rows, block_n, 8 if rows > 16 else 4, 2, processors, 0, True)


def merge_shape(rows: int, splits: int, width: int) -> tuple[int, int]:
    """(columns, parts) per program of the merge, for ``rows`` rows of ``width`` (a power of two).

    Whole rows if there are many; if there are few, smaller pieces (down to 128 bytes) keep the GPU busy.
    """
    columns = width
    while columns > 32 and rows * (width // columns) < 132:
        columns //= 2
    return columns, min(256, 1 << (splits - 1).bit_length())
