"""Biases where a host has no place for them.

The latent's rows, the shared key and the output projection may have biases in transformers' own classes (with
``attention_bias``), queries only through a second matrix, and serving engines know none of them. A bias can be had from
the inputs themselves: a direction u with u . x as near to one as can be, so that W + b u^T does what W x + b does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehead.models.heads import Heads


def constant_direction(inputs: Tensor) -> tuple[Tensor, float]:
    """The linear function of x that comes nearest to one.

    Args:
        inputs: E[x~ x~^T] of x~ = [x, 1], [n + 1, n + 1].

    Returns:
        (u [n], root mean square of 1 - u . x): what share of a bias is lost per token.
    """
    inputs = inputs.double() / inputs[-1, -1].double()
    gram, mean = inputs[:-1, :-1], inputs[:-1, -1]
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    inverse = torch.where(values > 1e-9 * values[-1], 1 / values.clamp_min(torch.finfo(torch.float64).tiny), 0)
    u = vectors @ (inverse * (vectors.T @ mean))
    return u, float((1 - 2 * u @ mean + u @ gram @ u).clamp_min(0).sqrt())


def without_biases(heads: Heads, inputs: Tensor) -> tuple[Heads, float]:
    """The layer without biases on queries, keys and values; approximate, and by how much.

    Args:
        inputs: as for :func:`constant_direction`.

    Returns:
        (the layer, the error of :func:`constant_direction`; 0 where there was no bias).
    """
    having = [name for name in "qkv" if getattr(heads, name + "_bias") is not None]
    if not having:
        return heads, 0.0
    u, error = constant_direction(inputs)
    changed: dict[str, Any] = {}
    for name in having:
        weight, bias = getattr(heads, name), getattr(heads, name + "_bias")
        changed[name] = (weight.double() + bias.double()[..., None] * u).to(weight.dtype)
        changed[name + "_bias"] = None
    return replace(heads, **changed), error
