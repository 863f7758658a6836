"""Launches the general Triton kernels: picks tile sizes, fills in unused arguments, allocates the results."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rehead.attention.blocks import KeyBlocks
from rehead.attention.call import AttentionCall
from rehead.attention.kernels import backward as bwd
from rehead.attention.kernels import forward as fwd
from rehead.attention.kernels.bounds import mask_bounds, segment_bounds


@dataclass(frozen=True)
class LaunchShape:
    """Rows of queries, rows of keys, warps and pipeline stages of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def interpreting() -> bool:
    """True when Triton runs its kernels in its Python interpreter (TRITON_INTERPRET=1), as the CPU tests do."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may use; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99_000)


def tile_for(kernel: str, width: int, itemsize: int, shared: int) -> LaunchShape:
    """The tile of ``kernel`` ("forward", "grad_key_value", "grad_query") for heads of ``width`` (a power of two).

    Args:
        width: the larger of the padded head_dim of keys and values.
        itemsize: bytes per element.
        shared: shared memory a block may use, in bytes (228 KB on Hopper, 164 KB on A100, 100 KB on most others).
    """
    if shared == 0:  # the interpreter: small tiles, so that tiny inputs still cross block borders
        return LaunchShape(16, 16, 4, 1)
    roomy = shared > 150_000
    if itemsize == 4:
        if width > 128 and shared < 200_000:
            return LaunchShape(16, 16, 4, 1)
        side = 64 if width <= 64 else 32
        return LaunchShape(side, 32, 4, 2 if roomy and width <= 128 else 1)
    if kernel == "forward":
        if width <= 64:
            return LaunchShape(128, 64, 4, 3)
        if width <= 128:
            return LaunchShape(128, 64, 8, 3 if roomy else 2)
        return LaunchShape(64, 64, 4, 2) if roomy else LaunchShape(64, 32, 4, 1)
    if width <= 64:
        return LaunchShape(64, 128, 4 if kernel == "grad_query" else 8, 2) if roomy else LaunchShape(64, 64, 4, 2)
    if width <= 128:
        if not roomy:
            return LaunchShape(32, 64, 4, 1) if kernel == "grad_key_value" else LaunchShape(64, 32, 4, 1)
        return LaunchShape(64, 128, 8, 2) if kernel == "grad_key_value" else LaunchShape(128, 64, 8, 2)
    if kernel == "grad_query":
        return LaunchShape(64, 32, 8, 1)
    return LaunchShape(32, 64, 8, 1) if roomy else LaunchShape(32, 32, 4, 1)


@dataclass(frozen=True)
class Prepared:
    """A call as kernel arguments; unused pointers are placeholders that no kernel reads."""

    pointers: dict
    flags: dict
    numbers: dict
    bias_strides: tuple[int, int, int]


def _width(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def float_bias(bias: Tensor) -> Tensor:
    """A bias in the kernels' form: added to the scores and contiguous along the keys. False in a bool bias is -inf."""
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device).masked_fill_(~bias, float("-inf"))
    return bias.contiguous() if bias.stride(3) != 1 and bias.shape[3] > 1 else bias


def prepare(call: AttentionCall) -> Prepared:
    """Arguments common to the three kernels, without segment bounds, which differ between them."""
    query, key, value = call.query, call.key, call.value
    batch, _, num_q, dim = query.shape
    num_k, dim_v = key.shape[2], value.shape[3]
    unused = query
    start, end, mask = call.kv_start, call.ends, call.key_mask
    if mask is not None:
        first, last = mask_bounds(mask)
        start = first if start is None else torch.maximum(first, start.to(torch.int32))
        end = last if end is None else torch.minimum(last, end.to(torch.int32))
    if start is not None or end is not None:
        start = torch.zeros(batch, dtype=torch.int32, device=query.device) if start is None else start
        end = torch.full((batch,), num_k, dtype=torch.int32, device=query.device) if end is None else end
    bias = call.bias
    bias_strides = (0, 0, 0)
    if bias is not None:
        bias = float_bias(bias).expand(batch, query.shape[1], num_q, num_k)
        bias_strides = (bias.stride(0), bias.stride(1), bias.stride(2))

    def integers(tensor: Tensor | None) -> Tensor:
        return unused if tensor is None else tensor.to(torch.int32).contiguous()

    pointers = {
        "kv_start": integers(start),
        "kv_end": integers(end),
        "key_mask": unused if mask is None else mask.contiguous().view(torch.uint8),
        "q_segments": integers(call.q_segments),
        "kv_segments": integers(call.kv_segments),
        "alibi": unused if call.alibi_slopes is None else call.alibi_slopes.float().contiguous(),
        "bias_ptr": unused if bias is None else bias,
    }
    flags = {
        "D": dim,
        "DV": dim_v,
        "BLOCK_D": _width(dim),
        "BLOCK_DV": _width(dim_v),
        "CAUSAL": call.causal,
        "WINDOW": call.window is not None,
        "FIRST": call.window is not None and call.sink_tokens > 0,
        "CHUNK": call.chunk is not None,
        "SOFTCAP": call.softcap is not None,
        "RANGE": start is not None,
        "KEY_MASK": mask is not None,
        "SEGMENTS": call.q_segments is not None,
        "BLOCKS": call.blocks is not None,
        "ROWS": 1 if call.blocks is None else call.blocks.rows,
        "KEYS": 1 if call.blocks is None else call.blocks.keys,
        "ALIBI": call.alibi_slopes is not None,
        "BIAS": bias is not None,
        # Three tf32 products reach float32 accuracy on tensor cores; plain tf32 would not.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 and not interpreting() else "ieee",
    }
    numbers = {
        "scale": call.factor,
        "softcap": call.softcap or 1.0,
        "num_q": num_q,
        "num_k": num_k,
        "q_offset": call.offset,
        "window": call.window or 0,
        "first_tokens": call.sink_tokens,
        "chunk": call.chunk or 1,
    }
    return Prepared(pointers, flags, numbers, bias_strides)


def _segment_pointers(rows: Tensor | None, columns: Tensor | None, unused: Tensor) -> dict:
    if rows is None or columns is None:
        return {"seg_begin": unused, "seg_end": unused}
    begin, end = segment_bounds(rows, columns)
    return {"seg_begin": begin.contiguous(), "seg_end": end.contiguous()}


def block_lists(blocks: KeyBlocks | None, unused: Tensor) -> tuple[dict, dict]:
    """The pointers of lists of blocks, and the steps from one batch row or head to the next: 0 where they share one."""
    if blocks is None:
        return {"starts": unused, "index": unused}, {"stride_sb": 0, "stride_sh": 0}
    starts = blocks.starts.int()
    starts = starts if starts.stride(-1) == 1 else starts.contiguous()
    batch, heads, _ = starts.shape
    steps = {"stride_sb": starts.stride(0) if batch > 1 else 0, "stride_sh": starts.stride(1) if heads > 1 else 0}
    return {"starts": starts, "index": blocks.index.int().contiguous()}, steps


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _options(tile: LaunchShape, blocks: KeyBlocks | None) -> dict:
    return {
        "BLOCK_M": tile.block_m if blocks is None else min(tile.block_m, blocks.rows),
        "BLOCK_N": tile.block_n if blocks is None else min(tile.block_n, blocks.keys),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq] float32."""
    query, key, value = call.query, call.key, call.value
    sinks = None if call.sinks is None else call.sinks.contiguous()
    batch, heads, num_q, _ = query.shape
    out = torch.empty((batch, num_q, heads, value.shape[3]), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, num_q), dtype=torch.float32, device=query.device)
    ready = prepare(call)
    width = max(ready.flags["BLOCK_D"], ready.flags["BLOCK_DV"])
    tile = tile_for("forward", width, query.element_size(), shared_memory(query.device))
    pointers = ready.pointers | _segment_pointers(call.q_segments, call.kv_segments, query)
    lists, steps = block_lists(call.blocks, query)
    shape = _options(tile, call.blocks)
    fwd.attention_forward[(triton.cdiv(num_q, shape["BLOCK_M"]) * batch * heads,)](
        query, key, value, out, lse, pointers["kv_start"], pointers["kv_end"], pointers["key_mask"],
        pointers["q_segments"], pointers["kv_segments"], pointers["seg_begin"], pointers["seg_end"], lists["starts"],
        lists["index"], pointers["alibi"], query if sinks is None else sinks, pointers["bias_ptr"], *_strides(query),
        *_strides(key), *_strides(value), *ready.bias_strides, **steps, **ready.numbers, num_heads=heads,
        group=heads // key.shape[1], **ready.flags, SINKS=sinks is not None, **shape,
    )  # fmt: skip
    return out, lse


def row_delta(out: Tensor, grad: Tensor, clear: Tensor | None = None) -> Tensor:
    """sum(out * grad) over the head dimension: [B, H, Sq] float32. ``grad`` is [B, Sq, H, Dv].

    ``clear`` [B, H, rows, width] float32, with rows >= Sq, is filled with zeros in the same pass over memory.
    """
    batch, num_q, heads, dim_v = out.shape
    delta = torch.empty((batch, heads, num_q), dtype=torch.float32, device=out.device)
    rows = num_q if clear is None else clear.shape[2]
    block_m, block_h = (4, 2) if interpreting() else (16, min(4, triton.next_power_of_2(heads)))
    bwd.row_delta[(triton.cdiv(rows, block_m), triton.cdiv(heads, block_h), batch)](
        out, grad, delta, delta if clear is None else clear, grad.stride(0), grad.stride(2), grad.stride(1), num_q,
        rows, heads, DV=dim_v, BLOCK_DV=_width(dim_v), BLOCK_M=block_m, BLOCK_H=block_h,
        WIDTH=1 if clear is None else clear.shape[3], ZERO=clear is not None,
    )  # fmt: skip
    return delta


def key_splits(programs: int, group: int, wanted: int) -> int:
    """Number of parts to split a group of query heads into, so that ``wanted`` programs run; divides ``group``."""
    splits = 1
    while programs * splits < wanted and splits < group:
        splits = next(n for n in range(splits + 1, group + 1) if group % n == 0)
    return splits


def backward(grad: Tensor, lse: Tensor, delta: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtypes of query, key and value; ``grad`` [B, Sq, H, Dv]. Deterministic."""
    query, key, value = call.query, call.key, call.value
    batch, heads, num_q, dim = query.shape
    kv_heads, num_k, dim_v = key.shape[1], key.shape[2], value.shape[3]
    group = heads // kv_heads
    ready = prepare(call)
    width = max(ready.flags["BLOCK_D"], ready.flags["BLOCK_DV"])
    shared = shared_memory(query.device)
    grad_strides = (grad.stride(0), grad.stride(2), grad.stride(1))

    tile = tile_for("grad_key_value", width, query.element_size(), shared)
    shape = _options(tile, call.blocks)
    blocks = triton.cdiv(num_k, shape["BLOCK_N"])
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if shared else 1
    splits = key_splits(blocks * batch * kv_heads, group, processors)
    kind = query.dtype if splits == 1 else torch.float32
    dk = torch.empty((splits, batch, num_k, kv_heads, dim), dtype=kind, device=query.device)
    dv = torch.empty((splits, batch, num_k, kv_heads, dim_v), dtype=kind, device=query.device)
    common = dict(**ready.numbers, **ready.flags, num_heads=heads)
    pointers = ready.pointers | _segment_pointers(call.kv_segments, call.q_segments, query)
    lists, steps = block_lists(None if call.blocks is None else call.blocks.transposed(num_k), query)
    bwd.grad_key_value[(blocks * batch * kv_heads, splits)](
        query, key, value, grad, lse, delta, dk, dv, pointers["kv_start"], pointers["kv_end"], pointers["key_mask"],
        pointers["q_segments"], pointers["kv_segments"], pointers["seg_begin"], pointers["seg_end"], lists["starts"],
        lists["index"], pointers["alibi"], pointers["bias_ptr"], *_strides(query), *_strides(key), *_strides(value),
        *grad_strides, *ready.bias_strides, **steps, **common, num_kv=kv_heads, splits=splits, **shape,
    )  # fmt: skip

    tile = tile_for("grad_query", width, query.element_size(), shared)
    dq = torch.empty((batch, num_q, heads, dim), dtype=query.dtype, device=query.device)
    pointers = ready.pointers | _segment_pointers(call.q_segments, call.kv_segments, query)
    lists, steps = block_lists(call.blocks, query)
    shape = _options(tile, call.blocks)
    bwd.grad_query[(triton.cdiv(num_q, shape["BLOCK_M"]) * batch * heads,)](
        query, key, value, grad, lse, delta, dq, pointers["kv_start"], pointers["kv_end"], pointers["key_mask"],
        pointers["q_segments"], pointers["kv_segments"], pointers["seg_begin"], pointers["seg_end"], lists["starts"],
        lists["index"], pointers["alibi"], pointers["bias_ptr"], *_strides(query), *_strides(key), *_strides(value),
        *grad_strides, *ready.bias_strides, **steps, **common, group=group, **shape,
    )  # fmt: skip
    dk = dk[0] if splits == 1 else dk.sum(0).to(query.dtype)
    dv = dv[0] if splits == 1 else dv.sum(0).to(query.dtype)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
