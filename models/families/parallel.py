"""Rehead's own model types, for parallel blocks and for windows: attention is laid out as in the type below."""

from __future__ import annotations

from dataclasses import replace

from rehead.models.families.spec import Config, Family

PREFIX = "rehead_parallel_"
FILE = "rehead_window"
"""What ``--host`` calls a model's own class with Rehead's modelling file for windows."""
WINDOW_PREFIX = f"{FILE}_"


def base_type(model_type: str) -> str:
    """The type that one of Rehead's derives from; other types are returned unchanged."""
    return model_type.removeprefix(PREFIX).removeprefix(WINDOW_PREFIX)


def as_derived(family: Family, model_type: str) -> Family:
    """The family of one of Rehead's model types, from that of the type that it derives from."""
    return as_parallel(family) if model_type.startswith(PREFIX) else as_windowed(family)


def as_windowed(family: Family) -> Family:
    """The family of the model type with windows, which may have sink logits."""
    return replace(family, model_type=WINDOW_PREFIX + family.model_type, query_extras=(*family.query_extras, "sinks"))


def as_parallel(family: Family) -> Family:
    """The family of the parallel model type."""
    return replace(family, model_type=PREFIX + family.model_type, block=_block)


def _block(config: Config) -> str:
    layers = config.parallel_layers
    if layers is None or len(layers) == config.num_hidden_layers:
        return "parallel"
    return f"parallel in {len(layers)} of {config.num_hidden_layers} layers, else serial"
