"""A window over the keys, and the first tokens of the sequence kept beside it (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from rehead.attention.call import AttentionCall
from rehead.models.layout import LayerLayout
from rehead.options import Count
from rehead.variants.contract import Compute, Variant, VariantOptions, register

UNLIMITED = 1 << 30
"""A window that no text is as long as."""


class WindowOptions(VariantOptions):
    """Options of the variant ``window``."""

    size: Count = Field(4096, ge=1, description="Last keys that a row sees, its own included.")
    sinks: Count = Field(0, ge=0, description="First tokens of a sequence that stay visible beyond the window.")


def attend(call: AttentionCall, options: WindowOptions, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The layer's attention with its mask narrowed; a layer whose own window is narrower keeps it."""
    return compute(call.narrowed(options.size, options.sinks))


def layout(layer: LayerLayout, options: WindowOptions) -> LayerLayout:
    """A layer that keeps the window and the sinks, unless its own window is narrower."""
    if layer.window is not None:
        return replace(layer, window=min(layer.window, options.size), sinks=0)
    return replace(layer, window=options.size, sinks=options.sinks)


VARIANT = register(
    Variant(
        name="window",
        summary="each row sees the last size= keys and the first sinks= tokens (approximate)",
        source="Xiao et al. 2023, arXiv 2309.17453; Beltagy et al. 2020, arXiv 2004.05150",
        options=WindowOptions,
        exact=lambda options: options.size >= UNLIMITED,
        off=lambda options: options.but(size=UNLIMITED),
        ablated=lambda options: options.but(sinks=0) if options.sinks else None,
        layout=layout,
        attend=attend,
        reach=lambda options: options.size,
    )
)
