"""A longer context in a checkpoint: a config, and the class that reads it; weights stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rehead.errors import UnsupportedError, UsageError
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, LayerForm, RecoverySettings, Rewrite, unchanged
from rehead.variants.context.classes import config_with, named_by, rotating
from rehead.variants.context.options import ContextOptions
from rehead.variants.context.tables import nothing_to_stretch, resized

#: Logits are those of another rotation, so queries and keys are not refitted to the original's.
RECOVERY = RecoverySettings(logits=False)


def context_rewrite(model: Model, options: ContextOptions) -> Rewrite:
    """A model that reads longer texts; no weight is read.

    Raises:
        UsageError: not longer, or impossible factors.
        UnsupportedError: no class holds it.
    """
    layers = rotating(model.config, model.family)
    if not layers:
        if (reason := nothing_to_stretch(str(model.config.model_type))) is not None:
            raise UnsupportedError(reason)
        return resized(model, options)
    if options.table != "interpolate":
        raise UsageError(f"{model.config.model_type}: has rotary pairs and no table of positions; leave table out")
    raw = config_with(model, options)
    rewrite = unchanged("context", raw, model.family, model.source.tensors)
    form = LayerForm(_as_it_is, groups=model.num_kv_heads, settings=RECOVERY, own_calls=True)
    return replace(rewrite, exact=False, layers=tuple(named_by(model.config, options, layers)), form=form)


def _as_it_is(layer: int, heads: Heads, moments: Any) -> Changed:
    return Changed(heads)
