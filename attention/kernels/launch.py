"""Run forward and backward through the fastest kernels that support a call, without checking it."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.attention.call import AttentionCall

LOG2E = 1.4426950408889634


def run_forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq], from the fastest kernel that supports the call."""
    from rehead.attention.kernels import general, hopper

    query, key, value = call.query, call.key, call.value
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        batch, heads, num_q, _ = query.shape
        out = query.new_zeros(batch, num_q, heads, value.shape[3])
        return out, torch.full((batch, heads, num_q), float("inf"), dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        return hopper.forward(call) if hopper.takes(call) else general.forward(call)


def run_backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and sinks.

    Args:
        grad, out: [B, Sq, H, Dv].
        grad_lse, lse: [B, H, Sq] float32, base 2; no gradient where nothing reads the log-sum-exp.
    """
    from rehead.attention.kernels import general, hopper

    query, key, value, sinks = call.query, call.key, call.value, call.sinks
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        zeros = None if sinks is None else torch.zeros_like(sinks)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), zeros
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    with torch.cuda.device_of(query):
        if grad_lse is None and not call.deterministic and hopper.takes_backward(grad, call):
            dq, dk, dv, delta = hopper.backward(grad, out, lse, call)
        else:
            delta = general.row_delta(out, grad)
            if grad_lse is not None:
                # A score's gradient is p (dp - delta + grad of the log-sum-exp), which comes in base 2.
                delta = delta - grad_lse.float() * LOG2E
            dq, dk, dv = general.backward(grad, lse, delta, call)
    dsinks = None
    if sinks is not None:
        # d(loss)/d(sink) = -sum_i p_sink,i delta_i, p_sink = exp(sink - lse)
        share = torch.exp2(sinks.float()[None, :, None] * LOG2E - lse)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks
