"""Scales that leave a latent layer's function alone: one that trains, and one that a norm does not see."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rehead.models.linalg import balance
from rehead.variants.latent.heads import LatentHeads

#: What stock classes add to the variance within the norm of the latent, whatever the config says.
NORM_EPS = 1e-6
#: Weight of that norm, by dtype: a power of two, so that no dtype rounds it. float16 has no room for a smaller latent.
LANE = {torch.float16: 8.0}
LANE_DEFAULT = 8192.0


def balanced(latent: LatentHeads, root: Tensor, unroot: Tensor) -> LatentHeads:
    """The same function with equal singular values on either side of every product that has a free basis.

    Factors as they fall out of a decomposition carry its condition number, and training on them diverges.

    Args:
        latent: float64; where queries have biases, its width counts the one that carries them.
        root, unroot: square root of the inputs' second moment and its inverse, [n, n]: queries are balanced as they
            are on inputs that vary alike in every direction.
    """
    left, key_up = balance((latent.q_nope @ root).mT, latent.key_up)
    columns, value_up = balance(latent.o.transpose(0, 1), latent.value_up)
    q_nope, o = left.mT @ unroot, columns.transpose(0, 1).contiguous()
    rope, q_rope = _even_pairs(latent.rope, latent.q_rope)
    return replace(latent, q_nope=q_nope, key_up=key_up, value_up=value_up, o=o, rope=rope, q_rope=q_rope)


def resized(latent: LatentHeads, nope_dim: int, value_dim: int) -> LatentHeads:
    """A balanced layer with other head sizes: its smallest directions cut off, or zeros added.

    Args:
        nope_dim, value_dim: sizes that an engine takes; none is lost down to the directions that heads use.
    """

    def fit(weight: Tensor, size: int, dim: int) -> Tensor:
        kept = weight.narrow(dim, 0, min(size, weight.shape[dim]))
        after = [0, size - kept.shape[dim]]
        return torch.nn.functional.pad(kept, [0, 0] * (weight.ndim - 1 - dim) + after)

    changed = {name: fit(getattr(latent, name), nope_dim, 1) for name in ("q_nope", "key_up")}
    changed |= {"value_up": fit(latent.value_up, value_dim, 1), "o": fit(latent.o, value_dim, 2)}
    if latent.q_nope_bias is not None:
        changed["q_nope_bias"] = fit(latent.q_nope_bias, nope_dim, 1)
    return latent.with_weights(changed)


def _even_pairs(rope: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and queries of each rotary pair with equal norms: one real factor, which commutes with the rotation."""
    key = torch.stack(rope.chunk(2, 0)).square().sum((0, -1)).sqrt()  # [P]
    query = torch.stack(q_rope.chunk(2, 1)).square().sum((0, -1)).mean(0).sqrt()
    tiny = torch.finfo(rope.dtype).tiny
    usable = (key > tiny) & (query > tiny)
    factor = torch.where(usable, (query / key.clamp_min(tiny)).sqrt(), torch.ones_like(key)).repeat(2)
    return rope * factor[:, None], q_rope / factor[None, :, None]


def lane_weight(dtype: torch.dtype) -> float:
    """Weight of the latent's norm that makes it a constant to rounding, for weights stored in ``dtype``."""
    return LANE.get(dtype, LANE_DEFAULT)


def into_lane(down: Tensor, weight: float, eps: float = NORM_EPS) -> tuple[Tensor, Tensor]:
    """Rows of the latent so small that its RMS norm sees only its own eps, and the norm's weight that undoes it.

    ``weight * z s / sqrt(mean (z s)^2 + eps) = z`` for ``s = sqrt(eps) / weight`` and ``mean z^2 << weight^2``.

    Args:
        down: [R, ...], of latents z with a mean square near 1.

    Returns:
        (scaled rows, the norm's weight [R]).
    """
    return down * (eps**0.5 / weight), torch.full((len(down),), weight, dtype=down.dtype, device=down.device)
