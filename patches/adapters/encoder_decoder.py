"""Decoders in the style of BART that compute their own scores: XGLM and TrOCR, self- and cross-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import EncoderDecoderCache

from rehead.patches.adapters import register_adapter
from rehead.patches.interface import tiled_attention


def _keys_and_values(module: Any, hidden_states: Tensor, key_value_states: Tensor | None, cache: Any) -> Any:
    """Keys and values ``[B, H, Skv, D]``, through the cache; cross-attention fills its own cache once."""
    crossing = key_value_states is not None
    own = cache
    updated = False
    if isinstance(cache, EncoderDecoderCache):
        updated = bool(cache.is_updated.get(module.layer_idx))
        own = cache.cross_attention_cache if crossing else cache.self_attention_cache
    if crossing and cache is not None and updated:
        layer = own.layers[module.layer_idx]
        return layer.keys, layer.values
    source = hidden_states if key_value_states is None else key_value_states
    key, value = (
        proj(source).view(source.shape[0], -1, module.num_heads, module.head_dim).transpose(1, 2)
        for proj in (module.k_proj, module.v_proj)
    )
    if cache is not None:
        key, value = own.update(key, value, module.layer_idx)
        if crossing and isinstance(cache, EncoderDecoderCache):
            cache.is_updated[module.layer_idx] = True
    return key, value


@register_adapter("xglm.XGLMAttention", "trocr.TrOCRAttention")
def bart_like(module: nn.Module) -> dict[str, Any]:
    """XGLM and TrOCR: queries scaled in place of scores, one cache for each kind of attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        key, value = _keys_and_values(self, hidden_states, key_value_states, past_key_values)
        out, _ = tiled_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            is_causal=False if attention_mask is None else None,
            output_attentions=output_attentions,
        )
        return self.out_proj(out.reshape(batch, length, self.embed_dim)), None

    return {"forward": forward}
