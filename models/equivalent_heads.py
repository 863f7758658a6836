"""Changes of a layer's heads that leave its function alone and give it the form that another class wants."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rehead.models.heads import Heads, rotary_pairs


def as_halves(heads: Heads) -> Heads:
    """The same heads with each rotary pair (i, i + r/2): dimensions of queries and keys change places.

    A dot product does not care in which order its terms stand, and the pair at place i still turns with frequency i.
    """
    pairs = heads.pairs
    if pairs is None or not len(pairs):
        return heads
    order = torch.cat([pairs.T.flatten(), heads.free_dims()])
    moved = {
        name: tensor[:, order]
        for name in ("q", "k", "q_bias", "k_bias")
        if (tensor := getattr(heads, name)) is not None
    }
    return replace(heads, **moved, pairs=rotary_pairs("half", 2 * len(pairs)))


def with_norm_folded(heads: Heads, weight: Tensor, bias: Tensor | None) -> Heads:
    """Heads that read a norm's output before its weight and bias [n], which fold into the projections, in float32."""
    result = heads
    for name in "qkv":
        rows = getattr(heads, name).float()
        changed = {name: rows * weight.float()}
        if bias is not None:
            own = getattr(heads, name + "_bias")
            shift = rows @ bias.float()
            changed[name + "_bias"] = shift if own is None else own.float() + shift
        result = replace(result, **changed)
    return result


def with_biases(heads: Heads) -> Heads:
    """Heads with a bias on every projection, zero where there was none."""
    missing = {
        f"{name}_bias": getattr(heads, name).new_zeros(getattr(heads, name).shape[:2])
        for name in "qkv"
        if getattr(heads, f"{name}_bias") is None
    }
    if heads.o_bias is None:
        missing["o_bias"] = heads.o.new_zeros(heads.o.shape[0])
    return replace(heads, **missing)


def with_queries_scaled(heads: Heads, factor: float) -> Heads:
    """Heads whose attention logits are ``factor`` times as large."""
    bias = None if heads.q_bias is None else heads.q_bias * factor
    return replace(heads, q=heads.q * factor, q_bias=bias)


def fold_matrix(weight: Tensor, norm: Tensor) -> Tensor:
    """A matrix [out, n] that reads a norm's output before its weight [n]."""
    return (weight.float() * norm.float()).to(weight.dtype)


def fold_bias(weight: Tensor, norm_bias: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a norm's bias [n] gives behind the matrix [out, n] that reads it, added to the matrix's own bias [out]."""
    shift = weight.float() @ norm_bias.float()
    return (shift if bias is None else shift + bias.float()).to(weight.dtype)
