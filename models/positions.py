"""How many positions a live model has, and whether a text of some length fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rehead.errors import UsageError


def position_limit(model: Any) -> int | None:
    """The number of positions that a model was trained for; None where its config does not say."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def readable(model: Any, beyond: bool = False) -> int | None:
    """Tokens that a model can be asked to read; None where nothing limits them.

    Args:
        beyond: also more than it was trained for, as far as it has a table of positions at all.
    """
    return position_rows(model) if beyond else position_limit(model)


def position_rows(model: Any) -> int | None:
    """The number of positions in a model's table, of learned embeddings or angles; None where it has no table."""
    return min(_tables(model), default=None)


def check_positions(model: Any, length: int, name: str, flag: str) -> str | None:
    """Check that a model can read texts of ``length`` tokens.

    Do this before the first forward pass: on a GPU an index past a table destroys the process's CUDA context.

    Args:
        model: a transformers causal language model.
        length: tokens per text.
        name: the model's name in messages.
        flag: the option that the length comes from, with its value.

    Returns:
        A note where the model can run but was not trained for that length, else None.

    Raises:
        UsageError: the length is beyond the model's table of positions.
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
