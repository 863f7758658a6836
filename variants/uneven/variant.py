"""The variant ``uneven``: KV heads shared in groups of unequal size, as many in each layer as it can do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from rehead.counts import Count
from rehead.errors import UnsupportedError, UsageError
from rehead.models.by_heads import tensors_of
from rehead.models.families.parallel import WINDOW_PREFIX
from rehead.models.heads import Heads
from rehead.models.layout import LayerLayout
from rehead.models.model import Model
from rehead.models.modeling import window_families
from rehead.models.rewrite import Changed, Derived, LayerForm, Rewrite, unchanged
from rehead.variants.contract import ALL, Variant, VariantOptions, register
from rehead.variants.layer_choice import layers_among, named_layers
from rehead.variants.pool.regroup import POOL_MOMENTS
from rehead.variants.uneven.solve import OF_KEYS, compressed, share_heads
from rehead.variants.window.classes import FILE

SIZES = "kv_sizes"
"""The tensor of an attention module that says how many query heads read each KV head, [KV heads]."""


class UnevenOptions(VariantOptions):
    """Options of the variant ``uneven``."""

    num_key_value_heads: Count = Field(1, ge=1, description="KV heads of the chosen layers afterwards, any number.")


def _rewrite(model: Model, options: UnevenOptions) -> Rewrite:
    """A model with fewer KV heads in some layers, in the class with Rehead's modelling file; no weight is read.

    Raises:
        UsageError: not fewer heads.
        UnsupportedError: no class holds them.
    """
    count, old = options.num_key_value_heads, model.num_kv_heads
    if count >= old:
        raise UsageError(f"--variant uneven: {count} KV heads are not fewer than the model's {old}; give less")
    layers = layers_among(options.layers, int(model.config.num_hidden_layers), model.layers)
    if (reason := _refusal(model, layers)) is not None:
        raise UnsupportedError(f"{model.config.model_type}: {reason}; use --kv-heads")

    def closed(layer: int, heads: Heads, moments: Any) -> Changed:
        shared, groups = share_heads(heads, count, moments)
        few = compressed(shared, groups)
        facts = {"groups": groups}
        tensors = tensors_of(model.family, layer, few, model.source.tensors)
        sizes = torch.tensor([len(group) * heads.group_size for group in groups], dtype=torch.float32)
        return Changed({**tensors, model.family.prefix(layer) + SIZES: sizes.to(heads.q.device)}, facts)

    start = unchanged("uneven", model.source.config, model.family, model.source.tensors)
    tensors = dict(start.tensors)
    for layer in layers:
        before = model.layer_on_meta(layer)
        kept = {name: tensor[:count] for name in OF_KEYS if (tensor := getattr(before, name)) is not None}
        for name, tensor in tensors_of(model.family, layer, replace(before, **kept), tensors).items():
            tensors[name] = Derived((name,), tuple(tensor.shape), layer=layer)
        first = model.layer_tensors(layer)[0]
        tensors[model.family.prefix(layer) + SIZES] = Derived((first,), (count,), layer=layer, dtype="F32")
    raw = dict(model.source.config)
    # Which heads share is known once text has been read, so the groups' sizes stand in a tensor of the layer.
    others = raw.get("layer_kv_heads") or [None] * int(model.config.num_hidden_layers)
    raw["layer_kv_heads"] = [count if layer in layers else other for layer, other in enumerate(others)]
    form = LayerForm(closed, POOL_MOMENTS, old, calibrated=True)
    return replace(start, config=raw, tensors=tensors, exact=False, layers=tuple(layers), form=form)


def _refusal(model: Model, layers: Sequence[int]) -> str | None:
    kind = str(model.config.model_type).removeprefix(WINDOW_PREFIX)
    if kind not in window_families() or model.family.packing != "separate":
        return "Rehead has no modelling file that holds a number of KV heads for each layer of it"
    if model.layer_on_meta(layers[0]).key_norm != "none":
        return "its keys pass a norm of each head"
    return None


def _host(model: Model, options: UnevenOptions, hosts: Sequence[str]) -> str | None:
    return None if str(model.config.model_type).startswith(WINDOW_PREFIX) else FILE


def _layout(layer: LayerLayout, options: UnevenOptions) -> LayerLayout:
    if options.layers != ALL and layer.index not in named_layers(options.layers):
        return layer
    return layer.with_heads(options.num_key_value_heads)


def _library(layer: LayerLayout, context: int) -> list[UnevenOptions]:
    kv = layer.num_key_value_heads
    return [UnevenOptions(num_key_value_heads=count) for count in range(1, kv)]


VARIANT = register(
    Variant(
        name="uneven",
        summary="KV heads shared in groups of unequal size, another number of them in each layer",
        source="Chen et al. 2024, arXiv 2406.06567 (DHA); groups by Ward's criterion, heads in closed form",
        options=UnevenOptions,
        exact=lambda options: False,
        off=lambda options: options,
        layout=_layout,
        library=_library,
        rewrite=_rewrite,
        host=_host,
        needs=lambda options: POOL_MOMENTS,
    )
)
