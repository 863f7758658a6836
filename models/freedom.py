"""Which changes of a key head's basis leave the function alone: the freedom that procrustes and svd may use.

A key may be changed by A if the queries that read it are changed by A^-T, provided A commutes with whatever stands
between the projection and the dot product: the rotary rotation of each pair, and the query/key norm.

- RoPE: one non-zero complex number for each rotary pair. No RoPE: any invertible matrix over those dimensions.
- RMS norm over a head (Qwen3, Gemma 3): lengths must stay, so rotations only, and only where the norm's weights are
  equal; one positive scale for the whole head, which the norm divides out.
- RMS norm over all heads (OLMo 2): as above, without the scale of a head.
- LayerNorm: subtracts the mean, which no rotation keeps: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rehead.models.heads import Heads

Free = Literal["any", "orthogonal", "none"]


@dataclass(frozen=True)
class KeyFreedom:
    """What may be done to the keys of one layer.

    Attributes:
        pair_rotates: bool [P], pairs that may be rotated.
        pair_scales: bool [P], pairs that may be scaled too.
        rest: what may be done to the dimensions that no pair covers.
        head_scale: a head as a whole may be scaled, since a norm divides the scale out.
    """

    pair_rotates: Tensor
    pair_scales: Tensor
    rest: Free
    head_scale: bool


def key_freedom(heads: Heads) -> KeyFreedom:
    """The freedom of a layer's keys, read off its norm and the norm's weights."""
    pairs = heads.pairs if heads.pairs is not None else torch.empty(0, 2, dtype=torch.int64)
    yes, no = torch.ones(len(pairs), dtype=torch.bool), torch.zeros(len(pairs), dtype=torch.bool)
    norm = heads.key_norm
    if norm == "none":
        return KeyFreedom(yes, yes, "any", False)
    if norm in ("layer", "layer_own"):
        return KeyFreedom(no, no, "none", False)
    equal, rest = yes.clone(), "orthogonal"
    free = heads.free_dims()
    for weight in (heads.q_norm, heads.k_norm):
        if weight is None:
            continue
        rows = weight.detach().float().cpu().reshape(-1, weight.shape[-1])
        if len(pairs):
            equal &= torch.isclose(rows[:, pairs[:, 0]], rows[:, pairs[:, 1]], rtol=1e-6, atol=1e-8).all(0)
        if len(free) and not torch.allclose(rows[:, free], rows[:, free[:1]], rtol=1e-6, atol=1e-8):
            rest = "none"
    return KeyFreedom(equal, no, rest, norm in ("rms", "l2"))  # type: ignore[arg-type]
