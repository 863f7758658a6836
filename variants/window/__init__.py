"""A window over the keys, and the first tokens of the sequence kept beside it (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from rehead.attention.call import AttentionCall
from rehead.counts import LONGEST, Length
from rehead.models.layout import LayerLayout
from rehead.variants.contract import ALL, AUTO, Compute, Variant, VariantOptions, register
from rehead.variants.layer_choice import parse_layers
from rehead.variants.window.classes import OFF

if TYPE_CHECKING:
    from rehead.models.model import Model
    from rehead.models.rewrite import Rewrite
    from rehead.models.undo import UndoLog
    from rehead.variants.stack import LiveVariant


class WindowOptions(VariantOptions):
    """Options of the variant ``window``."""

    size: Length = Field(4096, ge=1, description="Last keys that a row sees, its own included.")
    sinks: Length = Field(0, ge=0, description="First tokens of a sequence that stay visible beyond the window.")
    sink_logit: bool = Field(
        False, description="Give each head a logit for what the window hides, fitted to calibration text."
    )

    def indices(self, count: int) -> list[int]:
        """The layers that are named, of a model of ``count``."""
        return parse_layers(self.layers, count)

    def narrowed(self, layer: LayerLayout) -> LayerLayout:
        """A layer that keeps the window and the sinks, unless its own window is narrower or it is not named.

        A layer with a wider window of its own has no more sinks than before: it never saw beyond that window.
        """
        named = self.layers in (ALL, AUTO) or layer.index in self.indices(1 << 20)
        if not named or (layer.window is not None and layer.window <= self.size):
            return layer
        sinks = self.sinks if layer.window is None else min(layer.sinks, self.sinks)
        return replace(layer, window=self.size, sinks=sinks)

    def moments(self) -> tuple[str, ...]:
        """What calibration collects, to fit the sink logits where there are any."""
        return (f"sink_logit:{self.size}:{self.sinks}",) if self.sink_logit else ()


def attend(call: AttentionCall, options: WindowOptions, state: Mapping[str, Tensor], compute: Compute) -> Tensor:
    """The layer's attention with its mask narrowed; a layer whose own window is narrower keeps it."""
    narrowed = call.narrowed(options.size, options.sinks)
    if takes_logit(narrowed, options):
        narrowed = narrowed.with_(sinks=state["sinks"].to(call.query.dtype))
    return compute(narrowed)


def takes_logit(narrowed: AttentionCall, options: WindowOptions) -> bool:
    """Whether heads of a call that was narrowed get their sink logit: not where the layer's own window is narrower."""
    return options.sink_logit and narrowed.window == options.size and narrowed.causal


def state(layer: LayerLayout, options: WindowOptions) -> dict[str, Tensor]:
    """A sink logit for each query head, [H], that takes no share before it is fitted."""
    return {"sinks": torch.full((layer.num_heads,), OFF)} if options.sink_logit else {}


def _calibrate(live: LiveVariant, tokens: Tensor, sequential: bool) -> None:
    from rehead.variants.window.live_logit import fit_logits

    fit_logits(live, tokens, sequential)


def _cache(live: LiveVariant, undo: UndoLog) -> None:
    from rehead.variants.window.live_cache import shrink_caches

    shrink_caches(live, undo)


def _rewrite(model: Model, options: WindowOptions) -> Rewrite:
    from rehead.variants.window.rewrite import window_rewrite

    return window_rewrite(model, options)


def _host(model: Model, options: WindowOptions, hosts: Sequence[str]) -> str | None:
    from rehead.variants.window.classes import host_of

    return host_of(model, options, hosts)


def library(layer: LayerLayout, context: int) -> list[WindowOptions]:
    """Windows of a thirty-second and an eighth of the context, with the sinks that attention leans on: the tokens, or
    a logit for classes that keep none."""
    sizes = [1 << (context // part).bit_length() - 1 for part in (32, 8) if context >= 16 * part]
    sinks: tuple[dict[str, Any], ...] = ({"sinks": 4}, {"sink_logit": True})
    shorter = [size for size in sizes if layer.window is None or size < layer.window]
    return [WindowOptions(size=size, **kind) for size in shorter for kind in sinks]


VARIANT = register(
    Variant(
        name="window",
        summary="each row sees the last size= keys and the first sinks= tokens (approximate)",
        source="Xiao et al. 2023, arXiv 2309.17453; Beltagy et al. 2020, arXiv 2004.05150",
        options=WindowOptions,
        exact=lambda options: options.size >= LONGEST,
        off=lambda options: options.but(size=LONGEST),
        ablated=lambda options: options.but(sinks=0, sink_logit=False) if options.sinks or options.sink_logit else None,
        layout=lambda layer, options: options.narrowed(layer),
        library=library,
        attend=attend,
        state=state,
        calibrate=_calibrate,
        cache=_cache,
        rewrite=_rewrite,
        host=_host,
        needs=lambda options: options.moments(),
        reach=lambda options: options.size,
    )
)
