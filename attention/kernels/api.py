"""Exact tiled attention on a GPU: :func:`attention`, and :func:`supported` to check a call first."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from rehead.attention.call import CALL, AttentionCall, check
from rehead.attention.kernels import ops
from rehead.attention.kernels.bounds import refusal
from rehead.attention.kernels.decode import MAX_QUERIES, run_decode
from rehead.attention.kernels.launch import run_backward, run_forward
from rehead.errors import UnsupportedError, UsageError

# A constant, for torch.compile to trace past.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device) -> str | None:
    """Why no kernel can run on ``device`` (one line), or None. With TRITON_INTERPRET=1 they run on the CPU."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"device {device.type!r} is not a CUDA GPU"


def supported(query: Tensor, key: Tensor, value: Tensor, **rules: Any) -> str | None:
    """Why :func:`attention` cannot take these arguments (dtype, head_dim over 256, device, ...), or None when it can.

    Takes the arguments of :func:`attention`. Arguments that contradict each other raise there, not here.
    """
    return unsupported(AttentionCall(query, key, value, **rules))


def unsupported(call: AttentionCall) -> str | None:
    """Why a call cannot run here (one line), or None when it can."""
    return unavailable(call.query.device) or refusal(call)


def slow_path(query: Tensor, key: Tensor, value: Tensor, **rules: Any) -> str | None:
    """Why a supported call runs through the general kernels rather than the Hopper ones, or None when it does not."""
    from rehead.attention.kernels import hopper

    return hopper.refusal(AttentionCall(query, key, value, **rules))


def attention(query: Tensor, key: Tensor, value: Tensor, **rules: Any) -> Tensor:
    """softmax(q k^T) v in tiles, ``[B, Sq, H, Dv]``; the rules are those of :class:`AttentionCall`. See :func:`run`."""
    return run(AttentionCall(query, key, value, **rules))[0]


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v in tiles: no S x S matrix, grouped KV heads read in place, differentiable, torch.compile-able.

    Args:
        call: query, key and value in bfloat16, float16 or float32, any strides with a contiguous last dimension,
            head_dim up to 256. ``q_offset`` is a number, ``bias`` has all rows and keys and no gradient, and there are
            not both segments and sink tokens.

    Returns:
        ``[B, Sq, H, Dv]``, contiguous, in the query's dtype; and the log-sum-exp in base 2, ``[B, H, Sq]`` float32,
        +inf for a row that sees nothing.

    Raises:
        UsageError: shapes or rules that contradict each other.
        UnsupportedError: what :func:`unsupported` names.
    """
    if call.scale is None:
        call = call.with_(scale=call.factor)
    check(call)
    reason = unsupported(call)
    if reason is not None:
        raise UnsupportedError(
            f"no attention kernel for this call: {reason}; use attn_implementation='sdpa' or 'eager'"
        )
    if torch.compiler.is_compiling():
        return ops.attention_forward(*CALL.flatten(call))
    return _Attention.apply(call.query, call.key, call.value, call.sinks, call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, call):
        ctx.set_materialize_grads(False)
        out, lse = run_forward(call)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        # Tensors for backward go through save_for_backward, so that hooks may offload them until then.
        ctx.call = call.with_(query=None, key=None, value=None, sinks=None)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_lse):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        call = ctx.call.with_(query=query, key=key, value=value, sinks=sinks)
        return *run_backward(grad, grad_lse, out, lse, call), None


def decode(query: Tensor, key: Tensor, value: Tensor, **rules: Any) -> Tensor:
    """A decode step, ``[B, Sq, H, Dv]``; the rules are those of :class:`AttentionCall`. See :func:`decode_call`."""
    return decode_call(AttentionCall(query, key, value, **rules))


def decode_call(call: AttentionCall) -> Tensor:
    """Attention of 1 to 16 new positions over a cache, without gradients; the rules are those of :func:`attention`.

    ``q_offset`` and ``kv_end`` may be integer tensors on the device, of shape ``[B]`` or with one element. The kernels
    read them there and the grid depends on shapes alone, so a captured CUDA graph (or a StaticCache that fills up)
    replays correctly and skips keys past the end. The visible range of the cache is split evenly (flash-decoding) and
    the parts are merged by log-sum-exp.

    Args:
        call: Sq <= 16; key and value are the whole cache (a StaticCache's full length), of any strides but a last one
            of 1, in bfloat16, float16 or float32. It has no segments.

    Returns:
        ``[B, Sq, H, Dv]``, contiguous. Rows that see no key are zero.

    Raises:
        UsageError: shapes or rules that contradict each other, or more than 16 query positions.
        UnsupportedError: a dtype, head_dim or device the kernels do not take.
    """
    if call.scale is None:
        call = call.with_(scale=call.factor)
    _check_decode(call)
    if torch.compiler.is_compiling():
        return ops.decode(*CALL.flatten(call))
    return run_decode(call)


def _check_decode(call: AttentionCall) -> None:
    check(call.with_(kv_end=None) if isinstance(call.kv_end, Tensor) else call)
    if call.q_segments is not None or call.blocks is not None or (call.window is not None and call.sink_tokens):
        raise UsageError("decode takes no segments, sink tokens or blocks; call attention")
    if call.query.shape[2] > MAX_QUERIES:
        raise UsageError(
            f"decode takes at most {MAX_QUERIES} query positions, not {call.query.shape[2]}; call attention"
        )
    for name, item in (("q_offset", call.q_offset), ("kv_end", call.kv_end)):
        if isinstance(item, Tensor) and (item.numel() not in (1, call.query.shape[0]) or item.is_floating_point()):
            raise UsageError(f"{name} must be an int or an integer tensor with 1 or {call.query.shape[0]} elements")
    reason = unavailable(call.query.device) or refusal(call)
    if reason is not None:
        raise UnsupportedError(f"no decode kernel for this call: {reason}; use attn_implementation='sdpa' or 'eager'")
