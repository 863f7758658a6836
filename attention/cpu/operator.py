"""The CPU attention as a custom operator, and the public function in front of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rehead.attention.cpu.lanes import DTYPES, Options, backward, forward
from rehead.attention.kernels.rules import Rules, check_rules
from rehead.attention.schema import schema
from rehead.errors import UnsupportedError

INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? q_offset_tensor"
NAMES = [field.name for field in fields(Options)]


def _options(q_offset_tensor: Tensor | None, values: tuple) -> Options:
    opts = Options(*values)
    return opts if q_offset_tensor is None else replace(opts, q_offset=int(q_offset_tensor))


@torch.library.custom_op("rehead::cpu_attention", mutates_args=(), schema=schema(INPUTS, Options, "(Tensor, Tensor)"))
def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, q_offset_tensor: Tensor | None, *options
) -> tuple[Tensor, Tensor]:
    """Forward of :func:`attention`; returns ``[B, Sq, H, D]`` and the log-sum-exp ``[B, H, Sq]``.

    ``options`` are the fields of :class:`Options`; ``q_offset_tensor`` counts in place of ``q_offset``.
    """
    with torch.autocast("cpu", enabled=False):  # scores of tiles stay in float32
        return forward(query, key, value, _options(q_offset_tensor, options))


@cpu_attention.register_fake
def _(query, key, value, *args):
    batch, heads, n_query, dim = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, n_query, heads, dim), query.new_empty(batch, heads, n_query, dtype=work)


@torch.library.custom_op(
    "rehead::cpu_attention_backward",
    mutates_args=(),
    schema=schema(
        f"Tensor grad_out, Tensor out, Tensor lse, bool bias_grad, {INPUTS}",
        Options,
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
)
def cpu_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offset_tensor: Tensor | None,
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of :func:`attention`; sinks and bias gradients are empty where they were not asked for."""
    with torch.autocast("cpu", enabled=False):
        return backward(grad_out, query, key, value, out, lse, _options(q_offset_tensor, options), bias_grad)


@cpu_attention_backward.register_fake
def _(grad_out, out, lse, bias_grad, query, key, value, q_offset_tensor, *options):
    opts = Options(*options)
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty_like(key, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
        query.new_empty(0) if opts.sinks is None else torch.empty_like(opts.sinks),
        torch.empty_like(opts.bias, memory_format=torch.contiguous_format)
        if bias_grad and opts.bias is not None
        else query.new_empty(0),
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output, *(item for item in inputs if isinstance(item, Tensor)))
    ctx.plain = [None if isinstance(item, Tensor) else item for item in inputs]
    ctx.places = [place for place, item in enumerate(inputs) if isinstance(item, Tensor)]


def _backward(ctx, grad_out, grad_lse):
    out, lse, *tensors = ctx.saved_tensors
    inputs = list(ctx.plain)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        inputs[place] = tensor
    first = len(inputs) - len(NAMES)
    sinks, bias = (first + NAMES.index(name) for name in ("sinks", "bias"))
    bias_grad = inputs[bias] is not None and inputs[bias].is_floating_point() and ctx.needs_input_grad[bias]
    *grads, grad_sinks, grad_bias = cpu_attention_backward(grad_out, out, lse, bias_grad, *inputs)
    result = [*grads, *(None for _ in inputs[3:])]
    result[sinks] = None if inputs[sinks] is None else grad_sinks
    result[bias] = grad_bias if bias_grad else None
    return tuple(result)


cpu_attention.register_autograd(_backward, setup_context=_setup)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int | Tensor = 0,
    window: int | None = None,
    chunk: int | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Exact attention in linear memory; rows that see no key return 0.

    Online softmax after Dao et al. 2022 (arXiv 2205.14135), grouped heads after Ainslie et al. 2023 (2305.13245).

    Args:
        query: ``[B, H, Sq, D]`` in float32, bfloat16, float16 or float64.
        key: ``[B, K, Skv, D]`` with K dividing H.
        value: ``[B, K, Skv, Dv]``.
        scale: factor of the scores; ``D ** -0.5`` if None.
        causal: row i, at position ``i + q_offset``, sees key j only if ``j <= i + q_offset``.
        q_offset: position of the first row on the keys' axis: an int or an integer tensor of one element.
        window: row sees key only if ``position - j < window``.
        chunk: row sees key only if ``position // chunk == j // chunk``.
        kv_start, kv_end: integer ``[B]``; keys outside ``[kv_start, kv_end)`` are hidden.
        key_mask: bool ``[B, Skv]``, False hides a key.
        q_segments, kv_segments: integer ``[B, Sq]`` and ``[B, Skv]``; a row sees keys of its own segment only.
        softcap: scores become ``softcap * tanh(score / softcap)``, after scaling.
        alibi_slopes: float ``[H]``; ``slope * (j - position)`` is added to the scores (arXiv 2108.12409).
        sinks: float ``[H]``; one more logit a head in the softmax's denominator.
        bias: added to the scores, broadcastable to ``[B, H, Sq, Skv]``; a bool bias hides where it is False.
        deterministic: accepted for the GPU signature; this path is deterministic.

    Returns:
        ``[B, Sq, H, Dv]`` in the query's dtype, contiguous.

    Raises:
        UnsupportedError: shapes or dtypes of query, key, value and bias that do not fit together.
        UsageError: rules that do not fit them: an extent that is not positive, a tensor of another shape.
    """
    _check(query, key, value, bias)
    dim, value_dim = query.shape[-1], value.shape[-1]
    scale = dim**-0.5 if scale is None else float(scale)
    given: dict[str, Any] = {
        "causal": causal, "window": window, "chunk": chunk, "kv_start": kv_start, "kv_end": kv_end,
        "key_mask": key_mask, "q_segments": q_segments, "kv_segments": kv_segments, "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    check_rules(query.shape[0], query.shape[1], query.shape[2], key.shape[2], Rules(scale, **given), sinks)
    if scale <= 0:
        # The kernel scales what it has masked already, and -inf times such a scale would be NaN or +inf.
        query, scale = query * scale, 1.0
    # The kernel wants one head_dim. Zero columns change neither scores nor the columns that are kept.
    if dim < value_dim:
        query, key = F.pad(query, (0, value_dim - dim)), F.pad(key, (0, value_dim - dim))
    elif dim > value_dim:
        value = F.pad(value, (0, dim - value_dim))
    opts = Options(scale, q_offset=0 if isinstance(q_offset, Tensor) else q_offset, sinks=sinks, bias=bias, **given)
    out, _ = cpu_attention(
        *(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value)),
        q_offset if isinstance(q_offset, Tensor) else None,
        *(getattr(opts, name) for name in NAMES),
    )
    return out[..., :value_dim] if dim > value_dim else out


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise UnsupportedError(
            f"attention on the CPU takes one of float32, bfloat16, float16, float64 for query, key and value alike, "
            f"not {query.dtype}, {key.dtype}, {value.dtype}; cast them first"
        )
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise UnsupportedError("query, key and value must be [batch, heads, length, head_dim]; reshape them first")
    if key.shape[1] != value.shape[1] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise UnsupportedError(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key and {value.shape[1]} value heads; "
            "the key and value heads must agree and divide the query heads"
        )
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[-1] != key.shape[-1]:
        raise UnsupportedError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together; "
            "batch, key length and the head_dim of query and key must agree"
        )
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if bias is not None and (bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, full, strict=True))):
        raise UnsupportedError(f"bias {tuple(bias.shape)} cannot be broadcast to {full}; reshape it to four dimensions")
