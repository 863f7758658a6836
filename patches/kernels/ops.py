"""The attention kernels as ``torch.library`` operators, so that torch.compile traces through them with shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.patches.kernels.rules import Rules


@torch.library.custom_op("rehead::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    q_offset: int,
    window: int | None,
    chunk: int | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    key_mask: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq] float32; arguments as :func:`..api.attention`."""
    from rehead.patches.kernels.api import run_forward

    rules = Rules(scale, causal, q_offset, window, chunk, kv_start, kv_end, key_mask, q_segments, kv_segments, softcap,
                  alibi_slopes, bias, deterministic)  # fmt: skip
    return run_forward(query, key, value, sinks, rules)


@attention_forward.register_fake
def _(query, key, value, sinks, *rules):
    batch, heads, num_q, _ = query.shape
    out = query.new_empty(batch, num_q, heads, value.shape[3])
    return out, query.new_empty(batch, heads, num_q, dtype=torch.float32)


@torch.library.custom_op("rehead::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    q_offset: int,
    window: int | None,
    chunk: int | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    key_mask: Tensor | None,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv laid out [B, S, heads, dim] and dsinks [H] (empty without sinks)."""
    from rehead.patches.kernels.api import run_backward

    rules = Rules(scale, causal, q_offset, window, chunk, kv_start, kv_end, key_mask, q_segments, kv_segments, softcap,
                  alibi_slopes, bias, deterministic)  # fmt: skip
    dq, dk, dv, dsinks = run_backward(grad, query, key, value, sinks, out, lse, rules)
    rows = [item.transpose(1, 2).contiguous() for item in (dq, dk, dv)]
    return rows[0], rows[1], rows[2], query.new_empty(0) if dsinks is None else dsinks


@attention_backward.register_fake
def _(grad, query, key, value, sinks, out, lse, *rules):
    shapes = [(item.shape[0], item.shape[2], item.shape[1], item.shape[3]) for item in (query, key, value)]
    grads = [query.new_empty(shape) for shape in shapes]
    return grads[0], grads[1], grads[2], query.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save(ctx, inputs, output):
    query, key, value, sinks, *rules = inputs
    ctx.save_for_backward(query, key, value, sinks, *output)
    ctx.rules = rules


def _differentiate(ctx, grad, grad_lse):
    query, key, value, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_backward(grad, query, key, value, sinks, out, lse, *ctx.rules)
    gradients = [item.transpose(1, 2) for item in (dq, dk, dv)]
    return (*gradients, None if sinks is None else dsinks, *([None] * len(ctx.rules)))


attention_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("rehead::decode", mutates_args=())
def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    q_offset: Tensor | None,
    q_offset_number: int | None,
    kv_end: Tensor | None,
    kv_end_number: int | None,
    kv_start: Tensor | None,
    key_mask: Tensor | None,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Arguments as :func:`..decode.decode`; an offset or end is given as a tensor or as a number."""
    from rehead.patches.kernels.decode import run_decode

    offset = q_offset if q_offset is not None else q_offset_number or 0
    end = kv_end if kv_end is not None else kv_end_number
    return run_decode(query, key, value, scale, offset, end, kv_start, key_mask, window, chunk, softcap, alibi_slopes,
                      sinks, causal)  # fmt: skip


@decode.register_fake
def _(query, key, value, *rules):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
