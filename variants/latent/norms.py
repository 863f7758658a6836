"""Layers with a norm on each head's queries and keys (Qwen3): the linear heads that come nearest.

A normed key is no linear function of what a latent caches. But a norm divides by one number per token and head, so a
ridge regression of the normed keys on the inputs, weighted by the attention that tokens receive, often comes close; its
R^2 says how close, before anything is converted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.healing.normed import NormedKeys, NormedQueries  # noqa: F401  # registers the moments in NORM_NEEDS
from rehead.models.heads import Heads
from rehead.models.linalg import ridge
from rehead.variants.latent.seen import Means

#: Further moments of layers with norms.
NORM_NEEDS = ("normed_queries", "normed_keys")
#: Below this share of explained variance a head is not converted in closed form.
LEAST_R2 = 0.9


@dataclass(frozen=True)
class LinearFit:
    """Linear heads in place of normed ones.

    Attributes:
        weight: [heads, D, n].
        r2: share of each head's normed energy that they explain, [heads].
    """

    weight: Tensor
    r2: Tensor


def linear_heads(states: Tensor, prior: Tensor, strength: float = 1e-4) -> LinearFit:
    """Regress normed states on the inputs, without a constant: engines know no bias on what a latent reads.

    Args:
        states: mean of t y y^T over tokens with weights t, y = [x, 1, s] of inputs and normed states before their
            rotation, [heads, n + 1 + D, n + 1 + D].
        prior: the projections before the norm, [heads, D, n]: where the text says nothing, their direction stays.
    """
    width = prior.shape[-1]
    rows, explained = [], []
    for both, start in zip(states.double(), prior.double()):
        gram, cross, energy = both[:width, :width], both[width + 1 :, :width], both[width + 1 :, width + 1 :].trace()
        scale = (start * cross).sum() / torch.einsum("dw,wv,dv->", start, gram, start).clamp_min(1e-30)
        fit = ridge(gram, cross, scale * start, strength)
        gap = energy - 2 * (fit * cross).sum() + torch.einsum("dw,wv,dv->", fit, gram, fit)
        rows.append(fit)
        explained.append(1 - gap / energy.clamp_min(1e-30))
    return LinearFit(torch.stack(rows), torch.stack(explained))


def without_norms(heads: Heads, moments: Means, least: float = LEAST_R2) -> tuple[Heads, float]:
    """The layer with linear queries and keys in place of normed ones.

    Args:
        moments: with those of :data:`NORM_NEEDS`.
        least: R^2 that every head must reach.

    Returns:
        (the layer, R^2 of the worst head; 1 where there is no norm).

    Raises:
        UnsupportedError: a head is explained too badly.
    """
    if heads.key_norm == "none":
        return heads, 1.0
    q, k = linear_heads(moments["normed_queries"], heads.q), linear_heads(moments["normed_keys"], heads.k)
    for what, fit in (("query", q), ("key", k)):
        worst = int(fit.r2.argmin())
        if float(fit.r2[worst]) < least:
            raise UnsupportedError(
                f"latent: {what} head {worst} is normed, and linear rows explain only {float(fit.r2[worst]):.2f} of "
                f"it where {least:.2f} are needed; fit the layers too (--fit)"
            )
    plain = replace(heads, q=q.weight.to(heads.q), k=k.weight.to(heads.k), key_norm="none")
    plain = replace(plain, q_bias=None, k_bias=None, q_norm=None, k_norm=None)
    return plain, min(float(fit.r2.min()) for fit in (q, k))
