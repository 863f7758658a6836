"""Models with ALiBi that add it to their own scores (bloom, mpt), and falcon, which has ALiBi or rotary positions.

The bias is used as the model computes it, with its rounding: the biases grow with the position, and the checkpoint was
trained with that rounding. It depends on the key alone (a constant for all scores of a row would not change softmax),
so it stays ``[B, H, 1, Skv]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rehead.attention.adapters.registry import register_adapter
from rehead.attention.interface import tiled_attention
from rehead.attention.layer import LAYER
from rehead.errors import UnsupportedError
from rehead.models.modeling.modeling_rehead_cache import either_name


@register_adapter("bloom.BloomAttention")
def bloom(module: Any) -> dict[str, Any]:
    """BLOOM: alibi ``[B * H, 1, Skv]`` beside the scaled scores."""
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise UnsupportedError(
            "bloom with slow_but_exact and pretraining_tp > 1 splits its output projection; "
            "set config.slow_but_exact to False to patch it"
        )

    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch = hidden_states.shape[0]
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, _ = tiled_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.training else 0.0,
            position_bias=self.beta * alibi.view(batch, self.num_heads, 1, -1),
            output_attentions=output_attentions,
        )
        out = self.dense(out.flatten(2))
        out = nn.functional.dropout(out, p=self.hidden_dropout, training=self.training)
        return residual + out, None

    return {"forward": forward}


@register_adapter("mpt.MptAttention")
def mpt(module: nn.Module) -> dict[str, Any]:
    """MPT: alibi ``[H, 1, max_seq_len]`` that ends at the last position, optional clipping of q, k and v."""

    @either_name
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        cache: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, length = hidden_states.shape[:2]
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            x.reshape(batch, length, self.n_heads, self.head_dim).transpose(1, 2) for x in mixed.chunk(3, dim=2)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        bias = None
        if position_bias is not None:
            n_key = key.shape[2]
            if n_key > position_bias.shape[-1]:
                raise UnsupportedError(
                    f"mpt has {n_key} keys but biases for {position_bias.shape[-1]} positions; raise config.max_seq_len"
                )
            bias = position_bias[None, :, -1:, position_bias.shape[-1] - n_key :].to(query.dtype)
        if isinstance(attention_mask, Tensor):
            # MPT reads a user's own 4-D mask as bool, True where the mask would add something: there it hides.
            attention_mask = ~attention_mask.bool()
        out, _ = tiled_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.softmax_scale,
            dropout=self.attn_dropout_p if self.training else 0.0,
            position_bias=bias,
            output_attentions=kwargs.get("output_attentions", False),
        )
        return self.out_proj(out.flatten(2)), None

    return {"forward": forward}


@register_adapter("falcon.FalconAttention")
def falcon(module: nn.Module) -> dict[str, Any]:
    """Falcon: fused projections of three shapes, rotary positions or ALiBi, and KV heads read without repeats."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch = hidden_states.shape[0]
        query, key, value = _falcon_heads(self, self.query_key_value(hidden_states))
        if alibi is None:
            assert position_embeddings is not None
            cos, sin = (x[:, None] for x in position_embeddings)
            query, key = (x * cos + _rotate_half(x) * sin for x in (query, key))
        if layer_past is not None:
            key, value = _match_cache(layer_past, self.layer_idx, key, value)
            key, value = layer_past.update(key, value, self.layer_idx)
        bias, dropout = None, 0.0
        if alibi is not None:
            bias = alibi.reshape(batch, self.num_heads, 1, alibi.shape[-1]) * self.inv_norm_factor
            dropout = self.attention_dropout.p if self.training else 0.0
            if getattr(self, LAYER).was == "eager":
                raise UnsupportedError(
                    "falcon with ALiBi under 'eager' adds its bias twice in transformers; "
                    "load the model with attn_implementation='sdpa' before patching it"
                )
        out, _ = tiled_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=1.0 / math.sqrt(self.head_dim),
            dropout=dropout,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return self.dense(out.flatten(2)), None

    return {"forward": forward}


def _falcon_heads(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split falcon's fused projection into ``[B, heads, S, D]``, with KV heads not repeated."""
    batch, length, _ = fused.shape
    if module.new_decoder_architecture:
        grouped = fused.view(batch, length, module.num_kv_heads, -1, module.head_dim)
        query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    elif module.multi_query:
        flat = fused.view(batch, length, module.num_heads + 2, module.head_dim)
        query, key, value = flat[..., :-2, :], flat[..., -2:-1, :], flat[..., -1:, :]
    else:
        split = fused.view(batch, length, module.num_heads, 3, module.head_dim)
        query, key, value = split[..., 0, :], split[..., 1, :], split[..., 2, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _match_cache(cache: Any, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat KV heads if the cache was begun by the unpatched layer, which stores repeated heads."""
    layers = getattr(cache, "layers", ())
    stored = layers[index].keys if index < len(layers) else None
    if stored is not None and stored.ndim == 4 and stored.shape[1] != key.shape[1]:
        repeats = stored.shape[1] // key.shape[1]
        return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return key, value


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
