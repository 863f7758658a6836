"""The attention function, which picks the CPU tiles, the Triton kernels or the decode kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from rehead.attention import cpu
from rehead.attention.call import AttentionCall
from rehead.attention.kernels.bounds import mask_bounds, segment_bounds
from rehead.attention.kernels.decode import MAX_QUERIES
from rehead.errors import UnsupportedError

DECODE_PAIRS = 65535
"""Largest number of pairs of batch row and KV head in the decode kernel's grid."""


def attention(query: Tensor, key: Tensor, value: Tensor, **rules: Any) -> Tensor:
    """:func:`attend` with the fields of :class:`AttentionCall` as arguments."""
    return attend(AttentionCall(query, key, value, **rules))


_FIELDS = tuple(item.name for item in fields(AttentionCall))


@dataclass(frozen=True, eq=False)
class _LseCall(AttentionCall):
    """A call whose log-sum-exp is kept, also by the copies that variants make of it.

    A context variable would say the same, but no compiled model could read it.
    """

    kept: list[Tensor] = field(default_factory=list)


def attend(call: AttentionCall) -> Tensor:
    """Exact tiled attention ``[B, Sq, H, Dv]``, on the device of the tensors.

    Under autocast, query, key and value are cast as for ``scaled_dot_product_attention``.

    Raises:
        UsageError: rules that contradict each other or the tensors.
        UnsupportedError: a device, dtype, head_dim or combination that no path here computes.
    """
    if isinstance(call, _LseCall):
        out, lse = attend_with_lse(call)
        call.kept.append(lse)
        return out
    call = _prepared(call)
    on_cpu = call.query.device.type == "cpu"
    if call.key_tail is not None and (on_cpu or not _is_decode(call)):
        return attend(call.joined())[..., : call.key.shape[-1]]
    if not on_cpu and _is_decode(call):
        from rehead.attention import kernels

        return kernels.decode_call(_as_bias(call) if call.sink_tokens or call.blocks is not None else call)
    return attend_with_lse(call)[0]


def attend_with_lse(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As :func:`attend`, with the log-sum-exp of each row's scores.

    Returns:
        ``[B, Sq, H, Dv]``, and ``[B, H, Sq]`` in float32 (float64 for float64), sinks included, -inf for a row that
        sees nothing. Both have gradients.
    """
    call = _prepared(call)
    if call.key_tail is not None:
        out, lse = attend_with_lse(call.joined())
        return out[..., : call.key.shape[-1]], lse
    on_cpu = call.query.device.type == "cpu"
    if call.sink_tokens and (on_cpu or call.kv_segments is not None):
        return _with_sink_tokens(call)
    if on_cpu:
        return cpu.run(call)
    from rehead.attention import kernels

    call = call.with_int_offset()
    reason = kernels.unsupported(call)
    if reason is not None:
        raise UnsupportedError(f"rehead_tiled cannot compute this attention: {reason}; use attn_implementation='sdpa'")
    out, lse = kernels.run(call)
    return out, (lse * math.log(2)).masked_fill(lse == float("inf"), float("-inf"))


def with_lse(compute: Callable[[AttentionCall], Tensor], call: AttentionCall) -> tuple[Tensor, Tensor]:
    """:func:`attend_with_lse` through the variants that stand below another.

    Args:
        compute: the attention below, which ends in one call of :func:`attend`.
        call: what it is given.

    Raises:
        UnsupportedError: a variant below makes several calls of one.
    """
    watched = _LseCall(**{name: getattr(call, name) for name in _FIELDS})
    out, kept = compute(watched), watched.kept
    if len(kept) != 1:
        raise UnsupportedError(
            f"a variant below computes one call of attention in {len(kept)}, which cannot be merged; apply it last"
        )
    return out, kept[0]


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of attention over several sets of keys together, from those over each set.

    Args:
        parts: pairs from :func:`attend_with_lse`, for sets of keys without a common key.
    """
    scores = torch.stack([lse for _, lse in parts])
    top = scores.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    shares = (weights / total).transpose(-1, -2)[..., None]
    out = sum(part.to(shares.dtype) * share for (part, _), share in zip(parts, shares))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), (top + torch.log(total)).masked_fill(empty, float("-inf"))


def _prepared(call: AttentionCall) -> AttentionCall:
    """The call with autocast's dtype and a scale; on a GPU also with a bias for all rows and keys."""
    query, key, value = _autocast(call.query, call.key, call.value)
    changes: dict[str, Any] = {}
    if call.key_tail is not None:
        value = key
        changes["key_tail"] = _autocast(call.key_tail, key)[0]
    if call.query.device.type != "cpu":
        query, key, value = (_in_rows(x) for x in (query, key, value))
        if call.key_tail is not None:
            value = key
            changes["key_tail"] = _in_rows(changes["key_tail"])
        if call.bias is not None:
            changes["bias"] = call.bias.expand(-1, -1, query.shape[2], key.shape[2])
    if call.sink_tokens and call.window is None:
        changes["sink_tokens"] = 0
    if call.scale is None:
        changes["scale"] = call.factor
    if changes or query is not call.query or key is not call.key or value is not call.value:
        call = call.with_(query=query, key=key, value=value, **changes)
    return call


def _in_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _autocast(*tensors: Tensor) -> Any:
    """The tensors in autocast's dtype if it is on: rotary embeddings give float32 queries and keys, unlike values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _is_decode(call: AttentionCall) -> bool:
    """Whether the decode kernel can run the call: few rows, no gradient, no segments."""
    query, key = call.query, call.key
    if query.shape[2] > MAX_QUERIES or query.shape[0] * key.shape[1] > DECODE_PAIRS or call.q_segments is not None:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, call.value)))


def _first_tokens(call: AttentionCall) -> tuple[Tensor | None, Tensor]:
    """(start of each sequence ``[B]``, or None for 0; bool ``[B or 1, Skv]``: its first ``sink_tokens`` keys)."""
    num_k = call.key.shape[2]
    place = torch.arange(num_k, device=call.key.device, dtype=torch.int32)[None]
    begin = call.kv_start
    if call.key_mask is not None:
        first = mask_bounds(call.key_mask)[0]
        begin = first if begin is None else torch.maximum(first, begin.to(torch.int32))
    start = torch.zeros_like(place) if begin is None else begin[:, None]
    if call.kv_segments is not None:
        start = torch.maximum(segment_bounds(call.kv_segments, call.kv_segments)[0], start)
    return begin, (place >= start) & (place < start + call.sink_tokens)


def _with_sink_tokens(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Attention over a window and over the first tokens, merged."""
    begin, first = _first_tokens(call)
    rest = call.with_(sink_tokens=0)
    if call.kv_segments is not None:
        seen = torch.ones_like(first) if call.key_mask is None else call.key_mask
        shape = (call.key.shape[0], call.key.shape[2])
        sinks = rest.with_(window=None, sinks=None, key_mask=(seen & first).expand(shape))
        window = rest.with_(key_mask=(seen & ~first).expand(shape))
    else:
        # As ranges of keys, so that neither part reads more blocks than it needs.
        ends = first.new_zeros(call.key.shape[0], dtype=torch.int32) if begin is None else begin.to(torch.int32)
        ends = ends + call.sink_tokens
        most = ends if call.kv_end is None else torch.minimum(ends, torch.as_tensor(call.kv_end, device=ends.device))
        sinks = rest.with_(window=None, sinks=None, kv_end=most.to(torch.int32))
        window = rest.with_(kv_start=ends)
    return merge([attend_with_lse(sinks), attend_with_lse(window)])


def _as_bias(call: AttentionCall) -> AttentionCall:
    """A decode step with its window and sink tokens, or its blocks, as a bias, which is all the decode kernel takes."""
    offset = torch.as_tensor(call.q_offset, device=call.key.device).reshape(-1, 1, 1)
    row = torch.arange(call.query.shape[2], device=call.key.device)[None, :, None] + offset
    place = torch.arange(call.key.shape[2], device=call.key.device)[None, None]
    seen = (place >= 0)[None]
    if call.sink_tokens and call.window is not None:
        seen = seen & ((row - place < call.window) | _first_tokens(call)[1][:, None])[:, None]
        call = call.with_(window=None, sink_tokens=0)
    if call.blocks is not None:
        seen = seen & call.blocks.seen(call.query.shape[2], call.key.shape[2])
        call = call.with_(blocks=None)
    bias = call.bias
    if bias is None:
        bias = seen.expand(-1, -1, call.query.shape[2], call.key.shape[2])
    else:
        bias = bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, float("-inf"))
    return call.with_(bias=bias)
