"""What a call of the attention kernels asks for, apart from its tensors: one frozen record, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rehead.errors import UsageError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


class Flat:
    """A dataclass whose fields pass through an operator's flat signature."""

    def values(self) -> tuple:
        """The fields in order."""
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rules(Flat):
    """Mask and score rules; the arguments of :func:`rehead.attention.kernels.attention` under their own names."""

    scale: float
    causal: bool = False
    q_offset: int = 0
    window: int | None = None
    chunk: int | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    key_mask: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    deterministic: bool = False

    @property
    def positional_only(self) -> bool:
        """True when causal, window and key range say it all, which is what the Hopper kernels take."""
        extra = (self.chunk, self.key_mask, self.q_segments, self.softcap, self.alibi_slopes, self.bias)
        return all(item is None for item in extra) and self.scale > 0


@dataclass(frozen=True)
class DecodeRules(Flat):
    """The same for a decode step; a position or an end is a number, or a tensor on the device that counts instead."""

    scale: float
    q_offset: int = 0
    q_offset_tensor: Tensor | None = None
    kv_end: int | None = None
    kv_end_tensor: Tensor | None = None
    kv_start: Tensor | None = None
    key_mask: Tensor | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = True


def _shape(tensor: Tensor) -> str:
    return "x".join(str(int(size)) for size in tensor.shape)


def check(query: Tensor, key: Tensor, value: Tensor, rules: Rules, sinks: Tensor | None) -> None:
    """Raise :class:`UsageError` when the arguments contradict each other (never for what is merely unsupported)."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise UsageError("attention wants query, key and value of four dimensions, [batch, heads, sequence, head_dim]")
    batch, heads, num_q, dim = query.shape
    kv_heads, num_k = key.shape[1], key.shape[2]
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3] or key.shape[3] != dim:
        raise UsageError(f"shapes disagree: query {_shape(query)}, key {_shape(key)}, value {_shape(value)}")
    if kv_heads == 0 or heads % kv_heads:
        raise UsageError(
            f"{heads} query heads cannot share {kv_heads} KV heads; the first must be a multiple of the second"
        )
    check_rules(batch, heads, num_q, num_k, rules, sinks)
    if rules.bias is not None:
        shape = tuple(rules.bias.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != (num_q, num_k):
            raise UsageError(f"bias has shape {_shape(rules.bias)}; it must be [B or 1, H or 1, {num_q}, {num_k}]")


def check_rules(batch: int, heads: int, num_q: int, num_k: int, rules: Rules, sinks: Tensor | None) -> None:
    """Raise :class:`UsageError` for extents that are not positive and tensors of a wrong shape or a mask not bool."""
    for name, extent in (("window", rules.window), ("chunk", rules.chunk), ("softcap", rules.softcap)):
        if extent is not None and extent <= 0:
            raise UsageError(f"{name} is {extent}; give a positive number or None")
    if (rules.q_segments is None) != (rules.kv_segments is None):
        raise UsageError("q_segments and kv_segments go together; give both or neither")
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "kv_start": (rules.kv_start, (batch,)),
        "kv_end": (rules.kv_end, (batch,)),
        "key_mask": (rules.key_mask, (batch, num_k)),
        "q_segments": (rules.q_segments, (batch, num_q)),
        "kv_segments": (rules.kv_segments, (batch, num_k)),
        "alibi_slopes": (rules.alibi_slopes, (heads,)),
        "sinks": (sinks, (heads,)),
    }
    if rules.key_mask is not None and rules.key_mask.dtype != torch.bool:
        # A mask of integers or floats may mean that 0 hides a key, or that 0 is added to its score.
        raise UsageError(f"key_mask has dtype {rules.key_mask.dtype}; it must be bool, True where a key may be seen")
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has shape {_shape(tensor)}; it must be {'x'.join(map(str, shape))}")


def refusal(query: Tensor, key: Tensor, value: Tensor, rules: Rules, sinks: Tensor | None) -> str | None:
    """Why the GPU kernels cannot take the call (one line), or None when they can."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not one of bfloat16, float16, float32"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query, key and value differ in dtype ({query.dtype}, {key.dtype}, {value.dtype})"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"head_dim {widest} is over {MAX_HEAD_DIM}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} is not contiguous in its last dimension"
    if not math.isfinite(rules.scale):
        return f"scale is {rules.scale}"
    for name, added in (("bias", rules.bias), ("alibi_slopes", rules.alibi_slopes)):
        if added is not None and added.requires_grad and torch.is_grad_enabled():
            return f"{name} wants a gradient, which the kernels do not give"
    return None


def segment_bounds(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of ``rows`` [B, M], where its segment begins and ends among ``columns`` [B, N].

    Returns int32 ``(begin, end)`` [B, M]: the first matching column and the last plus one, or (N, 0) without a match.
    Segments may come in any order; kernels use the bounds to skip blocks and still compare the segments themselves.
    """
    count = columns.shape[1]
    ordered, index = columns.sort(dim=1, stable=True)
    left = torch.searchsorted(ordered, rows.contiguous(), right=False)
    right = torch.searchsorted(ordered, rows.contiguous(), right=True)
    found = right > left
    begin = torch.where(found, index.gather(1, left.clamp(max=count - 1)), count)
    end = torch.where(found, index.gather(1, (right - 1).clamp(min=0)) + 1, 0)
    return begin.to(torch.int32), end.to(torch.int32)


def mask_bounds(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First visible key and last plus one in each row of a ``[B, Skv]`` mask, int32 [B]; (Skv, 0) when none."""
    count = key_mask.shape[1]
    position = torch.arange(count, device=key_mask.device, dtype=torch.int32)
    begin = torch.where(key_mask, position, count).amin(1)
    end = torch.where(key_mask, position + 1, 0).amax(1)
    return begin.to(torch.int32), end.to(torch.int32)
