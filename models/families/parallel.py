"""Model types of ours for parallel blocks: what is true of the serial type's attention is true of theirs."""

from __future__ import annotations

from dataclasses import replace

from rehead.models.families.spec import Config, Family

PREFIX = "rehead_parallel_"


def base_type(model_type: str) -> str:
    """The serial model type behind one of ours; any other as it is."""
    return model_type.removeprefix(PREFIX)


def as_parallel(family: Family) -> Family:
    """A family under our name for it."""
    return replace(family, model_type=PREFIX + family.model_type, block=_block)


def _block(config: Config) -> str:
    given = config.parallel_layers
    if given is None or len(given) == config.num_hidden_layers:
        return "parallel"
    return f"parallel in {len(given)} of {config.num_hidden_layers} layers, else serial"
