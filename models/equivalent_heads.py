"""Change a layer's heads to the form that another class needs, without changing what the layer computes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rehead.models.heads import Heads, rotary_pairs


def as_halves(heads: Heads) -> Heads:
    """The same heads with the dimensions of queries and keys reordered so that rotary pairs are (i, i + r/2).

    The order of the terms does not change a dot product, and pair i keeps its frequency.
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
    """Heads with a norm's weight and bias [n] folded into the projections, in float32; they read the norm without."""
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
    """A matrix [out, n] with the weight [n] of the norm before it folded in."""
    return (weight.float() * norm.float()).to(weight.dtype)


def fold_bias(weight: Tensor, norm_bias: Tensor, bias: Tensor | None = None) -> Tensor:
    """A matrix's bias [out] with the bias [n] of the norm before it folded in: ``weight @ norm_bias + bias``."""
    shift = weight.float() @ norm_bias.float()
    return (shift if bias is None else shift + bias.float()).to(weight.dtype)
