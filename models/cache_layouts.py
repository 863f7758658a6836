"""What each layer of a model caches, read from its config."""

from __future__ import annotations

from typing import Any

from rehead.models.families.resolve import table_entry
from rehead.models.families.spec import Family
from rehead.models.layout import LayerLayout


def config_layouts(config: Any, itemsize: int = 2) -> list[LayerLayout] | None:
    """The layout of every attention layer that caches its own keys and values.

    Args:
        config: a transformers config.
        itemsize: bytes per cached number.

    Returns:
        None where the config is not enough to tell: unknown kinds of layers, layers that differ.
    """
    config = config.get_text_config(decoder=True)
    if getattr(config, "per_layer_attributes", None) or getattr(config, "num_kv_shared_layers", None):
        return None
    family = table_entry(config)
    if family is not None:
        return [layer_layout(family, config, layer, itemsize) for layer in family.attention_layers(config)]
    layers: Any = getattr(config, "num_hidden_layers", None)
    numbers = [getattr(config, name, None) for name in ("num_attention_heads", "hidden_size")]
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention"} or not all(isinstance(number, int) for number in (layers, *numbers)):
        return None
    return [layer_layout(Family(config.model_type), config, layer, itemsize) for layer in range(layers)]


def layer_layout(family: Family, config: Any, layer: int, itemsize: int = 2) -> LayerLayout:
    """What one attention layer caches.

    Args:
        family: reads the numbers of heads and their size from the config.
        config: the decoder's config.
        layer: an index of :meth:`Family.attention_layers`.
        itemsize: bytes per cached number.
    """
    rank, turning = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
    if (latent := _of_layer(config, "layer_latents", layer)) is not None:
        rank, turning = latent["rank"], 2 * len(latent["pairs"])
    if rank:  # multi-head latent attention: the latent as keys, the rotated key that all heads share as values
        kv, key, value = 1, int(rank), int(turning or 0)
        reads = 2 * key + value
    else:
        kv = _of_layer(config, "layer_kv_heads", layer) or family.num_kv_heads(config)
        key = value = family.head_dim(config)
        reads = None
    window = None if getattr(config, "is_encoder_decoder", False) else layer_window(config, layer)
    sinks = int(getattr(config, "sink_tokens", None) or 0) if window is not None else 0
    heads = _of_layer(config, "layer_heads", layer) or family.num_heads(config)
    return LayerLayout(layer, heads, kv, key, value, window, sinks, itemsize=itemsize, reads=reads)


def _of_layer(config: Any, name: str, layer: int) -> Any:
    """What the config of one of Rehead's modelling files says of a layer alone; None where it says nothing."""
    entries = getattr(config, name, None)
    return entries[layer] if entries else None


def layer_window(config: Any, index: int) -> int | None:
    """The layer's window by the config: how many tokens a query sees, its own included; None for all."""
    own = getattr(config, "layer_windows", None)
    if own is not None:  # a modelling file of Rehead's
        return own[index]  # type: ignore[no-any-return]
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if types is None:
        return window if isinstance(window, int) else chunk if isinstance(chunk, int) else None
    extent = window if "sliding" in types[index] else chunk if "chunked" in types[index] else None
    return extent if isinstance(extent, int) else None
