"""Windows in a checkpoint: a config that says so, and for each head the logit that stands for what it hides."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rehead.errors import UsageError
from rehead.models.by_heads import rewrite_heads
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, LayerForm, RecoverySettings, Rewrite
from rehead.variants.window.classes import SINKS, config_with, windows_after
from rehead.variants.window.sink_logit import best, worth

if TYPE_CHECKING:
    from rehead.variants.window import WindowOptions

#: Queries and keys are not refitted to the original's logits, most of whose keys are not seen. Texts are long, and
#: classes with sinks compute attention eagerly, so a step of the fit reads fewer tokens than elsewhere.
RECOVERY = RecoverySettings(logits=False, tokens=4096)


def window_rewrite(model: Model, options: WindowOptions) -> Rewrite:
    """A model with windows, in the class that it is in or in that with Rehead's modelling file; no weight is read.

    Raises:
        UsageError: the windows hide nothing, or as many sinks are kept as a window has tokens.
        UnsupportedError: the class cannot hold them.
    """
    if options.sinks >= options.size:
        raise UsageError(f"--sinks {options.sinks}: must be fewer than the window of {options.size} tokens")
    before = {layer.index: layer for layer in model.layouts}
    after = windows_after(model, options)
    chosen = options.indices(int(model.config.num_hidden_layers))
    changed = [layer for layer in chosen if layer in before and before[layer].window != after[layer]]
    positions = getattr(model.config, "max_position_embeddings", None)
    if not changed or (positions is not None and options.size >= positions):
        raise UsageError(
            f"--window {options.size}: hides nothing of this model"
            + (f", which has {positions} positions" if positions else "")
            + "; give a smaller one"
        )
    raw = config_with(model, options)
    needs = options.moments()

    def closed(layer: int, heads: Heads, moments: Any) -> Changed:
        if not needs:
            return Changed(heads)
        logits = best(moments[needs[0]], worth(options.sinks)).to(heads.q)
        told = [round(float(value), 4) for value in logits]
        return Changed(replace(heads, extras={**heads.extras, SINKS: logits[:, None]}), {"sink_logits": told})

    def on_meta(layer: int, heads: Heads) -> Heads:
        if not needs:
            return heads
        return replace(heads, extras={**heads.extras, SINKS: torch.empty_like(heads.extras[SINKS])})

    form = LayerForm(
        closed,
        needs,
        model.num_kv_heads,
        calibrated=bool(needs),
        settings=RECOVERY,
        trains=(SINKS,) if needs else (),
        own_calls=True,
        hides=True,
    )
    return rewrite_heads("window", model, raw, form, changed, on_meta)
