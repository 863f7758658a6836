"""Launches the Hopper kernels: which calls they take, tensor descriptors, tile shapes, work buffers."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton import language as tl

from rehead.attention.call import AttentionCall
from rehead.attention.kernels.device import device_number, is_hopper
from rehead.attention.kernels.general import block_lists, interpreting, key_splits, row_delta

# Gluon is Triton's experimental layer and changes between releases; the kernels are tested on these.
GLUON_RELEASES = ("3.6",)
READY = ".".join(triton.__version__.split(".")[:2]) in GLUON_RELEASES
if READY:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from rehead.attention.kernels import hopper_backward, hopper_finish, hopper_forward, hopper_latent

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Heads whose K and V fit in this many bytes are worked on together, so that they stay in the 50 MB L2 cache.
L2_SECTION = 24 * 2**20


# Per padded head_dim: consumer warpgroups (64 query rows each), keys per block, pipeline stages, taking turns.
FORWARD = {
    64: {"NUM_WG": 3, "BLOCK_N": 128, "STAGES": 3, "TURNS": True},
    128: {"NUM_WG": 2, "BLOCK_N": 128, "STAGES": 2, "TURNS": False},
}
# The same for a window or lists of blocks, which waste less with tiles of 128 rows.
NARROW = {
    64: {"NUM_WG": 2, "BLOCK_N": 128, "STAGES": 4, "TURNS": False},
    128: FORWARD[128],
}
LISTED = 128
"""Rows and keys per block of the lists that the Hopper kernel takes; more rows will do."""
NARROW_WINDOW = 2048
"""Windows below this take the narrow tiles."""
MOST_FIRST = 64
"""Most first tokens beyond a window that the Hopper kernel takes."""
FIRST_BLOCKS = 8
"""Query blocks over which a program adds up the gradients of the first tokens."""
# Query rows and keys per tile, pipeline stages, whether P's registers are needed for the next tile's scores.
BACKWARD = {
    64: {"BLOCK_M": 64, "BLOCK_N": 128, "STAGES": 2, "FREE_P": False},
    128: {"BLOCK_M": 64, "BLOCK_N": 128, "STAGES": 2, "FREE_P": True},
}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _describable(tensor: Tensor) -> bool:
    """Whether the copy engine can read a tensor: aligned, with non-zero strides that are multiples of 16 bytes."""
    step = 16 // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3]) if size > 1]
    return tensor.data_ptr() % 16 == 0 and tensor.shape[3] % 8 == 0 and all(s > 0 and s % step == 0 for s in strides)


def _block(dim: int) -> int:
    return 64 if dim <= 64 else 128


def refusal(call: AttentionCall) -> str | None:
    """Why the Hopper forward kernel cannot run this call (one line), or None if it can."""
    query, key, value = call.query, call.key, call.value
    if not READY:
        return f"Triton {triton.__version__} is not among the releases the Hopper kernels are tested on (3.6)"
    if interpreting() or not is_hopper(query.device):
        return "the device is not a Hopper GPU"
    if call.blocks is not None and (call.blocks.keys != LISTED or call.blocks.rows < LISTED):
        return f"blocks of {call.blocks.rows} rows and {call.blocks.keys} keys; the keys must be 128, the rows at least"
    if call.window is not None and call.sink_tokens and (call.blocks is not None or call.sink_tokens > MOST_FIRST):
        return f"{call.sink_tokens} sink tokens, or sink tokens beside blocks"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is neither bfloat16 nor float16"
    if not call.positional_only or not call.factor > 0:
        return "a chunk, key mask, packed segments, soft cap, ALiBi or bias is given"
    dim, dim_v = query.shape[3], value.shape[3]
    if dim > 128 or _block(dim_v) > _block(dim):
        return f"head_dim {dim} with values of {dim_v}; up to 128, values no wider than keys"
    if not all(_describable(item) for item in (query, key, value)):
        return "a tensor is not laid out in 16-byte steps"
    return None


def takes(call: AttentionCall) -> bool:
    """Whether the Hopper forward kernel computes this call."""
    return refusal(call) is None


def takes_backward(grad: Tensor, call: AttentionCall) -> bool:
    """Whether the Hopper backward kernel (not deterministic) computes this call. ``grad`` is [B, Sq, H, Dv]."""
    return takes(call) and call.blocks is None and _describable(grad.transpose(1, 2))


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


def _describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A copy descriptor of a ``[B, heads, S, dim]`` tensor in blocks ``[1, 1, rows, columns]``; zeros outside."""
    layout = _layout(rows, columns, tensor.dtype)
    # A dimension of one element may have any stride, but the engine checks it too.
    strides = [s if size > 1 else tensor.shape[3] for size, s in zip(tensor.shape[:3], tensor.stride()[:3])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], layout)


def _bounds(call: AttentionCall) -> tuple[Tensor, Tensor, bool]:
    key = call.key
    batch, num_k = key.shape[0], key.shape[2]
    if call.kv_start is None and call.ends is None:
        return key, key, False
    start, end = call.kv_start, call.ends
    if start is None:
        start = torch.zeros(batch, dtype=torch.int32, device=key.device)
    if end is None:
        end = torch.full((batch,), num_k, dtype=torch.int32, device=key.device)
    return start.to(torch.int32).contiguous(), end.to(torch.int32).contiguous(), True


def section_heads(num_k: int, row_bytes: int, group: int, heads: int) -> int:
    """Query heads per section: as many whole groups as have K and V in :data:`L2_SECTION` bytes, at least one."""
    return max(1, min(L2_SECTION // max(1, num_k * row_bytes), triton.cdiv(heads, group))) * group


def first_rows(call: AttentionCall) -> int:
    """Rows of the short block of first tokens that a window leaves out: a power of two from 16, or 0 without it."""
    return max(16, triton.next_power_of_2(call.sink_tokens)) if call.window is not None and call.sink_tokens else 0


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq] float32."""
    query, key, value = call.query, call.key, call.value
    sinks = None if call.sinks is None else call.sinks.contiguous()
    batch, heads, num_q, dim = query.shape
    group, num_k, dim_v = heads // key.shape[1], key.shape[2], value.shape[3]
    out = torch.empty((batch, num_q, heads, dim_v), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, num_q), dtype=torch.float32, device=query.device)
    block_d, block_dv = _block(dim), _block(dim_v)
    listed = call.blocks is not None
    config = (NARROW if listed or (call.window or num_k) < NARROW_WINDOW else FORWARD)[block_d]
    groups, block_n = config["NUM_WG"], config["BLOCK_N"]
    first = first_rows(call)
    start, end, ranged = _bounds(call)
    lists, steps = block_lists(call.blocks, key)
    num_m = triton.cdiv(num_q, 64 * groups)
    tiles = num_m * batch * heads
    hopper_forward.attention_forward[(min(tiles, _processors(query.device)),)](
        _describe(query, 64, block_d), _describe(key, block_n, block_d), _describe(value, block_n, block_dv),
        _describe(key, first or block_n, block_d), _describe(value, first or block_n, block_dv),
        _describe(out.transpose(1, 2), 64, block_dv),
        torch.zeros(1, dtype=torch.int32, device=query.device), lse, query if sinks is None else sinks, start, end,
        lists["starts"], lists["index"], steps["stride_sb"], steps["stride_sh"], call.factor, num_q, num_k, call.offset,
        call.window or 0, call.sink_tokens, heads, group, num_m, batch * heads,
        section_heads(num_k, 2 * (dim + dim_v), group, batch * heads),
        D=block_d, DV=block_dv, **config, CAUSAL=call.causal, WINDOW=call.window is not None, FIRST=first, RANGE=ranged,
        SINKS=sinks is not None, ROWS=call.blocks.rows if call.blocks is not None else 0, num_warps=4,
    )  # fmt: skip
    return out, lse


def backward(grad: Tensor, out: Tensor, lse: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta); dq's last bits may differ from run to run."""
    query, key, value = call.query, call.key, call.value
    batch, heads, num_q, dim = query.shape
    kv_heads, num_k, dim_v = key.shape[1], key.shape[2], value.shape[3]
    group = heads // kv_heads
    block_d, block_dv = _block(dim), _block(dim_v)
    config = BACKWARD[block_d]
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    num_n = triton.cdiv(num_k, block_n)
    splits = key_splits(num_n * batch * kv_heads, group, _processors(query.device))
    padded_q = triton.cdiv(num_q, block_m) * block_m
    acc = torch.empty((batch, heads, padded_q, block_d), dtype=torch.float32, device=query.device)
    delta = row_delta(out, grad, clear=acc)
    dk = torch.empty((batch, num_k, kv_heads, dim), dtype=query.dtype, device=query.device)
    dv = torch.empty((batch, num_k, kv_heads, dim_v), dtype=query.dtype, device=query.device)
    dk_part = dv_part = acc
    if splits > 1:
        dk_part = torch.empty((splits, batch, num_k, kv_heads, block_d), dtype=torch.float32, device=query.device)
        dv_part = torch.empty((splits, batch, num_k, kv_heads, block_dv), dtype=torch.float32, device=query.device)
    start, end, ranged = _bounds(call)
    hopper_backward.attention_backward[(num_n * splits * batch * kv_heads,)](
        _describe(query, block_m, block_d), _describe(key, block_n, block_d), _describe(value, block_n, block_dv),
        _describe(grad.transpose(1, 2), block_m, block_dv), _describe(dk.transpose(1, 2), block_n, block_d),
        _describe(dv.transpose(1, 2), block_n, block_dv), dk_part, dv_part, acc, lse, delta, start, end, call.factor,
        num_q, num_k, call.offset, call.window or 0, heads, kv_heads, splits, padded_q, num_n,
        D=block_d, DV=block_dv, **config, CAUSAL=call.causal,
        WINDOW=call.window is not None, RANGE=ranged, SPLIT=splits > 1, num_warps=8,
    )  # fmt: skip
    if splits > 1:
        dk.copy_(dk_part.sum(0)[..., :dim])
        dv.copy_(dv_part.sum(0)[..., :dim_v])
    dq = torch.empty((batch, num_q, heads, dim), dtype=query.dtype, device=query.device)
    first = first_rows(call)
    dk_first = acc.new_zeros((batch, kv_heads, first, dim))
    dv_first = acc.new_zeros((batch, kv_heads, first, dim_v))
    repeat = FIRST_BLOCKS if first else 1
    hopper_finish.finish_query[(triton.cdiv(padded_q // block_m, repeat) * batch * heads,)](
        acc, dq, query, key, value, grad, lse, delta, start, end, dk_first, dv_first, *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], grad.stride(0), grad.stride(2), grad.stride(1), call.factor, num_q,
        num_k, padded_q, heads, group, call.offset, call.window or 0, call.sink_tokens, D=dim, DV=dim_v,
        BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=block_m, WARPS=8, FIRST=first, RANGE=ranged, REPEAT=repeat,
    )  # fmt: skip
    if first:
        rows = torch.arange(first, device=key.device) + (start.clamp(min=0)[:, None].long() if ranged else 0)
        batches = torch.arange(batch, device=key.device)[:, None]
        rows = rows.clamp(max=num_k - 1).expand(batch, -1)  # what lies beyond the keys is zero
        for total, part in ((dk, dk_first), (dv, dv_first)):
            total.index_put_((batches, rows), part.transpose(1, 2).to(total.dtype), accumulate=True)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), delta


#: Query rows and keys of the latent kernel's tiles, and the columns of its halves and of the tail.
LATENT_ROWS, LATENT_KEYS, LATENT_HALF, LATENT_TAIL = 64, 64, 256, 64


def takes_latents(call: AttentionCall) -> bool:
    """Whether the Hopper kernel decodes this call over latents; the general one takes the others."""
    query, key, tail = call.query, call.key, call.key_tail
    if tail is None or not READY or interpreting() or not is_hopper(query.device):
        return False
    others = (call.window, call.sinks, call.blocks)
    if query.dtype not in _DTYPES or not call.positional_only or any(rule is not None for rule in others):
        return False
    if query.shape[2] != 1 or key.shape[1] != 1 or not call.factor > 0 or query.shape[0] > 65535:
        return False
    rank, columns = key.shape[3], tail.shape[3]
    fits = LATENT_HALF < rank <= 2 * LATENT_HALF and columns <= LATENT_TAIL
    parts = (query[..., :rank], query[..., rank:], key, tail)
    return fits and all(_describable(part) for part in parts)


def _describe_rows(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A copy descriptor of a ``[B, N, dim]`` tensor in blocks ``[1, rows, columns]``; zeros outside."""
    layout = gl.NVMMASharedLayout.get_default_for([1, rows, columns], _DTYPES[tensor.dtype])
    width = -(-tensor.shape[2] // 8) * 8
    strides = [s if size > 1 else width for size, s in zip(tensor.shape[:2], tensor.stride()[:2])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, rows, columns], layout)


def partial_latents(call: AttentionCall, acc: Tensor, lse: Tensor, out: Tensor, splits: int) -> None:
    """Write the partial sums of each of ``splits`` parts of the keys, or with one part the output itself.

    Args:
        acc, lse: float32 ``[B, splits, H, 512]`` and ``[B, splits, H]``; anything with one part.
        out: ``[B, 1, H, R]``.
    """
    query, key, tail = call.query[:, :, 0], call.key[:, 0], call.key_tail
    assert tail is not None
    batch, heads, _ = query.shape
    rank, num_k = key.shape[2], key.shape[1]
    end, offset = (item if isinstance(item, Tensor) else None for item in (call.kv_end, call.q_offset))
    numbers, steps = zip(*(device_number(item, out) for item in (call.kv_start, end, offset)), strict=True)
    tiles = triton.cdiv(heads, LATENT_ROWS)
    hopper_latent.partial_latents[(tiles, splits, batch)](
        _describe_rows(query[..., :rank], LATENT_ROWS, LATENT_HALF),
        _describe_rows(query[..., rank:], LATENT_ROWS, LATENT_TAIL),
        _describe_rows(key, LATENT_KEYS, LATENT_HALF), _describe_rows(tail[:, 0], LATENT_KEYS, LATENT_TAIL),
        acc, lse, out, *numbers, *steps, call.factor, num_k, call.kv_end if isinstance(call.kv_end, int) else num_k,
        0 if offset is not None else call.q_offset, heads, splits, DV=rank, CAUSAL=call.causal,
        START=call.kv_start is not None, END=end is not None, OFFSET=offset is not None, DIRECT=splits == 1,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
