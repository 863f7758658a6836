"""How large a KV cache is: as the config promises, and as transformers' own cache objects hold it, at long contexts.

A window shows only at a context longer than it, and a context of 32,768 tokens takes minutes to read on a CPU. So a
model reads a few tokens, which shows what each layer hands to its cache; then fresh caches of the same classes are
filled with as many tokens of that shape as the context has, on torch's ``meta`` device, where tensors have sizes and no
content. What a cache lets go (a sliding window's old tokens) is let go by its own code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.models import layout
from rehead.models.families.resolve import table_entry
from rehead.models.layout import CONTEXTS, LayerLayout
from rehead.models.live import evaluating
from rehead.models.modeling.modeling_rehead_cache import returned_cache
from rehead.models.positions import position_limit
from rehead.models.predictions import vocabulary
from rehead.recipes import evaluation_schema as schema

#: Two short contexts that are really read; what the second leaves behind in addition is what single tokens cost.
_SHORT, _LONG = 3, 7


@dataclass(frozen=True)
class MeasuredCache:
    """A model's cache as it is, of one sequence.

    Attributes:
        bytes_per_token: that each further token takes over all layers, before any window is full.
        heads: KV heads of each layer that keeps keys.
        head_dim: width of a key head in the first of them.
        layers: what a few tokens left in each layer's cache, and the objects that hold it.
        rest: bytes that stay the same however long the context is (states of recurrent layers).
    """

    bytes_per_token: float
    heads: list[int]
    head_dim: int | None
    layers: list[Any]
    rest: int

    def bytes_at(self, context: int) -> float:
        """Bytes once ``context`` tokens have been read."""
        return self.rest + sum(_filled(layer, context) for layer in self.layers)


def measure_cache(model: Any) -> MeasuredCache | None:
    """Run a few tokens through a model with the cache that it makes itself, and look at the tensors.

    Args:
        model: a transformers causal language model.

    Returns:
        None where the model keeps no cache.
    """
    caches = []
    with evaluating(model):
        for length in (_SHORT, _LONG):
            tokens = torch.arange(length, device=next(model.parameters()).device)[None] % vocabulary(model)
            caches.append(returned_cache(model(input_ids=tokens, use_cache=True)))
    if caches[0] is None:
        return None
    short, long = (sum(tensor.nbytes for tensor in _tensors(cache)) for cache in caches)
    layers = [layer for layer in getattr(caches[1], "layers", []) if _keeps_keys(layer)]
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    slope = (long - short) / (_LONG - _SHORT)
    if not layers:
        # A cache of a class of its own: all that is known is how it grows.
        layers, held = [_Growing(long, slope)], long
    keys = [layer.keys for layer in layers if _keeps_keys(layer)]
    return MeasuredCache(
        slope, [int(tensor.shape[1]) for tensor in keys], int(keys[0].shape[-1]) if keys else None, layers, long - held
    )


@dataclass(frozen=True)
class _Growing:
    """A cache that grows evenly, from what it held after :data:`_LONG` tokens."""

    held: int
    slope: float


def _keeps_keys(layer: Any) -> bool:
    return all(isinstance(part := getattr(layer, name, None), Tensor) and part.ndim == 4 for name in ("keys", "values"))


def _filled(layer: Any, context: int) -> float:
    """Bytes that a layer's cache holds of ``context`` tokens."""
    if isinstance(layer, _Growing):
        return layer.held + layer.slope * (context - _LONG)
    fresh = copy.copy(layer)
    fresh.keys = fresh.values = None
    fresh.is_initialized = False
    if hasattr(fresh, "cumulative_length"):
        fresh.cumulative_length = 0
    # A prompt, then one more token, as in decoding.
    for tokens in (context - 1, 1):
        if tokens:
            fresh.update(*(_like(part, tokens) for part in (layer.keys, layer.values)))
    return fresh.keys.nbytes + fresh.values.nbytes


def _like(stored: Tensor, tokens: int) -> Tensor:
    batch, heads, _, width = stored.shape
    return torch.empty(batch, heads, tokens, width, dtype=stored.dtype, device="meta")


def contexts_of(model: Any) -> list[int]:
    """Contexts to measure at: :data:`CONTEXTS` as far as the model has positions, at least the longest that it has."""
    limit = position_limit(model)
    if limit is None:
        return list(CONTEXTS)
    return [context for context in CONTEXTS if context <= limit] or [limit]


def cache_row(
    who: schema.Who,
    model: Any,
    dtype: torch.dtype,
    layers: Sequence[LayerLayout] | None = None,
) -> schema.KVCache:
    """Both figures side by side, at the contexts of :func:`contexts_of`.

    Args:
        who: the model's part in the comparison.
        model: a transformers causal language model.
        dtype: that a served cache would have, whatever the model is evaluated in: what is counted are its numbers.
        layers: what each layer caches, where that is known.
    """
    measured = measure_cache(model)
    scale = dtype.itemsize / next(model.parameters()).element_size()
    sizes = [
        schema.CacheSize(
            context=context,
            computed_bytes=layout.cache_bytes(layers, context) if layers is not None else None,
            measured_bytes=scale * measured.bytes_at(context) if measured else None,
        )
        for context in contexts_of(model)
    ]
    return schema.KVCache(
        who=who,
        computed_bytes_per_token=layout.bytes_per_token(layers) if layers is not None else None,
        measured_bytes_per_token=scale * measured.bytes_per_token if measured else None,
        dtype=str(dtype).removeprefix("torch."),
        sizes=sizes,
    )


def cache_note(row: schema.KVCache, model_type: str) -> str | None:
    """One line where transformers caches more than the layers need; None where both figures agree.

    Falcon's class repeats its KV heads for the query heads before it caches them, so sharing heads saves nothing there.
    """
    computed, measured = row.computed_bytes_per_token, row.measured_bytes_per_token
    if not computed or not measured:
        return None
    if measured <= computed * 1.005:
        last = row.sizes[-1] if row.sizes else None
        if last is None or not last.computed_bytes or (last.measured_bytes or 0) <= last.computed_bytes * 1.005:
            return None
        return (
            f"the {row.who}'s cache in transformers keeps what its layers no longer read: {last.measured_bytes:,.0f} "
            f"bytes at {last.context:,} tokens, where a cache made for them holds {last.computed_bytes:,.0f}"
        )
    return (
        f"transformers' {model_type} caches {measured / computed:.3g} times the {row.who}'s KV heads, since it repeats "
        f"them first; an engine that caches them as they are holds {computed:,.0f} bytes per token, not {measured:,.0f}"
    )


def stated_heads(config: Any, cached: list[int]) -> list[int]:
    """KV heads by attention layer: as cached, or as the config has them where every layer caches them repeated.

    Args:
        config: a transformers config.
        cached: heads in each layer's cache.
    """
    config = config.get_text_config(decoder=True)
    family = table_entry(config)
    if family is None:
        return cached
    stated = family.num_kv_heads(config)
    repeated = all(heads > stated and heads % stated == 0 for heads in cached)
    return [stated] * len(cached) if repeated else cached


def _tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that an object holds, however deep, once; not the counters of a cache, which have no dimension."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item, seen)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item, seen)]
    return _tensors(vars(value), seen) if hasattr(value, "__dict__") and not isinstance(value, type) else []
