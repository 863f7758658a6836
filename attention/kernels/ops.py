"""The attention kernels as ``torch.library`` operators, so that torch.compile traces through them with shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rehead.attention.call import CALL
from rehead.attention.kernels.decode import run_decode
from rehead.attention.kernels.launch import run_backward, run_forward

NAMES = CALL.names()


@torch.library.custom_op("rehead::attention_forward", mutates_args=(), schema=CALL.schema("", "(Tensor, Tensor)"))
def attention_forward(*call: Any) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq] float32."""
    return run_forward(CALL.unflatten(call))


@attention_forward.register_fake
def _(query, key, value, *rules):
    batch, heads, num_q, _ = query.shape
    out = query.new_empty(batch, num_q, heads, value.shape[3])
    return out, query.new_empty(batch, heads, num_q, dtype=torch.float32)


@torch.library.custom_op(
    "rehead::attention_backward",
    mutates_args=(),
    schema=CALL.schema("Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse", "(Tensor, Tensor, Tensor, Tensor)"),
)
def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv laid out [B, S, heads, dim] and dsinks [H] (empty without sinks)."""
    *grads, dsinks = run_backward(grad, grad_lse, out, lse, CALL.unflatten(call))
    rows = [item.transpose(1, 2).contiguous() for item in grads]
    return rows[0], rows[1], rows[2], out.new_empty(0) if dsinks is None else dsinks


@attention_backward.register_fake
def _(grad, grad_lse, out, lse, *args):
    call = CALL.unflatten(args)
    tensors = (call.query, call.key, call.value)
    grads = [out.new_empty(item.shape[0], item.shape[2], item.shape[1], item.shape[3]) for item in tensors]
    return grads[0], grads[1], grads[2], out.new_empty(0) if call.sinks is None else torch.empty_like(call.sinks)


def _differentiate(ctx, grad, grad_lse):
    (out, lse), inputs = CALL.saved(ctx, outputs=2)
    grad = torch.zeros_like(out) if grad is None else grad
    *grads, dsinks = attention_backward(grad, grad_lse, out, lse, *inputs)
    result: list[Any] = [*(item.transpose(1, 2) for item in grads), *(None for _ in inputs[3:])]
    sinks = NAMES.index("sinks")
    result[sinks] = None if inputs[sinks] is None else dsinks
    return tuple(result)


attention_forward.register_autograd(_differentiate, setup_context=CALL.save)


@torch.library.custom_op("rehead::decode", mutates_args=(), schema=CALL.schema("", "Tensor"))
def decode(*call: Any) -> Tensor:
    """Output [B, Sq, H, Dv]."""
    return run_decode(CALL.unflatten(call))


@decode.register_fake
def _(query, key, value, *rules):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
