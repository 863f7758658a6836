"""Rehead's own model types for parallel blocks: their attention is laid out as the serial type's."""

from __future__ import annotations

from dataclasses import replace

from rehead.models.families.spec import Config, Family

PREFIX = "rehead_parallel_"


def base_type(model_type: str) -> str:
    """The serial type of a parallel model type; other types are returned unchanged."""
    return model_type.removeprefix(PREFIX)


def as_parallel(family: Family) -> Family:
    """The family of the parallel model type."""
    return replace(family, model_type=PREFIX + family.model_type, block=_block)


def _block(config: Config) -> str:
    layers = config.parallel_layers
    if layers is None or len(layers) == config.num_hidden_layers:
        return "parallel"
    return f"parallel in {len(layers)} of {config.num_hidden_layers} layers, else serial"
