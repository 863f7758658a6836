"""Fewer KV heads in a checkpoint: the Rewrite, and a layer's step from its weights alone."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from rehead.errors import UnsupportedError, UsageError
from rehead.models.config import resolve_config
from rehead.models.families.layouts import merge
from rehead.models.model import Model
from rehead.models.rewrite import Derived, Read, Rewrite, Step
from rehead.variants.pool.methods.mean import mean
from rehead.variants.pool.methods.registry import MethodContext, get_method
from rehead.variants.pool.regroup import regroup

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
    tensors = {name: Derived((name,), info.shape) for name, info in model.source.tensors.items()}
    for layer in model.layers:
        after = merge(model.family, layer, mean(model.layer_on_meta(layer), kv, MethodContext()), tensors)
        for name in model.layer_tensors(layer):
            if name not in after:  # it belonged to a head that is gone
                del tensors[name]
            elif _moves(model, method, grouping, layer, name) or tuple(after[name].shape) != tensors[name].shape:
                tensors[name] = Derived((name,), tuple(after[name].shape), layer=layer)
    calibrated = get_method(method).needs_calibration
    step = None if calibrated else _step(model, tensors, kv, method, grouping, seed)
    return Rewrite("pool", raw, model.family, tensors, step, exact=False, layers=tuple(model.layers))


def check_count(model: Model, kv: int) -> None:
    """Raise UsageError where a model cannot be pooled into ``kv`` KV heads; its own number is fine."""
    old = model.num_kv_heads
    divisors = ", ".join(str(d) for d in range(1, old + 1) if old % d == 0)
    if kv > old:
        raise UsageError(f"--kv-heads {kv}: the model has {old} KV heads and pooling cannot add any; choose {divisors}")
    if old % kv:
        raise UsageError(f"--kv-heads {kv}: does not divide the model's {old} KV heads; choose {divisors}")


def _step(model: Model, tensors: dict[str, Derived], kv: int, method: str, grouping: str, seed: int) -> Step:
    # What the method leaves alone is copied as bytes and need not be read, but for norm weights that all heads share:
    # they bound what may be rotated.
    everything = method not in KV_ONLY or grouping != "contiguous"
    spread = getattr(model.config, "initializer_range", 0.02) or 0.02

    def step(layer: int, read: Read) -> tuple[dict[str, Tensor], dict[str, Any]]:
        shapes = model.meta_layer(layer)
        needed = {
            name: read(name) if everything or name not in tensors or tensors[name].changed else shape
            for name, shape in shapes.items()
        }
        context = MethodContext(layer, seed, None, spread)
        result = regroup(model.heads(layer, needed), kv, method, grouping, context)
        return merge(model.family, layer, result.heads, model.source.tensors), result.as_json()

    return step


def _moves(model: Model, method: str, grouping: str, layer: int, name: str) -> bool:
    """Whether a tensor's values change even where its shape may not (first and mean rewrite keys and values only)."""
    names, stem = model.family.names, name.removeprefix(model.family.prefix(layer)).rsplit(".", 1)[0]
    if stem in (names.key, names.value, names.key_norm) or stem.startswith(names.key_norm + "."):
        return True
    if model.family.packing != "separate" and stem == names.query:
        return True
    return method not in KV_ONLY or grouping != "contiguous"
