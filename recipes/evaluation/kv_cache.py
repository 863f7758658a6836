"""KV-cache bytes a token: as the config promises, and as a forward pass leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.models.modes import evaluating
from rehead.models.predictions import vocabulary
from rehead.recipes.evaluation import schema

#: Two short contexts; the difference of what they leave behind is what single tokens cost, without states of fixed size
#: (convolutions, recurrences) and below every sliding window.
_SHORT, _LONG = 3, 7


@dataclass(frozen=True)
class MeasuredCache:
    """A model's cache as it is.

    Attributes:
        bytes_per_token: that each further token takes, over all layers.
        heads: KV heads of each layer that keeps keys.
        head_dim: width of a key head in the first of them.
    """

    bytes_per_token: float
    heads: list[int]
    head_dim: int | None


def measure_cache(model: Any) -> MeasuredCache | None:
    """Run a few tokens through a model with its default dynamic cache and look at the tensors.

    Args:
        model: a transformers causal language model.

    Returns:
        None where the model keeps no cache.
    """
    caches = []
    with evaluating(model):
        for length in (_SHORT, _LONG):
            tokens = torch.arange(length, device=next(model.parameters()).device)[None] % vocabulary(model)
            caches.append(getattr(model(input_ids=tokens, use_cache=True), "past_key_values", None))
    if caches[0] is None:
        return None
    short, long = (sum(tensor.nbytes for tensor in _tensors(cache)) for cache in caches)
    keys = [
        layer.keys for layer in getattr(caches[1], "layers", []) if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    keys = [tensor for tensor in keys if tensor.ndim == 4]
    return MeasuredCache(
        (long - short) / (_LONG - _SHORT),
        [int(tensor.shape[1]) for tensor in keys],
        int(keys[0].shape[-1]) if keys else None,
    )


def computed_bytes_per_token(config: Any, itemsize: int) -> float | None:
    """What the config says: keys and values of every attention layer, from the real ``head_dim``.

    Args:
        config: a transformers config.
        itemsize: bytes of a cached number.

    Returns:
        None where the config does not say enough (latent attention, layers of unknown kinds or that differ).
    """
    from rehead.models.families import FAMILIES

    config = config.get_text_config(decoder=True)
    if getattr(config, "per_layer_attributes", None):
        return None
    family = FAMILIES.get(config.model_type)
    if family is not None:
        layers = len(family.attention_layers(config))
        return float(2 * layers * family.num_kv_heads(config) * family.head_dim(config) * itemsize)
    if getattr(config, "kv_lora_rank", None) or getattr(config, "layer_types", None):
        return None
    heads = getattr(config, "num_attention_heads", None)
    kv = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(kv, int) or not isinstance(width, int):
        return None
    head_dim = getattr(config, "head_dim", None) or width // heads
    return float(2 * config.num_hidden_layers * kv * head_dim * itemsize)


def cache_row(who: schema.Who, model: Any, dtype: torch.dtype) -> schema.KVCache:
    """Both figures side by side.

    Args:
        who: the model's part in the comparison.
        model: a transformers causal language model.
        dtype: that a served cache would have, whatever the model is evaluated in: what is counted are its numbers.
    """
    measured = measure_cache(model)
    scale = dtype.itemsize / next(model.parameters()).element_size()
    return schema.KVCache(
        who=who,
        computed_bytes_per_token=computed_bytes_per_token(model.config, dtype.itemsize),
        measured_bytes_per_token=scale * measured.bytes_per_token if measured else None,
        dtype=str(dtype).removeprefix("torch."),
    )


def cache_note(row: schema.KVCache, model_type: str) -> str | None:
    """One line where transformers caches more than the KV heads; None where both figures agree.

    Falcon's class repeats its KV heads for the query heads before it caches them, so sharing heads saves nothing there.
    """
    computed, measured = row.computed_bytes_per_token, row.measured_bytes_per_token
    if not computed or not measured or measured <= computed * 1.005:
        return None
    return (
        f"transformers' {model_type} caches {measured / computed:.3g} times the {row.who}'s KV heads, since it repeats "
        f"them first; an engine that caches them as they are holds {computed:,.0f} bytes a token, not {measured:,.0f}"
    )


def stated_heads(config: Any, cached: list[int]) -> list[int]:
    """KV heads by attention layer: as cached, or as the config has them where every layer caches them repeated.

    Args:
        config: a transformers config.
        cached: heads in each layer's cache.
    """
    from rehead.models.families import FAMILIES

    config = config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    if family is None:
        return cached
    stated = family.num_kv_heads(config)
    repeated = all(heads > stated and heads % stated == 0 for heads in cached)
    return [stated] * len(cached) if repeated else cached


def _tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that an object holds, however deep, once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item, seen)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item, seen)]
    return _tensors(vars(value), seen) if hasattr(value, "__dict__") and not isinstance(value, type) else []
