"""Perplexity over disjoint windows: every window starts afresh, its first token is not counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rehead.errors import UsageError


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with what it was measured on.

    Attributes:
        value: exp of the mean negative log-likelihood.
        tokens: predictions counted.
        window: tokens in a window; windows are disjoint.
        dtype: of the weights.
    """

    value: float
    tokens: int
    window: int
    dtype: str


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor,
    window: int = 512,
    batch: int = 4,
    progress: Callable[[float, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model over disjoint windows.

    Args:
        model: a transformers causal language model.
        tokens: int64 [T], a text; what does not fill a window is left out.
        window: tokens in a window.
        batch: windows at a time.
        progress: called with (windows done, windows).

    Raises:
        UsageError: the text is shorter than one window.
    """
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    if not len(windows):
        raise UsageError(f"text of {len(tokens)} tokens: shorter than one window of {window}; give more text")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for at in range(0, len(windows), batch):
        rows = windows[at : at + batch].to(device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
        count += rows[:, 1:].numel()
        if progress is not None:
            progress(min(at + batch, len(windows)), len(windows))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Perplexity(math.exp(total / count), count, window, dtype)
