"""Perplexity under a named convention, with its interval; see :mod:`rehead.recipes.evaluation.windows`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehead.data.beginning import IGNORED, NO_START, uncounted
from rehead.errors import UsageError
from rehead.models.distance import token_nll
from rehead.models.live import evaluating
from rehead.models.predictions import batch_size
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.bootstrap import Array, interval
from rehead.recipes.evaluation.windows import batches, cut, predict_last, require_finite


@dataclass(frozen=True)
class WindowLosses:
    """What a perplexity is made of.

    Attributes:
        losses: float64 [W], negative log-likelihood in nats summed over the counted tokens of each window.
        counts: float64 [W], tokens counted in each.
        convention, window, stride: how the text was cut.
        dtype: of the weights.
        bos: which windows begin as the tokenizer begins a text.
    """

    losses: Array
    counts: Array
    convention: str
    window: int
    stride: int
    dtype: str
    bos: schema.Bos = "none"

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.losses.sum() / self.counts.sum())

    @property
    def value(self) -> float:
        """The perplexity; infinite where a float64 cannot hold it."""
        return math.exp(self.mean) if self.mean < 709 else math.inf


def window_losses(
    model: Any,
    tokens: Tensor,
    convention: str = "disjoint",
    window: int = 512,
    stride: int | None = None,
    *,
    prefix: int | None = None,
    start: Tensor = NO_START,
    batch_tokens: int | None = None,
    name: str = "the model",
    progress: Callable[[float, float], None] | None = None,
) -> WindowLosses:
    """Run a causal language model over a text.

    Args:
        model: a transformers causal language model; its training mode is given back afterwards.
        tokens: int64 [T], the text.
        convention: ``disjoint``, ``strided`` or ``rolling``.
        window: tokens that the model sees at once.
        stride: for ``strided``; half a window when None.
        prefix: for ``rolling``: the token that comes first (see :func:`prefix_token`).
        start: int64 [p], how the tokenizer begins a text (:func:`rehead.data.beginning.text_start`).
        batch_tokens: tokens in a forward pass; by the device when None.
        name: of the model, for messages.
        progress: called with (windows done, windows).

    Raises:
        UsageError: the text is too short, or ``rolling`` has no prefix.
        UnsupportedError: the model gives a token no finite probability.
    """
    stride = stride or max(window // 2, 1)
    if convention == "rolling":
        if prefix is None:
            raise UsageError(
                "the rolling convention begins with the tokenizer's BOS or EOS, and it has neither; use strided"
            )
        if not (len(start) and torch.equal(tokens[: len(start)], start)):
            tokens = torch.cat([torch.tensor([prefix], dtype=tokens.dtype), tokens])
    windows = cut(convention, len(tokens), window, stride)
    begins = start if convention != "rolling" else NO_START
    found: list[Tensor] = []
    counts: list[Tensor] = []
    with evaluating(model):
        for inputs, targets in batches(tokens, windows, batch_size(model, window, batch_tokens), begins):
            targets = uncounted(targets, start)
            losses = token_nll(predict_last(model, inputs, targets.shape[1]), targets.clamp_min(0)).view(targets.shape)
            kept = targets != IGNORED
            require_finite(losses[kept], name)
            found.append(torch.where(kept, losses, 0.0).sum(-1))
            counts.append(kept.sum(-1).double())
            if progress is not None:
                progress(sum(map(len, found)), len(windows))
    steps = {"disjoint": window, "strided": stride, "rolling": window}
    return WindowLosses(
        torch.cat(found).numpy(), torch.cat(counts).numpy(), convention, window, steps[convention], dtype_name(model),
        begins_with(start, convention),
    )  # fmt: skip


def begins_with(start: Tensor, convention: str) -> schema.Bos:
    """Which windows begin with BOS under a convention."""
    return "none" if not len(start) else "the text" if convention == "rolling" else "each window"


def perplexity(model: Any, tokens: Tensor, window: int = 512, **options: Any) -> WindowLosses:
    """Perplexity over disjoint windows; ``options`` as :func:`window_losses`."""
    return window_losses(model, tokens, window=window, **options)


def described(
    found: WindowLosses,
    who: schema.Who,
    data: str,
    baseline: WindowLosses | None = None,
    bytes_per_token: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> schema.Perplexity:
    """A perplexity as the document has it.

    Args:
        found: what :func:`window_losses` gave.
        who, data: of which model, on which text.
        baseline: the same windows under the baseline, for the ratio.
        bytes_per_token: UTF-8 bytes of the text over its tokens, for the bits a byte.
        resamples, seed: of the bootstrap.
    """

    def value(losses: Array, counts: Array) -> Array:
        return np.exp(np.minimum(losses / counts, 709))

    def ratio(losses: Array, theirs: Array, counts: Array) -> Array:
        return np.exp(np.clip((losses - theirs) / counts, -709, 709))

    bounds = interval(value, found.losses, found.counts, resamples=resamples, seed=seed)
    against = None
    if baseline is not None:
        sums = (found.losses, baseline.losses, found.counts)
        low, high = interval(ratio, *sums, resamples=resamples, seed=seed) or (None, None)
        against = schema.Interval(value=float(ratio(*(np.array([part.sum()]) for part in sums))[0]), low=low, high=high)
    return schema.Perplexity(
        who=who,
        data=data,
        convention=found.convention,  # type: ignore[arg-type]
        value=min(found.value, float(np.exp(709))),
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        ratio=against,
        bits_per_byte=found.mean / math.log(2) / bytes_per_token if bytes_per_token else None,
        tokens=int(found.counts.sum()),
        window=found.window,
        stride=found.stride,
        windows=len(found.counts),
        dtype=found.dtype,
        bos=found.bos,
    )


def dtype_name(model: Any) -> str:
    """The dtype of a model's weights, as ``float32``."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def prefix_token(tokenizer: Any) -> int | None:
    """The token that the rolling convention begins with: BOS, else EOS, else None."""
    if tokenizer is None:
        return None
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
