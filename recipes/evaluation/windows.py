"""How a text is cut into what a model sees at once and goes through it: three conventions, each of a known referee.

A perplexity depends on how much context each token is predicted from, so a figure without its convention says little:

- ``disjoint``: windows of W tokens one after the other, each read afresh; the first token of a window is not counted,
  and what does not fill a window is left out. Equals the mean loss of ``model(input_ids=rows, labels=rows)`` over rows
  of W, which is also how calibration and uptraining read text, and what divergences are measured over.
- ``strided``: windows of W tokens that begin every S tokens; each counts only the tokens that no window before it has
  counted, so all but the first window's are predicted from at least W - S tokens. This is the loop of transformers'
  guide to the perplexity of fixed-length models, with every counted token weighing the same.
- ``rolling``: lm-evaluation-harness's ``loglikelihood_rolling``: a prefix token (the tokenizer's BOS, else its EOS)
  comes first, windows of W inputs follow one another, every token of the text is counted once, and the last window
  reaches back over counted tokens until it is full.

Where the tokenizer begins every text with BOS, every window of the first two begins with it: in the place of its first
token, so that as many are counted (see :mod:`rehead.data.beginning`). ``rolling`` begins the text with it, once, as the
harness does. A token that begins a document inside a window is read, and never counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rehead.data.beginning import NO_START, begun, uncounted
from rehead.errors import UnsupportedError, UsageError, unknown_name
from rehead.models.predictions import Predictions, predict

CONVENTIONS = ("disjoint", "strided", "rolling")


@dataclass(frozen=True)
class Window:
    """Tokens ``[start, end)`` of a text, of which the last ``counted`` are predicted from those before them."""

    start: int
    end: int
    counted: int


def disjoint(total: int, window: int) -> list[Window]:
    """Windows one after the other, each read afresh; see the module's text."""
    return [Window(start, start + window, window - 1) for start in range(0, total - window + 1, window)]


def strided(total: int, window: int, stride: int) -> list[Window]:
    """Windows that overlap by ``window - stride`` tokens; see the module's text."""
    found, reached = [], 1  # the first token has nothing to be predicted from
    for start in range(0, total, stride):
        end = min(start + window, total)
        reached = max(reached, start + 1)  # where windows do not overlap, each has a first token
        if end > reached:
            found.append(Window(start, end, end - reached))
            reached = end
        if end == total:
            break
    return found


def rolling(total: int, window: int) -> list[Window]:
    """Windows of ``window`` inputs over a text that already begins with the prefix token; see the module's text.

    Args:
        total: tokens, the prefix token among them.
        window: inputs of a window, so one less than the tokens that it spans.
    """
    found, reached = [], 1
    while reached < total:
        end = min(reached + window, total)
        # Full windows begin right before what they count; only the last has room to reach back.
        found.append(Window(max(0, end - window - 1), end, end - reached))
        reached = end
    return found


def cut(convention: str, total: int, window: int, stride: int | None = None) -> list[Window]:
    """Windows by the convention's name.

    Args:
        convention: ``disjoint``, ``strided`` or ``rolling``.
        total: tokens of the text (with the prefix token for ``rolling``).
        window: tokens that the model sees at once.
        stride: for ``strided``; half a window by default.

    Raises:
        UsageError: no such convention, or a text that is too short for it.
    """
    if convention not in CONVENTIONS:
        raise UsageError(unknown_name("convention", convention, CONVENTIONS))
    if convention == "disjoint" and total < window:
        raise UsageError(
            f"text of {total} tokens: shorter than one window of {window}; give more text or a smaller one"
        )
    if total < 2:
        raise UsageError(f"text of {total} tokens: nothing to predict; give more text")
    if convention == "disjoint":
        return disjoint(total, window)
    return rolling(total, window) if convention == "rolling" else strided(total, window, stride or max(window // 2, 1))


def batches(
    tokens: Tensor, windows: Sequence[Window], size: int, start: Tensor = NO_START
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of equal shape side by side, in order; nothing is ever padded.

    Args:
        tokens: int64 [T].
        windows: of the text.
        size: windows in a batch, at most.
        start: int64 [p], how the tokenizer begins a text; the first tokens of every window give way to it.

    Yields:
        (inputs int64 [b, n], targets int64 [b, c]): the last c predictions from the inputs are of the targets, where
        these are not IGNORED.
    """
    for (length, counted), run in groupby(windows, key=lambda window: (window.end - window.start, window.counted)):
        same = list(run)
        for at in range(0, len(same), size):
            rows = begun(torch.stack([tokens[window.start : window.end] for window in same[at : at + size]]), start)
            yield rows[:, : length - 1], uncounted(rows[:, length - counted :], start)


def predict_last(model: Any, inputs: Tensor, counted: int) -> Predictions:
    """Predictions ``[b, counted]`` at the last positions of each row.

    Args:
        model: a transformers causal language model.
        inputs: int64 [b, n], on any device.
        counted: positions wanted, at most n.
    """
    return predict(model, {"input_ids": inputs.to(next(model.parameters()).device)}, counted)


def require_finite(values: Tensor, name: str) -> Tensor:
    """Give ``values`` back.

    Raises:
        UnsupportedError: one is not finite; ``name`` is the model that gave it.
    """
    if not bool(torch.isfinite(values).all()):
        at = int((~torch.isfinite(values)).nonzero()[0])
        raise UnsupportedError(
            f"{name}: gives no finite probability for token {at} of the text; check its weights, or try --dtype float32"
        )
    return values
