"""The variant ``latent``: keys and values of all heads read out of one small latent per token."""

from __future__ import annotations

from dataclasses import replace

from rehead.models.layout import LayerLayout
from rehead.models.model import Model
from rehead.models.rewrite import Rewrite
from rehead.variants.contract import Variant, register
from rehead.variants.latent.angles import angles_of
from rehead.variants.latent.options import LatentOptions
from rehead.variants.latent.rewrite import latent, span
from rehead.variants.latent.seen import NEEDS
from rehead.variants.latent.settle import settle


def _rewrite(model: Model, options: LatentOptions) -> Rewrite:
    angles = angles_of(model)
    return latent(model, settle(options, angles, *span(model)), angles, refits=False)


def _layout(layer: LayerLayout, options: LatentOptions) -> LayerLayout:
    """The layer's cache where both sizes are said; the same layer otherwise."""
    if options.rank is None or options.rope_dims is None:
        return layer
    return replace(layer, num_key_value_heads=1, key_dim=options.rank, value_dim=options.rope_dims)


VARIANT = register(
    Variant(
        name="latent",
        summary="one latent for the keys and values of all heads: multi-head latent attention (MLA)",
        source="DeepSeek-AI 2024, arXiv 2405.04434; converted in closed form",
        options=LatentOptions,
        exact=lambda options: False,
        off=lambda options: options,
        layout=_layout,
        rewrite=_rewrite,
        needs=lambda options: NEEDS,
    )
)
