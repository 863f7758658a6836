"""A variant as a step of a conversion: what ``--variant NAME:key=value`` asks for, as a Rewrite."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.convert.hosts import window_hosts
from rehead.errors import UsageError
from rehead.models.by_heads import rewrite_heads
from rehead.models.families.parallel import FILE
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, LayerForm, Rewrite
from rehead.variants.contract import VARIANTS, Variant
from rehead.variants.layer_choice import is_auto, layers_among

if TYPE_CHECKING:
    from rehead.convert.options import ConvertOptions


def variant_rewrite(model: Model, variant: Variant, options: Any) -> Rewrite:
    """A model with a variant; no weight is read.

    Raises:
        UsageError: its options do not fit the model.
        UnsupportedError: the model cannot have it.
    """
    rewrite = variant.rewrite(model, options) if variant.rewrite else by_weights(model, variant, options)
    return replace(rewrite, name=variant.name, facts=rewrite.facts | {"options": options.as_json()})


def by_weights(model: Model, variant: Variant, options: Any) -> Rewrite:
    """A variant that its ``weights`` alone put into the model's own class."""
    change, needs = variant.weights, variant.needs(options)
    assert change is not None
    if is_auto(options.layers):
        raise UsageError(f"--variant {variant.name}: layers=auto is for live models; name the layers, e.g. layers=0-3")

    def closed(layer: int, heads: Heads, moments: Any) -> Changed:
        return Changed(change(heads, options, moments))

    layers = layers_among(options.layers, int(model.config.num_hidden_layers), model.layers)
    rewrite = rewrite_heads(
        variant.name,
        model,
        model.source.config,
        LayerForm(closed, needs, model.num_kv_heads, bool(needs)),
        layers,
        lambda layer, heads: change(heads, options, None),
    )
    return replace(rewrite, exact=variant.exact(options), rounds=True)


def check_lengths(model: Model, options: ConvertOptions) -> None:
    """Refuse calibration text that hardly shows what a window hides."""
    lengths = options.lengths_within(getattr(model.config, "max_position_embeddings", None))
    measured = options.needs_calibration or is_auto(options.layers)
    if options.window is not None and measured and max(lengths) < 4 * options.window:
        raise UsageError(
            f"--window {options.window}: calibration sequences of {max(lengths)} tokens hardly show what it hides; "
            f"give --calibration-length {4 * options.window} or more, or a smaller window"
        )


def host_for(model: Model, options: ConvertOptions) -> str | None:
    """The class that must stand in for a model's own, so that variants can be held.

    Rehead's modelling file where any variant asks for it: it holds windows too, which another class may hold alone.
    """
    asks = options.asked_variants
    by_layer = any(variant.name in ("window", "context") for variant, _ in asks)
    hosts = window_hosts(model) if by_layer else []
    names = [name for variant, asked in asks if (name := variant.host(model, asked, hosts)) is not None]
    return FILE if FILE in names else next(iter(names), None)


def describe_variants() -> list[dict[str, Any]]:
    """Every variant: its name, what it is, where it comes from, its options, and where it can go."""
    rows = []
    for name in VARIANTS.names():
        variant = VARIANTS.get(name)
        fields = variant.options.model_fields
        rows.append(
            {
                "name": name,
                "summary": variant.summary,
                "source": variant.source,
                "exact": bool(variant.exact(variant.options())),
                "live": variant.attend is not None or variant.redirect is not None,
                "saved": variant.weights is not None or variant.rewrite is not None,
                "options": {key: field.description or "" for key, field in fields.items()},
            }
        )
    return rows
