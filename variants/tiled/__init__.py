"""Exact attention in tiles: no S x S memory, KV heads read without repeats; CPU tiles or Triton kernels."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from rehead.attention.call import AttentionCall
from rehead.counts import Length
from rehead.variants.contract import Compute, Variant, VariantOptions, register


class TiledOptions(VariantOptions):
    """Options of the variant ``tiled``."""

    window: Length | None = Field(None, ge=1, description="Also narrow every layer's mask: the variant window.")
    deterministic: bool = Field(False, description="Bitwise repeatable gradients on the GPU, at some cost in speed.")


def attend(call: AttentionCall, options: TiledOptions, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The tiled attention, which is what is below every variant."""
    return compute(call.with_(deterministic=True) if options.deterministic else call)


VARIANT = register(
    Variant(
        name="tiled",
        summary="exact tiled attention (CPU tiles, Triton kernels); option window= makes it approximate",
        source="Dao et al. 2022, arXiv 2205.14135",
        options=TiledOptions,
        exact=lambda options: True,
        off=lambda options: options,
        attend=attend,
        also=lambda options: (
            [] if options.window is None else [("window", {"size": options.window, "layers": options.layers})]
        ),
    )
)
