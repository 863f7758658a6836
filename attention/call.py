"""One call of attention: its tensors and all rules for which keys a query sees and how they are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rehead.attention.blocks import KeyBlocks
from rehead.attention.schema import Flat
from rehead.errors import UnsupportedError, UsageError


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """softmax(scale q k^T) v, with grouped heads, masks described by a few numbers, and additions to the scores.

    Row i is at position ``i + q_offset``, key j at position j. A row sees a key if every rule allows it; the output of
    a row that sees no key is 0. The operators' schemas list the fields in this order (:mod:`rehead.attention.schema`).

    A hidden key has a score of -inf, so its weight is exactly 0. softmax(q k^T * M) with M of zeros and ones, which
    papers write for a mask M, is something else: a masked key gets the score 0 and keeps the weight e^0.

    Attributes:
        query: ``[B, H, Sq, D]``.
        key: ``[B, K, Skv, D]``; K divides H, and head h reads KV head ``h // (H // K)``.
        value: ``[B, K, Skv, Dv]``; Dv may differ from D.
        scale: factor of the scores; ``D ** -0.5`` if None.
        causal: a row sees key j only if ``j <= position``.
        q_offset: position of the first row: an int or an integer tensor of one element (of ``[B]`` in a decode step).
        window: a row sees key j only if ``position - j < window``.
        sink_tokens: number of first tokens of a sequence that are also seen from beyond the window.
        chunk: a row sees key j only if ``position // chunk == j // chunk``.
        kv_start, kv_end: integer ``[B]``; keys outside ``[kv_start, kv_end)`` are hidden. A decode step also takes
            ``kv_end`` as an int or a tensor of one element.
        key_mask: bool ``[B, Skv]``, False hides a key.
        q_segments, kv_segments: integer ``[B, Sq]`` and ``[B, Skv]``; a row sees keys of its own segment only.
        blocks: for each block of rows the blocks of keys that it may see.
        softcap: scores become ``softcap * tanh(score / softcap)``, after scaling.
        alibi_slopes: float ``[H]``; ``slope * (j - position)`` is added to the scores (arXiv 2108.12409).
        sinks: float ``[H]``; one more logit per head in the softmax's denominator, with a gradient.
        bias: added to the scores, broadcastable to ``[B, H, Sq, Skv]``; a bool bias hides where it is False.
        deterministic: a GPU backward that is the same bit for bit from run to run, slower on Hopper.
        key_tail: ``[B, K, Skv, E]``, the last columns of keys that are stored in two parts; the query has E more than
            ``key``, and ``value`` is ``key`` itself (latent attention: latents, and a rotated key beside them).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    causal: bool = True
    q_offset: int | Tensor = 0
    window: int | None = None
    sink_tokens: int = 0
    chunk: int | None = None
    kv_start: Tensor | None = None
    kv_end: int | Tensor | None = None
    key_mask: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    blocks: KeyBlocks | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    deterministic: bool = False
    key_tail: Tensor | None = None

    @property
    def factor(self) -> float:
        """The factor of the scores."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)

    @property
    def offset(self) -> int:
        """``q_offset`` as an int; only for calls that are not decode steps."""
        assert not isinstance(self.q_offset, Tensor)
        return self.q_offset

    @property
    def ends(self) -> Tensor | None:
        """``kv_end`` as a tensor ``[B]`` or None; only for calls that are not decode steps."""
        assert not isinstance(self.kv_end, int)
        return self.kv_end

    @property
    def positional_only(self) -> bool:
        """Whether causality, window, key range and blocks decide what is seen, and nothing is added to the scores."""
        extra = (self.chunk, self.key_mask, self.q_segments, self.softcap, self.alibi_slopes, self.bias)
        return all(item is None for item in extra)

    def with_(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def with_int_offset(self) -> AttentionCall:
        """The same with a ``q_offset`` that is an int; one in a tensor is read from its device."""
        return self.with_(q_offset=int(self.q_offset)) if isinstance(self.q_offset, Tensor) else self

    def joined(self) -> AttentionCall:
        """The same with keys in one part. Its values have the tail's columns too, which the caller cuts off."""
        if self.key_tail is None:
            return self
        whole = torch.cat([self.key, self.key_tail], -1)
        return self.with_(key=whole, value=whole, key_tail=None)

    def narrowed(self, window: int, sink_tokens: int = 0) -> AttentionCall:
        """A copy with a window of at most ``window``; a call that is not causal is returned unchanged.

        A call with a window of its own gets no sink tokens but its own, since it never sees beyond that window.

        Raises:
            UnsupportedError: the mask is a tensor of values, which cannot take a window.
        """
        if not self.causal:
            if self.bias is None:
                return self
            raise UnsupportedError(
                "a window cannot be added to a mask of values (a 4-D one of your own, or that of a model whose layers "
                "read it); drop the window option"
            )
        if self.window is not None:
            sinks = min(self.sink_tokens, sink_tokens)
            return self if self.window <= window else self.with_(window=window, sink_tokens=sinks)
        return self.with_(window=window, sink_tokens=sink_tokens)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(int(size)) for size in tensor.shape)


def check(call: AttentionCall) -> None:
    """Raise :class:`UsageError` if the arguments contradict each other; unsupported ones are not checked here."""
    query, key, value = call.query, call.key, call.value
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise UsageError("attention needs query, key and value of four dimensions, [batch, heads, sequence, head_dim]")
    batch, heads, num_q, dim = query.shape
    kv_heads, num_k = key.shape[1], key.shape[2]
    if call.key_tail is not None:
        if call.key_tail.shape[:3] != key.shape[:3] or value.shape != key.shape:
            raise UsageError(
                f"shapes disagree: key {_shape(key)}, its tail {_shape(call.key_tail)}, value {_shape(value)}"
            )
        dim -= call.key_tail.shape[3]
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3] or key.shape[3] != dim:
        raise UsageError(f"shapes disagree: query {_shape(query)}, key {_shape(key)}, value {_shape(value)}")
    if kv_heads == 0 or heads % kv_heads:
        raise UsageError(
            f"{heads} query heads cannot share {kv_heads} KV heads; the first must be a multiple of the second"
        )
    check_rules(call)
    if call.bias is not None:
        shape = tuple(call.bias.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != (num_q, num_k):
            raise UsageError(f"bias has shape {_shape(call.bias)}; it must be [B or 1, H or 1, {num_q}, {num_k}]")


def check_rules(call: AttentionCall) -> None:
    """Raise :class:`UsageError` for extents that are not positive and tensors of a wrong shape or a mask not bool."""
    batch, heads, num_q, _ = call.query.shape
    num_k = call.key.shape[2]
    for name, extent in (("window", call.window), ("chunk", call.chunk), ("softcap", call.softcap)):
        if extent is not None and extent <= 0:
            raise UsageError(f"{name} is {extent}; give a positive number or None")
    if call.sink_tokens < 0:
        raise UsageError(f"sink_tokens is {call.sink_tokens}; give 0 or a positive number")
    if (call.q_segments is None) != (call.kv_segments is None):
        raise UsageError("q_segments and kv_segments go together; give both or neither")
    if call.blocks is not None:
        call.blocks.check_shape(num_q, num_k)
        listed = call.blocks.starts.shape
        if listed[0] not in (1, batch) or listed[1] not in (1, heads):
            raise UsageError(
                f"block starts are for {listed[0]} batch rows and {listed[1]} heads; the call has {batch} and {heads}"
            )
    if call.key_mask is not None and call.key_mask.dtype != torch.bool:
        # A mask of integers or floats may mean that 0 hides a key, or that 0 is added to its score.
        raise UsageError(f"key_mask has dtype {call.key_mask.dtype}; it must be bool, True where a key may be seen")
    for name, tensor, shape in (
        ("kv_start", call.kv_start, (batch,)),
        ("kv_end", call.kv_end, (batch,)),
        ("key_mask", call.key_mask, (batch, num_k)),
        ("q_segments", call.q_segments, (batch, num_q)),
        ("kv_segments", call.kv_segments, (batch, num_k)),
        ("alibi_slopes", call.alibi_slopes, (heads,)),
        ("sinks", call.sinks, (heads,)),
    ):
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has shape {_shape(tensor)}; it must be {'x'.join(map(str, shape))}")


CALL = Flat(AttentionCall)
"""Converts a call to the operators' arguments and back."""
