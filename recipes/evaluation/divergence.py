"""How far models are from a baseline, token by token: both run over the same text side by side, no logits are stored.

The figures are those that llama.cpp's ``perplexity --kl-divergence`` reports for quantised models, so that the two can
be read together: mean, median and tails of KL(baseline || model), agreement of the most likely token, and the change of
the right token's probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehead.data.beginning import IGNORED, NO_START
from rehead.errors import UsageError
from rehead.models.distance import Distances, distances
from rehead.models.live import evaluating
from rehead.models.predictions import batch_size, vocabulary
from rehead.recipes import evaluation_schema as schema
from rehead.recipes.evaluation.bootstrap import Array, interval
from rehead.recipes.evaluation.perplexity import WindowLosses, begins_with, dtype_name
from rehead.recipes.evaluation.windows import batches, cut, predict_last, require_finite

#: Edges of the histogram, in nats: everything below the first, then eight to a decade.
EDGES: tuple[float, ...] = (0.0, *(float(edge) for edge in np.logspace(-6, 2, 65)))


@dataclass(frozen=True)
class Comparison:
    """One model beside the baseline over disjoint windows.

    Attributes:
        tokens: what each counted token gave, in the order of the text.
        window: tokens in a window, of which all but the first are counted, and what begins a text is not.
        losses, baseline_losses: the two perplexities' parts, from the same forward passes.
    """

    tokens: Distances
    window: int
    losses: WindowLosses
    baseline_losses: WindowLosses

    @property
    def kl(self) -> float:
        """Mean KL(baseline || model), nats per token."""
        return self.tokens.mean_kl

    @property
    def top1_agreement(self) -> float:
        """Share of tokens at which both find the same token most likely."""
        return self.tokens.top1_agreement

    @property
    def perplexity(self) -> float:
        """The model's."""
        return self.losses.value

    @property
    def baseline_perplexity(self) -> float:
        """The baseline's, on the same windows."""
        return self.baseline_losses.value


def compare(
    baseline: Any,
    models: Mapping[str, Any],
    tokens: Tensor,
    window: int = 512,
    *,
    start: Tensor = NO_START,
    batch_tokens: int | None = None,
    names: Mapping[str, str] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, Comparison]:
    """Compare live models with a baseline; each batch goes through the baseline once, however many models there are.

    Models are put into evaluation mode and given back in the mode they were in, so this may be called while one of
    them is being trained. They may be on different devices.

    Args:
        baseline: a transformers causal language model.
        models: others with the same vocabulary, by any name.
        tokens: int64 [T], a text; what does not fill a window is left out.
        window: tokens in a window.
        start: int64 [p], how the tokenizer begins a text (:func:`rehead.data.beginning.text_start`).
        batch_tokens: tokens in a forward pass; by the device when None.
        names: what to call the models in messages, by the same keys.
        progress: called with (windows done, windows).

    Returns:
        One comparison for each of ``models``.

    Raises:
        UsageError: the text is shorter than one window, or vocabularies differ.
        UnsupportedError: a model gives a token no finite probability.
    """
    names = names or {}
    for key, model in models.items():
        require_same_vocabulary(baseline, model, names.get(key, key), names.get("baseline", "the baseline"))
    windows = cut("disjoint", len(tokens), window)
    found: dict[str, list[Distances]] = {key: [] for key in models}
    counts: list[Tensor] = []
    done = 0
    with evaluating(baseline, *models.values()):
        size = min(batch_size(model, window, batch_tokens) for model in (baseline, *models.values()))
        for inputs, targets in batches(tokens, windows, size, start):
            reference = predict_last(baseline, inputs, targets.shape[1])
            kept = targets != IGNORED
            counts.append(kept.sum(-1).double())
            for key, model in models.items():
                part = distances(reference, predict_last(model, inputs, targets.shape[1]), targets.clamp_min(0))
                part = part[kept.flatten()]
                require_finite(part.reference_nll, names.get("baseline", "the baseline"))
                require_finite(part.kl + part.nll, names.get(key, key))
                found[key].append(part)
            done += len(inputs)
            if progress is not None:
                progress(done, len(windows))
    per_window = torch.cat(counts).numpy()

    def losses(model: Any, nll: Tensor) -> WindowLosses:
        sums = window_sums(nll, per_window)
        bos = begins_with(start, "disjoint")
        return WindowLosses(sums, per_window, "disjoint", window, window, dtype_name(model), bos)

    result = {}
    for key, parts in found.items():
        joined = Distances.cat(parts)
        ends = losses(models[key], joined.nll), losses(baseline, joined.reference_nll)
        result[key] = Comparison(joined, window, *ends)
    return result


def require_same_vocabulary(baseline: Any, model: Any, name: str, baseline_name: str) -> None:
    """Raise UsageError where two models' logits are not over the same number of tokens."""
    theirs, ours = vocabulary(baseline), vocabulary(model)
    if theirs != ours:
        raise UsageError(
            f"{name}: has a vocabulary of {ours}, {baseline_name} one of {theirs}, so their predictions cannot be "
            "compared; give the model that it was made from, or leave the baseline out and compare bits per byte"
        )


def window_sums(values: Tensor, counts: Array) -> Array:
    """Sums over each window's tokens, float64 [W].

    Args:
        values: float64 [N], of all windows' tokens one after the other.
        counts: float64 [W], tokens of each window.
    """
    return np.array([part.sum() for part in values.split(counts.astype(int).tolist())])


def described(found: Comparison, who: schema.Who, data: str, resamples: int = 2000, seed: int = 0) -> schema.Divergence:
    """A comparison as the document has it; percentiles are exact, of the stored numbers of single tokens."""
    tokens = found.tokens
    kl = tokens.kl.numpy()
    counts = found.losses.counts
    sums = window_sums(tokens.kl, counts)

    def mean(total: Array, count: Array) -> Array:
        return total / count

    bounds = interval(mean, sums, counts, resamples=resamples, seed=seed)
    median, p99, p999 = np.quantile(kl, [0.5, 0.99, 0.999])
    change = (torch.exp(-tokens.nll) - torch.exp(-tokens.reference_nll)).numpy()
    tails = np.quantile(change, [0.01, 0.05, 0.95, 0.99])
    edges = [*EDGES[:-1], max(EDGES[-1], float(kl.max()))]
    return schema.Divergence(
        who=who,
        data=data,
        tokens=len(kl),
        window=found.window,
        mean=found.kl,
        low=bounds[0] if bounds else None,
        high=bounds[1] if bounds else None,
        median=float(median),
        p99=float(p99),
        p999=float(p999),
        max=float(kl.max()),
        top1_agreement=found.top1_agreement,
        delta_p=schema.DeltaP(
            mean=float(change.mean()),
            std=float(change.std()),
            p1=float(tails[0]),
            p5=float(tails[1]),
            p95=float(tails[2]),
            p99=float(tails[3]),
        ),
        bos=found.losses.bos,
        histogram=schema.Histogram(edges=edges, counts=np.histogram(kl, bins=edges)[0].tolist()),
    )
