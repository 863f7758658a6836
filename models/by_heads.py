"""A Rewrite that changes the heads of some layers and keeps its class: pooling, and variants made of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rehead.models.families.layouts import GATE, RESIZED_NORMS, merge
from rehead.models.families.spec import Family
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Derived, LayerForm, Read, Rewrite, Step

if TYPE_CHECKING:
    from torch import Tensor


def rewrite_heads(
    name: str,
    model: Model,
    config: dict[str, Any],
    form: LayerForm,
    layers: Sequence[int],
    on_meta: Callable[[int, Heads], Heads],
) -> Rewrite:
    """The Rewrite that changes the heads of some layers; no weight is read.

    Args:
        name: the Rewrite's name.
        model: the model to change.
        config: raw ``config.json`` of the result.
        form: computes a layer's new heads.
        layers: the layers to change.
        on_meta: (layer, heads as shapes) -> heads of the result's shapes; unchanged fields are the same objects.
    """
    tensors = {key: Derived((key,), info.shape) for key, info in model.source.tensors.items()}
    for layer in layers:
        before = model.layer_on_meta(layer)
        after = on_meta(layer, before)
        stems = _changed_stems(model.family, before, after)
        written = tensors_of(model.family, layer, after, model.source.tensors)
        prefix = model.family.prefix(layer)
        for key in model.meta_layer(layer):
            if key not in written:
                if key in model.layer_tensors(layer):  # it belonged to a head that was removed
                    del tensors[key]
            elif any(key.startswith(f"{prefix}{stem}") for stem in stems) or written[key].shape != tensors[key].shape:
                tensors[key] = Derived((key,), tuple(written[key].shape), layer=layer)
    return rewrite_tensors(name, model, config, form, layers, tensors)


def rewrite_tensors(
    name: str,
    model: Model,
    config: dict[str, Any],
    form: LayerForm,
    layers: Sequence[int],
    tensors: dict[str, Derived],
    lean: bool = False,
) -> Rewrite:
    """As :func:`rewrite_heads`, where it is known already which ``tensors`` change and to what shape.

    ``lean``: the form does not use the others, so they need not be read.
    """
    step = None if form.calibrated else _step(model, tensors, form, lean)
    return Rewrite(name, config, model.family, tensors, step, exact=False, layers=tuple(layers), form=form)


def tensors_of(family: Family, layer: int, heads: Heads, like: Mapping[str, Any]) -> dict[str, Tensor]:
    """A layer's tensors by the checkpoint's names, with the norm weights that all heads share.

    Args:
        family: the names and packing to use.
        layer: the layer's index.
        heads: the layer's heads.
        like: the checkpoint's tensors or their headers by name.
    """
    tensors = merge(family, layer, heads, like)
    if heads.key_norm not in RESIZED_NORMS:
        for stem, weight in ((family.names.query_norm, heads.q_norm), (family.names.key_norm, heads.k_norm)):
            name = f"{family.prefix(layer)}{stem}.weight"
            if weight is not None and name in like:
                tensors[name] = weight
    return tensors


def _changed_stems(family: Family, before: Heads, after: Heads) -> set[str]:
    """First parts of the names, below the attention module, of the tensors that differ between two sets of heads."""
    names, apart = family.names, family.packing == "separate"
    stems = {
        "q": names.query,
        "k": names.key if apart else names.query,
        "v": names.value if apart else names.query,
        "o": names.output,
    }
    changed = {
        stem + "."
        for field, stem in stems.items()
        if any(getattr(after, part) is not getattr(before, part) for part in (field, f"{field}_bias"))
    }
    for field, stem in (("q_norm", names.query_norm), ("k_norm", names.key_norm)):
        if getattr(after, field) is not getattr(before, field):
            changed.add(stem + ".")
    for name, tensor in after.extras.items():
        if tensor is not before.extras.get(name):
            changed.add(names.query + "." if name.startswith(GATE) and family.gate_in_query else name)
    return changed


def _step(model: Model, tensors: Mapping[str, Derived], form: LayerForm, lean: bool) -> Step:
    def step(layer: int, read: Read) -> tuple[dict[str, Tensor], dict[str, Any]]:
        inputs = {
            name: shape if lean and name in tensors and not tensors[name].changed else read(name)
            for name, shape in model.meta_layer(layer).items()
        }
        changed = form.closed(layer, model.heads(layer, inputs), None)
        weights = changed.weights
        if isinstance(weights, Heads):
            weights = tensors_of(model.family, layer, weights, model.source.tensors)
        return weights, changed.facts

    return step
