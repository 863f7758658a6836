"""Which changes of a key head's basis leave the layer's function unchanged: procrustes and svd may use these.

A key may be multiplied by A if the queries that read it are multiplied by A^-T, provided A commutes with everything
between the projection and the dot product: the rotary rotation of each pair, and the query/key norm.

- RoPE: one non-zero complex number for each rotary pair. No RoPE: any invertible matrix over those dimensions.
- RMS norm over a head (Qwen3, Gemma 3): lengths must stay, so rotations only, and only where the norm's weights are
  equal; and one positive scale for the whole head, which the norm divides out.
- RMS norm over all heads (OLMo 2): as above, without a scale per head.
- LayerNorm: nothing, since it subtracts the mean, which rotations change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rehead.lazy import late
from rehead.models.heads import Heads

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

Free = Literal["any", "orthogonal", "none"]


@dataclass(frozen=True)
class KeyFreedom:
    """Which changes of basis the keys of one layer allow.

    Attributes:
        pair_rotates: bool [P], rotary pairs that may be rotated.
        pair_scales: bool [P], rotary pairs that may also be scaled.
        rest: matrices allowed on the dimensions outside all pairs.
        head_scale: a whole head may be scaled, since a norm divides the scale out.
    """

    pair_rotates: Tensor
    pair_scales: Tensor
    rest: Free
    head_scale: bool


def key_freedom(heads: Heads) -> KeyFreedom:
    """The changes of basis that a layer's keys allow, by its key norm and the norm's weights."""
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
