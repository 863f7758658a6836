"""The CPU attention as a custom operator, and the public function in front of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rehead.attention.call import CALL, AttentionCall, check_rules
from rehead.attention.cpu.lanes import DTYPES, backward, forward
from rehead.errors import UnsupportedError

NAMES = CALL.names()


def _read(values: Any) -> AttentionCall:
    """The call from an operator's arguments, with ``q_offset`` as a number."""
    return CALL.unflatten(values).with_int_offset()


@torch.library.custom_op("rehead::cpu_attention", mutates_args=(), schema=CALL.schema("", "(Tensor, Tensor)"))
def cpu_attention(*call: Any) -> tuple[Tensor, Tensor]:
    """Forward of :func:`attention`; returns ``[B, Sq, H, D]`` and the log-sum-exp ``[B, H, Sq]``."""
    with torch.autocast("cpu", enabled=False):  # scores of tiles stay in float32
        return forward(_read(call))


@cpu_attention.register_fake
def _(query, *args):
    batch, heads, n_query, dim = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(batch, n_query, heads, dim), query.new_empty(batch, heads, n_query, dtype=work)


@torch.library.custom_op(
    "rehead::cpu_attention_backward",
    mutates_args=(),
    schema=CALL.schema(
        "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad",
        "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
)
def cpu_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of :func:`attention`; gradients of sinks and bias are empty where they are not needed."""
    with torch.autocast("cpu", enabled=False):
        return backward(grad_out, grad_lse, out, lse, _read(call), bias_grad)


@cpu_attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, bias_grad, *args):
    call = CALL.unflatten(args)
    return (
        torch.empty_like(call.query, memory_format=torch.contiguous_format),
        torch.empty_like(call.key, memory_format=torch.contiguous_format),
        torch.empty_like(call.value, memory_format=torch.contiguous_format),
        call.query.new_empty(0) if call.sinks is None else torch.empty_like(call.sinks),
        torch.empty_like(call.bias, memory_format=torch.contiguous_format)
        if bias_grad and call.bias is not None
        else call.query.new_empty(0),
    )


def _backward(ctx, grad_out, grad_lse):
    (out, lse), inputs = CALL.saved(ctx, outputs=2)
    sinks, bias = (NAMES.index(name) for name in ("sinks", "bias"))
    bias_grad = inputs[bias] is not None and inputs[bias].is_floating_point() and ctx.needs_input_grad[bias]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_sinks, grad_bias = cpu_attention_backward(grad_out, grad_lse, out, lse, bias_grad, *inputs)
    result = [*grads, *(None for _ in inputs[3:])]
    result[sinks] = None if inputs[sinks] is None else grad_sinks
    result[bias] = grad_bias if bias_grad else None
    return tuple(result)


cpu_attention.register_autograd(_backward, setup_context=CALL.save)


def attention(query: Tensor, key: Tensor, value: Tensor, **rules: Any) -> Tensor:
    """Exact attention in linear memory, ``[B, Sq, H, Dv]``; the rules are those of :class:`AttentionCall`."""
    return run(AttentionCall(query, key, value, **rules))[0]


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of exact attention in linear memory; rows that see no key return 0.

    The call must have no sink tokens, which :func:`rehead.attention.attend.attend` handles.

    Online softmax after Dao et al. 2022 (arXiv 2205.14135), grouped heads after Ainslie et al. 2023 (2305.13245).

    Args:
        call: query, key and value in float32, bfloat16, float16 or float64.

    Returns:
        ``[B, Sq, H, Dv]`` in the query's dtype, and the log-sum-exp of the scores ``[B, H, Sq]`` in float32 (float64
        for float64), -inf for a row that sees nothing.

    Raises:
        UnsupportedError: shapes or dtypes of query, key, value and bias that do not fit together.
        UsageError: rules that do not fit them: an extent that is not positive, a tensor of another shape.
    """
    query, key, value = call.query, call.key, call.value
    _check(query, key, value, call.bias)
    check_rules(call)
    dim, value_dim = query.shape[-1], value.shape[-1]
    scale = call.factor
    if scale <= 0:
        # The kernel scales after masking, and -inf times a scale of 0 or less would be NaN or +inf.
        query, scale = query * scale, 1.0
    # The kernel needs equal head_dims. Columns of zeros change neither the scores nor the other columns.
    if dim < value_dim:
        query, key = F.pad(query, (0, value_dim - dim)), F.pad(key, (0, value_dim - dim))
    elif dim > value_dim:
        value = F.pad(value, (0, dim - value_dim))
    query, key, value = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (query, key, value))
    if scale != call.scale or query is not call.query or key is not call.key or value is not call.value:
        call = call.with_(query=query, key=key, value=value, scale=scale)
    out, lse = cpu_attention(*CALL.flatten(call))
    return (out[..., :value_dim] if dim > value_dim else out), lse


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
