"""What each layer of a checkpoint caches, read off its config."""

from __future__ import annotations

from typing import Any

from rehead.models.families import FAMILIES
from rehead.models.layout import LayerLayout


def config_layouts(config: Any, itemsize: int = 2) -> list[LayerLayout] | None:
    """The layout of every layer with attention that keeps its own keys and values.

    Args:
        config: a transformers config.
        itemsize: bytes of a cached number.

    Returns:
        None where the config does not say enough: latent attention, unknown kinds of layers, layers that differ.
    """
    config = config.get_text_config(decoder=True)
    if getattr(config, "per_layer_attributes", None) or getattr(config, "num_kv_shared_layers", None):
        return None
    family = FAMILIES.get(config.model_type)
    query: Any
    if family is not None:
        indices = family.attention_layers(config)
        query, kv, width = family.num_heads(config), family.num_kv_heads(config), family.head_dim(config)
    else:
        if getattr(config, "kv_lora_rank", None) or getattr(config, "layer_types", None):
            return None
        query, size = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
        kv = getattr(config, "num_key_value_heads", None) or query
        if not isinstance(query, int) or not isinstance(kv, int) or not isinstance(size, int):
            return None
        width, indices = getattr(config, "head_dim", None) or size // query, list(range(config.num_hidden_layers))
    return [LayerLayout(i, query, kv, width, width, window=layer_window(config, i), itemsize=itemsize) for i in indices]


def layer_window(config: Any, index: int) -> int | None:
    """How many tokens back a layer sees, itself included, by its config; None for all."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if types is None:
        return window if isinstance(window, int) else chunk if isinstance(chunk, int) else None
    extent = {"sliding_attention": window, "chunked_attention": chunk}.get(types[index])
    return extent if isinstance(extent, int) else None
