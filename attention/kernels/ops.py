"""The attention kernels as ``torch.library`` operators, so that torch.compile traces through them with shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.attention.kernels.rules import DecodeRules, Rules
from rehead.attention.schema import schema

INPUTS = "Tensor query, Tensor key, Tensor value"


@torch.library.custom_op(
    "rehead::attention_forward",
    mutates_args=(),
    schema=schema(f"{INPUTS}, Tensor? sinks", Rules, "(Tensor, Tensor)"),
)
def attention_forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *rules) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq] float32; ``rules`` are the fields of :class:`Rules`."""
    from rehead.attention.kernels.api import run_forward

    return run_forward(query, key, value, sinks, Rules(*rules))


@attention_forward.register_fake
def _(query, key, value, sinks, *rules):
    batch, heads, num_q, _ = query.shape
    out = query.new_empty(batch, num_q, heads, value.shape[3])
    return out, query.new_empty(batch, heads, num_q, dtype=torch.float32)


@torch.library.custom_op(
    "rehead::attention_backward",
    mutates_args=(),
    schema=schema(
        f"Tensor grad, {INPUTS}, Tensor? sinks, Tensor out, Tensor lse", Rules, "(Tensor, Tensor, Tensor, Tensor)"
    ),
)
def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, *rules
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv laid out [B, S, heads, dim] and dsinks [H] (empty without sinks)."""
    from rehead.attention.kernels.api import run_backward

    dq, dk, dv, dsinks = run_backward(grad, query, key, value, sinks, out, lse, Rules(*rules))
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


@torch.library.custom_op("rehead::decode", mutates_args=(), schema=schema(INPUTS, DecodeRules, "Tensor"))
def decode(query: Tensor, key: Tensor, value: Tensor, *rules) -> Tensor:
    """Output [B, Sq, H, Dv]; ``rules`` are the fields of :class:`DecodeRules`."""
    from rehead.attention.kernels.decode import run_decode

    return run_decode(query, key, value, DecodeRules(*rules))


@decode.register_fake
def _(query, key, value, *rules):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
