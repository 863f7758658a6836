"""The variant ``prune``: fewer query heads, those that the others make up for best."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError, UsageError, first_line
from rehead.models.by_heads import rewrite_heads
from rehead.models.families.parallel import FILE, WINDOW_PREFIX
from rehead.models.heads import Heads
from rehead.models.layout import LayerLayout
from rehead.models.meta import load_report, shapes_of
from rehead.models.model import Model
from rehead.models.rewrite import Changed, LayerForm, NeedsHost, RecoverySettings, Rewrite, unchanged
from rehead.models.rewritten import rewritten
from rehead.variants.contract import ALL, Variant, register
from rehead.variants.layer_choice import is_auto, layers_among, named_layers
from rehead.variants.prune.live import calibrate, redirect
from rehead.variants.prune.options import PruneOptions, check_heads, refusal
from rehead.variants.prune.solve import OUTPUTS, least_needed, without_heads

_BY_LAYER = "its class does not have a number of query heads for each layer"


def _layers(model: Model, options: PruneOptions) -> list[int]:
    if is_auto(options.layers):
        raise UsageError("--variant prune: layers=auto is for live models; name the layers, e.g. layers=0-3")
    return layers_among(options.layers, int(model.config.num_hidden_layers), model.layers)


def _rewrite(model: Model, options: PruneOptions) -> Rewrite:
    """A model with fewer query heads; no weight is read.

    Raises:
        UsageError: more heads than can go, or no such layers.
        UnsupportedError: no class holds what is left, or heads of this model cannot go one by one.
    """
    if not options.heads:
        return unchanged("prune", model.source.config, model.family, model.source.tensors)
    num, kv, count, layers = model.num_heads, model.num_kv_heads, options.heads, _layers(model, options)
    check_heads(count, num, kv)
    if (reason := refusal(model.family, model.config)) is not None:
        raise UnsupportedError(f"{model.config.model_type}: {reason}")
    in_file, separate = str(model.config.model_type).startswith(WINDOW_PREFIX), model.family.packing == "separate"
    if in_file and separate:
        raw = copy.deepcopy(model.source.config)
        others = raw.get("layer_heads") or [None] * int(model.config.num_hidden_layers)
        raw["layer_heads"] = [num - count * kv if layer in layers else other for layer, other in enumerate(others)]
    elif (reason := _BY_LAYER if in_file else _not_in_own_class(model, options)) is None:
        raw = _fewer_everywhere(model, count)
    else:
        ways = "patch the live model" if layers == list(model.layers) else "prune all layers alike"
        said = f"{model.config.model_type}: {reason}, and Rehead has no modelling file for it; {ways}, or another model"
        raise NeedsHost(said, FILE) if separate and not in_file else UnsupportedError(said)

    def closed(layer: int, heads: Heads, moments: Any) -> Changed:
        gram = None if options.by == "weights" else moments[OUTPUTS]
        dropped = least_needed(heads.o, gram, kv, count)
        fewer, order, error = without_heads(heads, dropped, gram)
        return Changed(
            fewer, {"dropped": dropped, **({} if error is None else {"pruned_error": round(error, 6)})}, order
        )

    needs = _needs(options)
    # Chosen and predicted on the original's own text, as on a live model; a refit corrects the layers before. The
    # queries and keys of heads that stay are the original's already.
    settings = RecoverySettings(on_original=True, logits=False)
    form = LayerForm(closed, needs, calibrated=bool(needs), settings=settings)
    return rewrite_heads("prune", model, raw, form, layers, partial(_shapes, kv, count))


def _shapes(kv: int, count: int, layer: int, heads: Heads) -> Heads:
    """A layer without the first ``count`` query heads of each group."""
    size = heads.o.shape[1] // kv
    return without_heads(heads, [group * size + at for group in range(kv) for at in range(count)], None)[0]


def _fewer_everywhere(model: Model, count: int) -> dict[str, Any]:
    """``config.json`` with ``count`` query heads fewer for each KV head, in every layer."""
    raw = copy.deepcopy(model.source.config)
    raw |= {"num_attention_heads": model.num_heads - count * model.num_kv_heads, "head_dim": model.head_dim}
    model.family.set_kv(raw, model.num_kv_heads)
    return raw


def _not_in_own_class(model: Model, options: PruneOptions) -> str | None:
    """Why the model's own class cannot hold what is left; None where it can."""
    import transformers  # noqa: F401 - its own config class knows what it refuses, which its plain numbers do not say

    if _layers(model, options) != list(model.layers):
        return _BY_LAYER
    raw, family = _fewer_everywhere(model, options.heads), model.family
    form = LayerForm(lambda layer, heads, moments: Changed(heads))
    shapes = partial(_shapes, model.num_kv_heads, options.heads)
    try:
        with quiet_transformers():
            result = rewritten(model, rewrite_heads("prune", model, raw, form, model.layers, shapes))
        config = result.config
        counts = family.num_heads(config), family.num_kv_heads(config), family.head_dim(config)
        if counts != (raw["num_attention_heads"], model.num_kv_heads, model.head_dim):
            return "its config cannot say a number of query heads apart from their size"
        mismatched = load_report(config, shapes_of(result.source.stored)).mismatched
    except UnsupportedError as error:
        return f"its class refuses {raw['num_attention_heads']} query heads ({first_line(error)})"
    return f"its class gives {min(mismatched)} a size by the number of query heads" if mismatched else None


def _layout(layer: LayerLayout, options: PruneOptions) -> LayerLayout:
    if options.layers != ALL and layer.index not in named_layers(options.layers):
        return layer
    return replace(layer, num_heads=layer.num_heads - options.heads * layer.num_key_value_heads)


def _needs(options: PruneOptions) -> tuple[str, ...]:
    return (OUTPUTS,) if options.by == "outputs" and options.heads else ()


VARIANT = register(
    Variant(
        name="prune",
        summary="fewer query heads: those go that the others make up for best, in closed form",
        source="Michel et al. 2019, arXiv 1905.10650; the optimal brain surgeon (Hassibi and Stork 1992) by heads",
        options=PruneOptions,
        exact=lambda options: options.heads == 0,
        off=lambda options: options.but(heads=0),
        layout=_layout,
        redirect=redirect,
        calibrate=calibrate,
        rewrite=_rewrite,
        needs=_needs,
    )
)
