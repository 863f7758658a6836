"""Apply a Rewrite to a model."""

from __future__ import annotations

from dataclasses import replace

from rehead.models.config import resolve_config
from rehead.models.families import resolve_family
from rehead.models.families.parallel import base_type
from rehead.models.model import Model, model_of
from rehead.models.modeling import without_remote_code
from rehead.models.rewrite import Rewrite
from rehead.models.rewritten_source import RewrittenSource


def rewritten(model: Model, rewrite: Rewrite) -> Model:
    """The model that results from a Rewrite: another config and other tensors. No weight is read.

    Raises:
        UnsupportedError: the new config is not valid for its class.
    """
    rewrite = replace(rewrite, config=without_remote_code(rewrite.config))
    source = RewrittenSource(model.source, rewrite)
    config = resolve_config(rewrite.config, source.id)
    target = rewrite.target
    if config.model_type != target.model_type:
        target = resolve_family(config, source.tensors)
    result = model_of(source, config, target)
    same = base_type(config.model_type) == base_type(model.config.model_type)
    return replace(
        result,
        module_layer=model.module_layer if same else result.module_layer,
        rewrites=(*model.rewrites, rewrite),
    )
