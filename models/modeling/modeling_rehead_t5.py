"""T5 whose decoder shares KV heads: self- and cross-attention alike, the encoder left alone (arXiv 2305.13245).

A checkpoint contains this file and ``modeling_rehead_core.py``. Everything but the width of the decoder's keys and
values is transformers' own T5, in both of its versions; the relative position bias is added per query head as before.

``ReheadT5Config``, ``ReheadT5ForConditionalGeneration`` and ``GroupedT5Attention`` are made from the installed
transformers on first use: registering them must not import T5, least of all while transformers' auto classes are
themselves being imported.
"""

import functools
from typing import Any

import torch
import transformers
from torch import nn

from .modeling_rehead_cache import either_name
from .modeling_rehead_core import DerivedClasses, named

MODEL_TYPE = "rehead_t5"


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the definition: query ``[B, H, S, D]``, key and value ``[B, K, T, D]``, bias ``[1, H, S, T]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    for term in (position_bias, attention_mask):
        scores = scores if term is None else scores + term
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Grouped:
    """Mixed into T5's attention: fewer KV heads than query heads, for the decoder itself or across to the encoder."""

    # What T5Attention brings.
    config: Any
    q: Any
    k: Any
    v: Any
    o: Any
    n_heads: int
    key_value_proj_dim: int
    dropout: float
    scaling: float
    training: bool
    layer_idx: int
    has_relative_attention_bias: bool
    compute_bias: Any

    @either_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As in T5: ``(output [B, S, d_model], position bias [1, H, S, T], attention weights or None)``."""
        batch, length = hidden_states.shape[:2]
        source, crosses = (hidden_states, False) if key_value_states is None else (key_value_states, True)
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        seen = seen.clone() if isinstance(seen, torch.Tensor) else seen  # a static cache counts it up in place
        query = self._heads(self.q(hidden_states))
        key, value = self._keys_and_values(source, cache, crosses)
        if position_bias is None:
            position_bias = self._bias(query, key.shape[2], seen)
        attend = transformers.AttentionInterface().get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self.o(output.reshape(batch, length, -1).contiguous()), position_bias, weights

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.key_value_proj_dim)).transpose(1, 2)

    def _keys_and_values(self, states: torch.Tensor, cache: Any, crosses: bool) -> tuple[torch.Tensor, torch.Tensor]:
        both = isinstance(cache, transformers.EncoderDecoderCache)
        own = cache
        if both:
            own = cache.cross_attention_cache if crosses else cache.self_attention_cache
        if crosses and both and cache.is_updated.get(self.layer_idx):
            return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        key, value = self._heads(self.k(states)), self._heads(self.v(states))
        if cache is not None:
            key, value = own.update(key, value, self.layer_idx)
            if crosses and both:
                cache.is_updated[self.layer_idx] = True
        return key, value

    def _bias(self, query: torch.Tensor, keys: int, seen: Any) -> torch.Tensor:
        if self.has_relative_attention_bias:
            return self.compute_bias(query.shape[2], keys, device=query.device, past_seen_tokens=seen)
        return query.new_zeros(1, self.n_heads, query.shape[2], keys)


class SharedDecoder:
    """Mixed into T5's text-to-text model: ``config.num_key_value_heads`` KV heads in its decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for block in self.decoder.block:  # type: ignore[attr-defined]
            _share(block.layer[0].SelfAttention, config)
            _share(block.layer[1].EncDecAttention, config)


def _share(attention: Any, config: Any) -> None:
    """Narrow the keys and values of one attention module, in place."""
    heads = int(config.num_key_value_heads or config.num_heads)
    attention.__class__ = _grouped_attention()
    attention.num_key_value_groups = config.num_heads // heads
    for name in ("k", "v"):
        old = getattr(attention, name).weight
        new = nn.Linear(config.d_model, heads * config.d_kv, bias=False, device=old.device, dtype=old.dtype)
        nn.init.normal_(new.weight, std=config.initializer_factor * config.d_model**-0.5)
        setattr(attention, name, new)


@functools.cache
def _grouped_attention() -> Any:
    from transformers.models.t5.modeling_t5 import T5Attention

    return type("GroupedT5Attention", (Grouped, T5Attention), {"__module__": __name__})


def _complete(config: Any) -> None:
    """One KV head for each query head unless the config says otherwise."""
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_heads
    if config.num_key_value_heads < 1 or config.num_heads % config.num_key_value_heads:
        raise ValueError(f"num_key_value_heads {config.num_key_value_heads} must divide num_heads {config.num_heads}")


DERIVED = DerivedClasses(
    module=__name__,
    model_type=MODEL_TYPE,
    config="ReheadT5Config",
    base=lambda: transformers.T5Config,
    fields={"num_key_value_heads": int | None},
    check=_complete,
    models={
        "AutoModelForSeq2SeqLM": (
            "ReheadT5ForConditionalGeneration",
            lambda: (SharedDecoder, transformers.T5ForConditionalGeneration),
        )
    },
)


def __getattr__(name: str) -> Any:
    """Make a class when it is first used (PEP 562)."""
    return _grouped_attention() if name == "GroupedT5Attention" else named([DERIVED], name)


def register() -> None:
    """Register the config with ``AutoConfig``; the model is registered when a config is created."""
    DERIVED.register()
