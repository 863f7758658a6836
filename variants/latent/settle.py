"""The sizes of a model's latent attention, where options leave them open."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.errors import UsageError
from rehead.variants.latent.options import LatentOptions, cache_numbers
from rehead.variants.latent.pairs import fastest
from rehead.variants.latent.sizes import rank_for

#: Tokens over which a pair has to turn by :data:`_TURN` radians to be kept where no text has been asked.
_SPAN, _TURN = 512, 2.0


def provisional_pairs(angles: Tensor) -> int:
    """Rotary pairs to keep by their frequencies alone: those that turn within some hundred tokens, in fours."""
    turning = int((angles.abs() * _SPAN >= _TURN).sum())
    return max(1, min(-(-turning // 4) * 4, len(angles)))


def settle(options: LatentOptions, angles: Tensor, numbers: int, most: int, pairs: int | None = None) -> LatentOptions:
    """Options with rank and rotary dimensions as numbers.

    Args:
        angles: turn of each of the model's rotary pairs, [P].
        numbers: what the model caches per token and layer.
        most: the largest rank that has a use.
        pairs: how many to keep where the options do not say; by their frequencies when None.

    Raises:
        UsageError: they are out of range for the model.
    """
    if options.rank is None and options.kv_cache is None:
        raise UsageError("latent: needs a size; give --latent R, or --kv-cache 33%")
    dims = options.rope_dims
    if dims is None:
        dims = 2 * (provisional_pairs(angles) if pairs is None else pairs)
        if options.kv_cache is not None:  # at least half of a small cache is for the latent
            dims = max(2, min(dims, cache_numbers(options.kv_cache, numbers) // 4 * 2))
    if dims > 2 * len(angles):
        raise UsageError(
            f"--rope-dims {dims}: the model's heads rotate {2 * len(angles)} dimensions; give that or less"
        )
    rank = options.rank
    if rank is None:
        assert options.kv_cache is not None
        rank = rank_for(cache_numbers(options.kv_cache, numbers), dims // 2, f"--kv-cache {options.kv_cache}")
    if rank > most:
        raise UsageError(f"--latent {rank}: keys and values of this model span {most} numbers; give that or less")
    if rank % 2:
        raise UsageError(
            f"--kv-cache {options.kv_cache}: beside a rotated key of {dims} numbers the latent would have {rank}, and "
            f"engines take even ranks only; give {rank + dims - 1} or {rank + dims + 1}"
        )
    return options.but(rank=rank, rope_dims=dims, kv_cache=None)


def kept_pairs(options: LatentOptions, angles: Tensor) -> Tensor:
    """Indices of the pairs that keep turning, int64."""
    assert options.rope_dims is not None
    return fastest(angles, options.rope_dims // 2).to(torch.int64)
