"""How many positions a live model has, and whether rows of a length fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rehead.errors import UsageError


def position_limit(model: Any) -> int | None:
    """Positions that a model was made for; None where its config does not say."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def position_rows(model: Any) -> int | None:
    """Positions that a model has a table for, learned ones or angles looked up; None where any can be computed."""
    return min(_tables(model), default=None)


def check_positions(model: Any, length: int, name: str, flag: str) -> str | None:
    """Whether a model can read rows of ``length`` tokens.

    Asked before the first forward pass: on a GPU an index past a table kills the process's CUDA context.

    Args:
        model: a transformers causal language model.
        length: tokens in a row.
        name: what to call the model.
        flag: the option that the length comes from, with its value.

    Returns:
        A note where the model runs but was not made for so many; None where all is well.

    Raises:
        UsageError: it has no such positions.
    """
    rows, limit = position_rows(model), position_limit(model)
    if rows is not None and length > rows:
        raise UsageError(f"{flag}: {name} has positions for {rows} tokens; give {rows} or less")
    if limit is not None and length > limit:
        kind = model.config.get_text_config(decoder=True).model_type
        return f"{flag}: more than the {limit} positions that this {kind} was made for, so extrapolation is part of it"
    return None


def _tables(model: Any) -> Iterator[int]:
    words, decoder = model.get_input_embeddings(), model.get_decoder()  # not the tables of a vision tower
    for name, module in decoder.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not words and ("pos" in leaf or leaf == "wpe"):
            yield module.num_embeddings - int(getattr(module, "offset", 0))
    for name, buffer in decoder.named_buffers():
        if "pos" in name.rpartition(".")[2] and buffer.ndim == 2 and buffer.is_floating_point():
            yield buffer.shape[0]
