"""Models that keep their attention in one method, ``_attn(query, key, value, attention_mask)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rehead.attention.adapters.registry import register_adapter
from rehead.attention.interface import tiled_attention
from rehead.attention.mask import TiledMask


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, drop: nn.Module
) -> tuple[Tensor, None]:
    """Tiled attention in the layout of ``_attn``: ``[B, H, Sq, D]`` in and out."""
    # These models keep queries and keys in float32 for their scores; tiles accumulate in float32 anyway.
    query, key = query.to(value.dtype), key.to(value.dtype)
    dropout: Any = drop.p if module.training else 0.0
    out, _ = tiled_attention(module, query, key, value, mask, scaling=scaling, dropout=dropout)
    return out.transpose(1, 2), None


def _own_rule(seen: Tensor, n_query: int, n_key: int, mask: Tensor | None) -> Tensor:
    """A user's own 4-D mask narrowed by a layer's buffer ``[1, 1, S, S]``, which such layers apply to any mask."""
    seen = seen[:, :, n_key - n_query : n_key, :n_key]
    if mask is None:
        return seen
    mask = mask[..., :n_key]
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


@register_adapter("gptj.GPTJAttention", "codegen.CodeGenAttention")
def gptj(module: nn.Module) -> dict[str, Any]:
    """GPT-J and CodeGen: rotary positions, one scale, no window."""

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        return _attend(self, query, key, value, attention_mask, 1.0 / float(self.scale_attn), self.attn_dropout)

    return {"_attn": _attn}


@register_adapter("gpt_neo.GPTNeoSelfAttention")
def gpt_neo(module: nn.Module) -> dict[str, Any]:
    """GPT-Neo: unscaled scores, and a window in every second layer that only its own buffer knows about."""

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        if not isinstance(attention_mask, TiledMask):
            attention_mask = _own_rule(self.bias, query.shape[-2], key.shape[-2], attention_mask)
        elif self.attention_type == "local":
            attention_mask = attention_mask.with_window(self.config.window_size)
        return _attend(self, query, key, value, attention_mask, 1.0, self.attn_dropout)

    return {"_attn": _attn}


@register_adapter("gpt_neox_japanese.GPTNeoXJapaneseAttention")
def gpt_neox_japanese(module: nn.Module) -> dict[str, Any]:
    """GPT-NeoX Japanese: as GPT-J, with its own names."""

    def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
        return _attend(self, query, key, value, attention_mask, 1.0 / float(self.norm_factor), self.attention_dropout)

    return {"_attn": _attn}


@register_adapter("openai.Attention")
def openai_gpt(module: nn.Module) -> dict[str, Any]:
    """GPT-1: causal by a buffer, padding as an additive ``[B, 1, 1, S]``, keys already transposed, no cache."""

    def _attn(
        self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, output_attentions: bool = False
    ) -> Any:
        scaling = q.shape[-1] ** -0.5 if self.scale else 1.0
        dropout = self.attn_dropout.p if self.training else 0.0
        out, _ = tiled_attention(
            self,
            q,
            k.transpose(-1, -2),
            v,
            None,
            scaling=scaling,
            dropout=dropout,
            is_causal=True,
            position_bias=attention_mask,
            output_attentions=output_attentions,
        )
        return [out.transpose(1, 2)]

    return {"_attn": _attn}
