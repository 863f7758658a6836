"""Which rotary pairs keep turning, and how a stock class says so.

A latent holds no positions: what goes into it is read as it stands. So of a layer's rotary pairs some stay as a rotated
key that all heads share, rank one each, and the rest go into the latent, turned by their mean rotation. A pair that
hardly turns over the distances that attention spans loses nothing there, so the fastest pairs are the ones to keep; and
the fastest pairs of a geometric series are such a series themselves, which every engine's plain RoPE can say. (Every
second pair, which also can be said, costs two and a half times the error.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rehead.errors import UnsupportedError
from rehead.models.heads import Heads, augmented
from rehead.variants.latent.seen import Means

#: What the pairs that stop turning may hold of all that a mean rotation cannot express.
UNFOLDED = 0.06


def fastest(angles: Tensor, count: int) -> Tensor:
    """The ``count`` pairs that turn most from one token to the next, fastest first: int64 [count].

    Args:
        angles: turn of each pair in radians, [P].
    """
    return angles.abs().argsort(descending=True, stable=True)[:count].sort().values


def turning_energy(heads: Heads, moments: Means) -> Tensor:
    """What each pair would lose if it stopped turning, as a share of all pairs' loss: float64 [P].

    Args:
        heads: the original layer.
        moments: ``inputs``, ``query_energy``, ``value_spread`` and ``mean_rotation`` of it.
    """
    assert heads.pairs is not None
    keys = augmented(heads, "k")
    pairs = heads.pairs.to(keys.device)
    inputs = moments["inputs"].double()[: keys.shape[-1], : keys.shape[-1]]
    energy = torch.einsum("kdw,wv,kdv->kd", keys, inputs, keys)  # E k_d^2
    energy = energy[:, pairs].sum(-1).repeat_interleave(heads.group_size, 0)  # [H, P]
    unfolded = 1 - moments["mean_rotation"].abs().double().square().clamp_max(1)
    weight = moments["query_energy"].double() * moments["value_spread"].double()[:, None]
    loss = (weight * unfolded * energy).sum(0)
    return loss / loss.sum().clamp_min(torch.finfo(torch.float64).tiny)


def enough_pairs(energies: Sequence[Tensor], angles: Tensor, share: float = UNFOLDED, multiple: int = 1) -> int:
    """How many of the fastest pairs to keep, so that the others hold at most ``share`` of :func:`turning_energy`.

    Args:
        energies: of each layer; a stock class has one number for all of them.
        angles: turn of each pair, [P].
        multiple: round up to a multiple of this many pairs.
    """
    mean = torch.stack([energy.to(angles.device) for energy in energies]).mean(0)
    left = 1 - mean[angles.abs().argsort(descending=True, stable=True)].cumsum(0)
    count = int((left > share).sum()) + 1
    return min(-(-count // multiple) * multiple, len(angles))


def rope_fields(frequencies: Tensor, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``rope_parameters`` under which a class turns ``len(frequencies)`` pairs at these frequencies.

    Args:
        frequencies: radians per token, [P], descending.
        original: the source's ``rope_parameters``, for frequencies that are all of its pairs but no geometric series.

    Raises:
        UnsupportedError: no plain RoPE has these frequencies.
    """
    found = frequencies.double().cpu()
    count = len(found)
    if not count:
        return {"rope_type": "default", "rope_theta": 10000.0}
    ratio = float((found[-1] / found[0]) ** (1 / (count - 1))) if count > 1 else 0.01
    series = found[0] * ratio ** torch.arange(count, dtype=torch.float64)
    if torch.allclose(series, found, rtol=1e-5, atol=0):
        theta = ratio**-count
        first = float(found[0])
        theta = round(theta) if abs(theta - round(theta)) < 1e-4 * theta and round(theta) > 1 else theta
        if abs(first - 1) < 1e-6:
            return {"rope_type": "default", "rope_theta": float(theta)}
        return {"rope_type": "linear", "rope_theta": float(theta), "factor": 1 / first}
    if original is not None:
        return {key: value for key, value in original.items() if key != "partial_rotary_factor"}
    raise UnsupportedError(
        "rope: the kept pairs' frequencies are no geometric series, which is all that plain RoPE has; "
        "keep all pairs, or so few that their frequencies are unscaled"
    )


def undecided(angles: Tensor, kept: Tensor, length: int, positions: int, turn: float = 0.5) -> list[int]:
    """Pairs that stop turning though the calibration text was too short to show what that costs.

    Args:
        angles: turn of each pair in radians per token, [P].
        kept: those that keep turning.
        length: tokens in a calibration sequence.
        positions: tokens that the model is made for.
        turn: what counts as having turned.
    """
    folded = torch.ones(len(angles), dtype=torch.bool)
    folded[kept.cpu()] = False
    speed = angles.abs().cpu()
    return (folded & (speed * length < turn) & (speed * positions >= turn)).nonzero().flatten().tolist()
