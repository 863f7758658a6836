"""How a tokenizer begins a text, and sequences that begin so.

A model whose tokenizer puts a beginning-of-sequence token (BOS) before every text leans on it: it is where attention
goes that has nothing to look at (Xiao et al. 2023, arXiv 2309.17453). A window cut out of running text has none, and
such a model then computes something that it never does in use. So the first token of every window, which nothing in the
window predicts anyway, gives its place to BOS: as many tokens are read and counted as without, as in the chunks of
llama.cpp's ``perplexity``. Tokenizers that add nothing change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What a loss does not count.
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
    """Rows of running text whose first tokens give way to those that begin a text; not where one begins right behind.

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
    """Targets with :data:`IGNORED` where a text begins: no model is to predict that.

    Args:
        targets: int64, any shape.
        start: int64 ``[p]``, from :func:`text_start`.
    """
    return targets.masked_fill(torch.isin(targets, start.to(targets)), IGNORED) if len(start) else targets


def convention(start: Tensor) -> str:
    """How windows begin, as documents and tables say it."""
    return "each window" if len(start) else "none"
