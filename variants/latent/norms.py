"""Layers with a norm on each head's queries and keys (Qwen3, Gemma 3): the linear heads that come nearest.

A normed key is no linear function of what a latent caches. But a norm divides by one number per token and head, so a
ridge regression of the normed keys on the inputs, weighted by the attention that tokens receive, often comes close; its
R^2 says how close, before anything is converted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.models.heads import Heads
from rehead.models.linalg import ridge

#: Below this share of explained variance a head is not converted in closed form.
LEAST_R2 = 0.9


@dataclass(frozen=True)
class LinearFit:
    """Linear heads in place of normed ones.

    Attributes:
        weight: [heads, D, n]. bias: [heads, D].
        r2: share of each head's normed energy that they explain, [heads].
    """

    weight: Tensor
    bias: Tensor
    r2: Tensor


def linear_heads(gram: Tensor, cross: Tensor, energy: Tensor, prior: Tensor, strength: float = 1e-4) -> LinearFit:
    """Regress normed states on the inputs.

    Args:
        gram: mean of t x~ x~^T over tokens with weights t, x~ = [x, 1]: [w, w] or, by head, [heads, w, w].
        cross: mean of t s x~^T of the normed states s before their rotation, [heads, D, w].
        energy: mean of t |s|^2, [heads].
        prior: the projections before the norm, [heads, D, n]: where the text says nothing, their direction stays.

    Returns:
        Weights, biases and R^2 of each head.
    """
    count, _, width = cross.shape
    gram = gram.double().expand(count, width, width)
    start = torch.nn.functional.pad(prior.double(), (0, 1))
    rows, explained = [], []
    for head in range(count):
        along = (start[head] * cross[head].double()).sum()
        scale = along / torch.einsum("dw,wv,dv->", start[head], gram[head], start[head]).clamp_min(1e-30)
        fit = ridge(gram[head], cross[head], scale * start[head], strength)
        gap = energy[head].double() - 2 * (fit * cross[head]).sum() + torch.einsum("dw,wv,dv->", fit, gram[head], fit)
        rows.append(fit)
        explained.append(1 - gap / energy[head].double().clamp_min(1e-30))
    weight = torch.stack(rows)
    return LinearFit(weight[..., :-1].contiguous(), weight[..., -1].contiguous(), torch.stack(explained))


def without_norms(heads: Heads, queries: LinearFit, keys: LinearFit, least: float = LEAST_R2) -> Heads:
    """The layer with linear queries and keys in place of normed ones.

    Raises:
        UnsupportedError: a head is explained too badly.
    """
    for what, fit in (("query", queries), ("key", keys)):
        worst = int(fit.r2.argmin())
        if float(fit.r2[worst]) < least:
            raise UnsupportedError(
                f"latent: {what} head {worst} is normed, and linear rows explain only {float(fit.r2[worst]):.2f} of it "
                f"where {least:.2f} are needed; leave the layer as it is, or fit it (--fit)"
            )
    like = heads.q
    return replace(
        heads,
        q=queries.weight.to(like),
        k=keys.weight.to(like),
        q_bias=queries.bias.to(like),
        k_bias=keys.bias.to(like),
        q_norm=None,
        k_norm=None,
        key_norm="none",
    )
