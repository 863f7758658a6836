"""Exact tiled attention on a GPU: :func:`attention`, and :func:`supported` to ask first."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from rehead.attention.kernels.rules import Rules, check, refusal
from rehead.errors import UnsupportedError

# A constant, for torch.compile to trace past.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device) -> str | None:
    """Why kernels cannot run on ``device`` at all (one line), or None. TRITON_INTERPRET=1 makes the CPU acceptable."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"device {device.type!r} is not a CUDA GPU"


def supported(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, sinks: Tensor | None = None, **rules: object
) -> str | None:
    """Why :func:`attention` cannot take these arguments (dtype, head_dim over 256, device, ...), or None when it can.

    Takes the arguments of :func:`attention`. Arguments that contradict each other raise there, not here.
    """
    made = Rules(scale=scale, **rules)  # type: ignore[arg-type]
    return unavailable(query.device) or refusal(query, key, value, made, sinks)


def slow_path(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, sinks: Tensor | None = None, **rules: object
) -> str | None:
    """Why a supported call runs through the general kernels rather than the Hopper ones, or None when it does not."""
    from rehead.attention.kernels import hopper

    return hopper.refusal(query, key, value, Rules(scale=scale, **rules))  # type: ignore[arg-type]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    q_offset: int = 0,
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
    """softmax(q k^T) v in tiles: no S x S matrix, grouped KV heads read in place, differentiable, torch.compile-able.

    Query row i stands at position i + q_offset, key j at position j. A row sees a key when every rule given allows it;
    a row that sees none returns zeros.

    Args:
        query: ``[B, H, Sq, D]``, bfloat16, float16 or float32, any strides with a contiguous last dimension, D <= 256.
        key: ``[B, K, Skv, D]`` of the same dtype; H must be a multiple of K, and head h reads KV head h // (H // K).
        value: ``[B, K, Skv, Dv]``; Dv may differ from D.
        scale: factor on q k^T.
        causal: j <= i + q_offset.
        q_offset: position of the first query row.
        window: i + q_offset - j < window.
        chunk: (i + q_offset) // chunk == j // chunk.
        kv_start, kv_end: int32 ``[B]``; kv_start[b] <= j < kv_end[b].
        key_mask: bool ``[B, Skv]``, True where a key may be seen.
        q_segments, kv_segments: int32 ``[B, Sq]`` and ``[B, Skv]``; seen only when equal (packed sequences).
        softcap: c * tanh(s / c) on the scaled scores.
        alibi_slopes: float32 ``[H]``; adds slope * (j - (i + q_offset)).
        sinks: ``[H]``; one more logit per head in the softmax's denominator, with a gradient.
        bias: ``[B or 1, H or 1, Sq, Skv]``, added to the scores (float) or masking them (bool); has no gradient.
        deterministic: make backward the same bit for bit from run to run (slower on Hopper).

    Returns:
        ``[B, Sq, H, Dv]``, contiguous, in query's dtype.

    Raises:
        UsageError: shapes or rules that contradict each other.
        UnsupportedError: what :func:`supported` names.
    """
    rules = Rules(float(scale), causal, q_offset, window, chunk, kv_start, kv_end, key_mask, q_segments, kv_segments,
                  softcap, alibi_slopes, bias, deterministic)  # fmt: skip
    check(query, key, value, rules, sinks)
    reason = unavailable(query.device) or refusal(query, key, value, rules, sinks)
    if reason is not None:
        raise UnsupportedError(
            f"no attention kernel for this call: {reason}; use attn_implementation='sdpa' or 'eager'"
        )
    if torch.compiler.is_compiling():
        from rehead.attention.kernels import ops

        return ops.attention_forward(query, key, value, sinks, *rules.values())[0]
    return _Attention.apply(query, key, value, sinks, rules)


def run_forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output [B, Sq, H, Dv] and base-2 log-sum-exp [B, H, Sq], through the fastest kernel that takes the call."""
    from rehead.attention.kernels import general, hopper

    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        batch, heads, num_q, _ = query.shape
        out = query.new_zeros(batch, num_q, heads, value.shape[3])
        return out, torch.full((batch, heads, num_q), float("inf"), dtype=torch.float32, device=query.device)
    sinks = None if sinks is None else sinks.contiguous()
    with torch.cuda.device_of(query):
        if hopper.takes(query, key, value, rules):
            return hopper.forward(query, key, value, sinks, rules)
        return general.forward(query, key, value, sinks, rules)


def run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and sinks. ``grad`` and ``out`` are [B, Sq, H, Dv]."""
    from rehead.attention.kernels import general, hopper

    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        zeros = None if sinks is None else torch.zeros_like(sinks)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), zeros
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    with torch.cuda.device_of(query):
        if not rules.deterministic and hopper.takes_backward(grad, query, key, value, rules):
            dq, dk, dv, delta = hopper.backward(grad, query, key, value, out, lse, rules)
        else:
            delta = general.row_delta(out, grad)
            dq, dk, dv = general.backward(grad, query, key, value, lse, delta, rules)
    dsinks = None
    if sinks is not None:
        # d(loss)/d(sink) = -sum_i p_sink,i delta_i, p_sink = exp(sink - lse)
        share = torch.exp2(sinks.float()[None, :, None] * 1.4426950408889634 - lse)
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, rules):
        out, lse = run_forward(query, key, value, sinks, rules)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.rules = rules
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv, dsinks = run_backward(grad, query, key, value, sinks, out, lse, ctx.rules)
        return dq, dk, dv, dsinks, None
