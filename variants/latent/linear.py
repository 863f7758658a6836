"""A layer as the closed form takes it: queries and keys linear in the inputs, and without biases where asked."""

from __future__ import annotations

from typing import Any

from rehead.models.heads import Heads
from rehead.variants.latent.bias import without_biases
from rehead.variants.latent.norms import LEAST_R2, NORM_NEEDS, without_norms
from rehead.variants.latent.seen import NEEDS, Means


def needs_of(normed: bool) -> tuple[str, ...]:
    """Names of the moments that a layer needs, with norms on its queries and keys or without."""
    return (*NEEDS, *NORM_NEEDS) if normed else NEEDS


def made_linear(
    heads: Heads, moments: Means, fold_biases: bool = False, least: float = LEAST_R2
) -> tuple[Heads, dict[str, float]]:
    """The nearest layer without norms and, where asked, without biases of queries, keys and values.

    Args:
        moments: those of :func:`needs_of`.
        fold_biases: put biases into the weights.
        least: R^2 that linear queries and keys must reach.

    Returns:
        (the layer, what that costs: the share of the worst normed head that is not linear, and the relative error of a
        bias per token).

    Raises:
        UnsupportedError: a head is too far from linear.
    """
    facts: dict[str, Any] = {}
    if heads.key_norm != "none":
        heads, r2 = without_norms(heads, moments, least)
        facts["nonlinear"] = round(1 - r2, 4)
    if fold_biases:
        heads, error = without_biases(heads, moments["inputs"])
        facts["bias_error"] = round(error, 4)
    return heads, facts
