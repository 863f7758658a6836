"""What latent attention asks of the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")

#: Names in :mod:`rehead.healing.moments`: ``squared_inputs`` of all query heads together (``groups = 1``), the others
#: of the layer or of each head.
NEEDS = ("inputs", "squared_inputs", "query_energy", "value_spread", "mean_rotation")


class Means(Protocol):
    """Moments by name, such as :class:`rehead.healing.moments.Moments`."""

    def __getitem__(self, name: str, /) -> Tensor: ...

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` gives, computed once for these moments."""


def one_group(moment: Tensor) -> Tensor:
    """A moment [1, w, w] or [w, w] that is of all heads together.

    Raises:
        ValueError: it is of several groups; merge them first.
    """
    if moment.ndim == 3 and len(moment) != 1:
        raise ValueError(f"moments of {len(moment)} groups of heads, where those of all heads together are needed")
    return moment.reshape(moment.shape[-2:])
