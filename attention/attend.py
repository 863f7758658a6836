"""One attention function in front of the CPU tiles, the Triton kernels and the decode kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rehead.attention import cpu
from rehead.attention.kernels.decode import MAX_QUERIES
from rehead.errors import UnsupportedError

DECODE_PAIRS = 65535
"""Most pairs of batch row and KV head that its grid holds."""

_MASK_RULES = ("causal", "q_offset", "window", "chunk", "kv_start", "kv_end", "key_mask")
DECODE_RULES = frozenset((*_MASK_RULES, "scale", "softcap", "alibi_slopes", "sinks", "bias"))
"""Rules that the decode kernel takes."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    deterministic: bool = False,
    **rules: Any,
) -> Tensor:
    """Exact tiled attention on whatever device the tensors are on.

    Arguments, result and errors are those of :func:`rehead.attention.cpu.attention`: query ``[B, H, Sq, D]``, key
    ``[B, K, Skv, D]``, value ``[B, K, Skv, Dv]``, result ``[B, Sq, H, Dv]``. Under autocast, query, key and value are
    cast as it casts them for ``scaled_dot_product_attention``.

    Raises:
        UnsupportedError: a device, dtype, head_dim or combination that no path here computes.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    query, key, value = _autocast(query, key, value)
    if query.device.type == "cpu":
        return cpu.attention(query, key, value, scale=scale, bias=bias, deterministic=deterministic, **rules)
    from rehead.attention import kernels

    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[2], key.shape[2])
    rules = dict(rules, scale=scale, bias=bias)
    if _is_decode(query, key, value, rules):
        return kernels.decode(
            query, key, value, **{name: given for name, given in rules.items() if name in DECODE_RULES}
        )
    if isinstance(rules.get("q_offset"), Tensor):
        rules["q_offset"] = int(rules["q_offset"])
    reason = kernels.supported(query, key, value, **rules)
    if reason is not None:
        raise UnsupportedError(f"rehead_tiled cannot compute this attention: {reason}; use attn_implementation='sdpa'")
    return kernels.attention(query, key, value, deterministic=deterministic, **rules)


def _autocast(*tensors: Tensor) -> Any:
    """The tensors in autocast's dtype where it is on: rotary positions leave float32 queries beside its values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _is_decode(query: Tensor, key: Tensor, value: Tensor, rules: dict[str, Any]) -> bool:
    """Few rows, no gradient, and no rule that the decode kernel lacks."""
    if query.shape[2] > MAX_QUERIES or query.shape[0] * key.shape[1] > DECODE_PAIRS:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return False
    return all(given is None or name in DECODE_RULES for name, given in rules.items())
