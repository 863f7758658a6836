"""The variant ``latent``: keys and values of all heads read out of one small latent per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rehead.errors import UnsupportedError
from rehead.models.families.parallel import WINDOW_PREFIX
from rehead.models.layout import LayerLayout
from rehead.models.model import Model
from rehead.models.rewrite import Rewrite
from rehead.variants.contract import ALL, Variant, register
from rehead.variants.latent.angles import angles_of
from rehead.variants.latent.options import LatentOptions
from rehead.variants.latent.rewrite import check_source, latent, latent_beside, span
from rehead.variants.latent.seen import NEEDS
from rehead.variants.latent.settle import settle
from rehead.variants.layer_choice import named_layers
from rehead.variants.window.classes import FILE, file_refusal


def _rewrite(model: Model, options: LatentOptions) -> Rewrite:
    if options.layers != ALL:
        return latent_beside(model, options)
    angles = angles_of(model)
    return latent(model, settle(options, angles, *span(model)), angles, refits=False, fits=False)


def _host(model: Model, options: LatentOptions, hosts: Sequence[str]) -> str | None:
    """Rehead's modelling file where other layers keep their heads; else the class is a step of its own."""
    if options.layers == ALL or str(model.config.model_type).startswith(WINDOW_PREFIX):
        return None
    check_source(model)
    if (reason := file_refusal(model)) is not None:
        raise UnsupportedError(f"{model.config.model_type}: {reason}; give every layer a latent")
    return FILE


def _layout(layer: LayerLayout, options: LatentOptions) -> LayerLayout:
    """The layer's cache where both sizes are said; the same layer otherwise, and where it is not named."""
    if options.rank is None or options.rope_dims is None:
        return layer
    if options.layers != ALL and layer.index not in named_layers(options.layers):
        return layer
    return replace(
        layer,
        num_key_value_heads=1,
        key_dim=options.rank,
        value_dim=options.rope_dims,
        reads=2 * options.rank + options.rope_dims,
    )


#: Shares of a layer's cache for which latents are offered.
_SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6)


def _library(layer: LayerLayout, context: int) -> list[LatentOptions]:
    """Latents of several sizes, each with all rotary pairs and with half of them, where half the cache holds these."""
    numbers, options = layer.numbers_per_token, []
    for share in _SHARES:
        size = int(numbers * share) // 4 * 4
        fitting = [dims for dims in (layer.key_dim, layer.key_dim // 4 * 2) if 2 <= dims <= size // 2]
        options += [LatentOptions(rank=size - dims, rope_dims=dims) for dims in fitting]
    return options


VARIANT = register(
    Variant(
        name="latent",
        summary="one latent for the keys and values of all heads: multi-head latent attention (MLA)",
        source="DeepSeek-AI 2024, arXiv 2405.04434; converted in closed form",
        options=LatentOptions,
        exact=lambda options: False,
        off=lambda options: options,
        layout=_layout,
        library=_library,
        rewrite=_rewrite,
        host=_host,
        needs=lambda options: NEEDS,
    )
)
