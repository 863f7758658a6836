"""Fewer KV heads in a checkpoint: the Rewrite, and a layer's step from its weights alone."""

from __future__ import annotations

import copy

from rehead.errors import UnsupportedError, UsageError
from rehead.healing.job import query_order
from rehead.healing.moments import Moments
from rehead.models.by_heads import rewrite_tensors
from rehead.models.config import resolve_config
from rehead.models.families.layouts import head_shapes
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, Derived, LayerForm, Rewrite
from rehead.variants.pool.methods.registry import METHODS, MethodContext
from rehead.variants.pool.regroup import POOL_MOMENTS, regroup

#: Methods that leave queries and the output projection alone.
KV_ONLY = ("mean", "first", "random")


def pool(model: Model, kv: int, method: str = "mean", grouping: str = "contiguous", seed: int = 0) -> Rewrite:
    """A model with ``kv`` KV heads in every layer; no weight is read.

    Args:
        kv: a divisor of the model's KV heads, and fewer.
        method: a registered method.
        grouping: ``"contiguous"`` or ``"similar"``.
        seed: of what ``random`` draws.

    Raises:
        UsageError: ``kv`` does not divide the model's KV heads, or exceeds it.
        UnsupportedError: the model's class cannot hold the result.
    """
    check_count(model, kv)
    name = model.source.id
    if reason := model.family.refusal(model.config, kv):
        raise UnsupportedError(f"{name}: {reason}")
    if getattr(model.config, "is_encoder_decoder", False) and grouping != "contiguous":
        raise UnsupportedError(
            f"{model.config.model_type}: its layers share a position bias by query head, so heads cannot change "
            "places; use --grouping contiguous"
        )
    raw = copy.deepcopy(model.source.config)
    model.family.set_kv(raw, kv)
    if model.family.num_kv_heads(resolve_config(raw, name)) != kv:
        raise UnsupportedError(
            f"{name}: {model.config.model_type}'s config cannot say {kv} KV heads; choose another number"
        )
    everything = method not in KV_ONLY or grouping != "contiguous"

    infos, names = model.source.tensors, model.family.names
    keys = (names.query,) if model.family.packing != "separate" else (names.key, names.value)
    tensors = {key: Derived((key,), info.shape) for key, info in infos.items()}
    for layer in model.layers:
        shapes = head_shapes(model.family, model.config, layer, infos, kv)
        starts = tuple(f"{model.family.prefix(layer)}{stem}." for stem in (*keys, names.key_norm))
        for tensor in model.layer_tensors(layer):
            if tensor not in shapes:  # it belonged to a head that is gone
                del tensors[tensor]
            elif everything or tensor.startswith(starts):
                tensors[tensor] = Derived((tensor,), shapes[tensor], layer=layer)
    form = pool_form(model, kv, method, grouping, seed)
    return rewrite_tensors("pool", model, raw, form, model.layers, tensors, lean=not everything)


def pool_form(model: Model, kv: int, method: str, grouping: str, seed: int) -> LayerForm:
    """What pooling makes of one layer's heads."""
    spread = getattr(model.config, "initializer_range", None) or 0.02
    alike = grouping != "contiguous"
    calibrated = METHODS.get(method).needs_calibration

    def closed(layer: int, heads: Heads, moments: Moments | None) -> Changed:
        result = regroup(heads, kv, method, grouping, MethodContext(layer, seed, moments, spread))
        order = query_order(result.groups, heads.group_size) if alike else None
        return Changed(result.heads, result.as_json(), order)

    needs = POOL_MOMENTS if calibrated or alike else ()
    return LayerForm(closed, needs, model.num_kv_heads if alike else kv, calibrated)


def check_count(model: Model, kv: int) -> None:
    """Raise UsageError where a model cannot be pooled into ``kv`` KV heads; its own number is fine."""
    old = model.num_kv_heads
    divisors = ", ".join(str(d) for d in range(1, old + 1) if old % d == 0)
    if kv > old:
        raise UsageError(f"--kv-heads {kv}: the model has {old} KV heads and pooling cannot add any; choose {divisors}")
    if old % kv:
        raise UsageError(f"--kv-heads {kv}: does not divide the model's {old} KV heads; choose {divisors}")
