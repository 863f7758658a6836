"""Decoders in the style of BART and BERT that compute their own scores, in self- and cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import EncoderDecoderCache

from rehead.attention.adapters.registry import register_adapter
from rehead.attention.interface import tiled_attention
from rehead.errors import UnsupportedError
from rehead.models.modeling.modeling_rehead_cache import either_name

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


def _keys_and_values(
    module: Any, hidden_states: Tensor, key_value_states: Tensor | None, cache: Any, project: Project
) -> tuple[Tensor, Tensor]:
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
    key, value = project(source)
    if cache is not None:
        key, value = own.update(key, value, module.layer_idx)
        if crossing and isinstance(cache, EncoderDecoderCache):
            cache.is_updated[module.layer_idx] = True
    return key, value


@register_adapter("xglm.XGLMAttention", "trocr.TrOCRAttention", "mvp.MvpAttention")
def bart_like(module: nn.Module) -> dict[str, Any]:
    """XGLM, TrOCR and MVP: queries scaled in place of scores, one cache for each kind of attention."""

    @either_name
    def forward(
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if kwargs.get("attn_prompt") is not None:
            raise UnsupportedError(
                "mvp with use_prompt puts learned keys before the tokens; set config.use_prompt=False"
            )
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

        def project(source: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(  # type: ignore[return-value]
                linear(source).view(source.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)
                for linear in (self.k_proj, self.v_proj)
            )

        key, value = _keys_and_values(self, hidden_states, key_value_states, cache, project)
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


@register_adapter(
    "rembert.RemBertSelfAttention", "megatron_bert.MegatronBertSelfAttention", "roformer.RoFormerSelfAttention"
)
def bert_like(module: nn.Module) -> dict[str, Any]:
    """RemBERT, Megatron-BERT and RoFormer: separate projections, RoFormer's rotated where there is no encoder."""

    @either_name
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        sinusoidal_pos: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cache: Any = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)

        query = heads(self.query(hidden_states))

        def project(source: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal query
            key, value = heads(self.key(source)), heads(self.value(source))
            if encoder_hidden_states is None and sinusoidal_pos is not None:
                rotate = self.apply_rotary_position_embeddings
                if self.rotary_value:
                    query, key, value = rotate(sinusoidal_pos, query, key, value)
                else:
                    query, key = rotate(sinusoidal_pos, query, key)
            return key, value

        key, value = _keys_and_values(self, hidden_states, encoder_hidden_states, cache, project)
        out, _ = tiled_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.attention_head_size**-0.5,
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False if attention_mask is None else None,
            output_attentions=output_attentions,
        )
        return out.reshape(*hidden_states.shape[:-1], self.all_head_size), None

    return {"forward": forward}
