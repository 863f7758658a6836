"""Latents that Rehead stored, at a scale that trains.

In the checkpoint the latent's rows are so small that the norm behind them sees its own eps alone, which makes it a
constant; the first step of any optimiser would end that. So while a student trains, its latents have their natural
scale and no norm, which is the same function, and what is written has the stored scale again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UnsupportedError
from rehead.recipes.training.output import Changed
from rehead.variants.latent.gauge import LANE_DEFAULT, NORM_EPS

#: What a stored row is multiplied with in training.
_FACTOR = LANE_DEFAULT / NORM_EPS**0.5


@dataclass(frozen=True)
class Lanes:
    """Which tensors of a model stand at another scale than in its checkpoint.

    Attributes:
        ranks: number of leading rows, by the name of the weight or bias.
    """

    ranks: dict[str, int]

    def stored(self, changed: Changed) -> Changed:
        """Trained tensors at the scale of the checkpoint."""
        return {name: self._folding(name, give) for name, give in changed.items()}

    def _folding(self, name: str, give: Callable[[], Tensor]) -> Callable[[], Tensor]:
        rank = self.ranks.get(name)
        return give if rank is None else lambda: _scaled(give(), rank, 1 / _FACTOR)


@torch.no_grad()
def lanes_off(model: nn.Module, name: str) -> Lanes:
    """Give a model's stored latents their natural scale, in place; other models are not changed.

    Args:
        name: of the checkpoint, for messages.

    Raises:
        UnsupportedError: its queries have biases, which are stored in a latent of their own.
    """
    ranks: dict[str, int] = {}
    for path, module in list(model.named_modules()):
        parts: Any = module
        if not _is_lane(getattr(parts, "kv_a_layernorm", None)):
            continue
        queries = _is_lane(getattr(parts, "q_a_layernorm", None))
        if queries and parts.q_a_proj.bias is not None:
            raise UnsupportedError(
                f"{name}: the biases of its queries are stored in a latent of their own, which would not stay one in "
                "training; recover it by converting with --refit --fit 300 instead"
            )
        for norm, projection in (("kv_a_layernorm", "kv_a_proj_with_mqa"), ("q_a_layernorm", "q_a_proj"))[
            : 1 + queries
        ]:
            rank = len(getattr(parts, norm).weight)
            setattr(parts, norm, nn.Identity())
            for leaf, parameter in getattr(parts, projection).named_parameters():
                parameter.data = _scaled(parameter.data, rank, _FACTOR)
                ranks[f"{path}.{projection}.{leaf}"] = rank
    return Lanes(ranks)


def _is_lane(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and bool((weight == LANE_DEFAULT).all())


def _scaled(weight: Tensor, rank: int, factor: float) -> Tensor:
    return torch.cat([(weight[:rank].float() * factor).to(weight.dtype), weight[rank:]])
