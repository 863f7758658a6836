"""The special tokens that a tokenizer puts before a text, and how to put them before windows of running text.

A model whose tokenizer puts a beginning-of-sequence token (BOS) before every text relies on it: attention goes there
when it has nothing else to attend to (Xiao et al. 2023, arXiv 2309.17453). A window cut from running text has no BOS,
and the model then computes something that it never does in use. So BOS replaces the first token of every window, which
nothing in the window predicts anyway; the number of tokens read and counted stays the same, as in the chunks of
llama.cpp's ``perplexity``. With a tokenizer that adds nothing, windows stay unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The label of tokens that a loss does not count.
IGNORED = -100
NO_START = torch.empty(0, dtype=torch.int64)


def text_start(tokenizer: Any) -> Tensor:
    """The special tokens that a tokenizer puts before every text, int64 ``[0 or more]``; none without a tokenizer."""
    if tokenizer is None:
        return NO_START
    marked, bare = (list(tokenizer("1", add_special_tokens=special).input_ids) for special in (True, False))
    for count in range(len(marked) - len(bare) + 1):
        if marked[count : count + len(bare)] == bare:
            return torch.tensor(marked[:count], dtype=torch.int64)
    return NO_START


def begun(rows: Tensor, start: Tensor) -> Tensor:
    """Rows of running text with their first ``p`` tokens replaced by ``start``.

    A row where ``start`` follows right after those tokens stays unchanged.

    Args:
        rows: int64 ``[b, n]``.
        start: int64 ``[p]``, from :func:`text_start`.
    """
    if not len(start) or rows.shape[1] <= len(start):
        return rows
    size, start = len(start), start.to(rows)
    twice = (rows[:, size : 2 * size] == start).all(1, keepdim=True) if rows.shape[1] >= 2 * size else None
    first = start.expand(len(rows), -1)
    first = first if twice is None else torch.where(twice, rows[:, :size], first)
    return torch.cat([first, rows[:, size:]], dim=1)


def uncounted(targets: Tensor, start: Tensor) -> Tensor:
    """Targets with :data:`IGNORED` in place of the tokens that begin a text, which no model should predict.

    Args:
        targets: int64, any shape.
        start: int64 ``[p]``, from :func:`text_start`.
    """
    return targets.masked_fill(torch.isin(targets, start.to(targets)), IGNORED) if len(start) else targets


def convention(start: Tensor) -> str:
    """Which windows begin with special tokens, as printed in tables: ``"each window"`` or ``"none"``."""
    return "each window" if len(start) else "none"
