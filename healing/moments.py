"""What one layer's attention sees on the calibration text: gathered once, shared by every method and by the refit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rehead.models.linalg import eigen, roots


@dataclass
class LayerStatistics:
    """Second moments of a layer's attention inputs x~ = [x, 1] (the one carries the biases), width w = n + 1.

    Attributes:
        inputs: mean of x~ x~^T over tokens, [w, w]: what queries see.
        key_inputs: the same with each token weighted by the attention that the query heads of a new group pay to it,
            [kv, w, w]: an error in a key that nobody reads costs nothing.
        mixed_inputs: mean of z z^T with z = sum_j p_j x~_j, the inputs as attention mixes them, [kv, w, w]: values are
            only ever seen mixed.
        angles: rotation of each rotary pair between neighbouring tokens in radians, [P]; None if unknown.
        length: tokens in a calibration sequence.
        tokens: tokens counted.
    """

    inputs: Tensor
    key_inputs: Tensor
    mixed_inputs: Tensor
    angles: Tensor | None = None
    length: int = 1
    tokens: int = 0

    @cached_property
    def input_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``inputs``, float64: the pooling, its error and the refit all want them."""
        return eigen(self.inputs)

    @cached_property
    def input_roots(self) -> tuple[Tensor, Tensor]:
        """Square root of ``inputs`` and its inverse, float64 [w, w]; see :func:`~rehead.models.linalg.sqrt_pair`."""
        return roots(*self.input_eigen)

    def slow_pairs(self, turn: float) -> Tensor:
        """Pairs that turn by less than ``turn`` radians over a calibration sequence: bool [P]."""
        if self.angles is None:
            return torch.zeros(0, dtype=torch.bool)
        return self.angles.abs() * self.length < turn


@dataclass
class StatisticsGatherer:
    """Adds up :class:`LayerStatistics` batch by batch.

    Args:
        width: n + 1.
        kv: KV heads after the conversion.
        device: where the sums live.
    """

    width: int
    kv: int
    device: torch.device
    tokens: int = 0
    _inputs: Tensor = field(init=False)
    _keys: Tensor = field(init=False)
    _mixed: Tensor = field(init=False)
    _mixed_count: int = 0

    def __post_init__(self) -> None:
        shape = (self.width, self.width)
        self._inputs = torch.zeros(shape, device=self.device)
        self._keys = torch.zeros((self.kv, *shape), device=self.device)
        self._mixed = torch.zeros((self.kv, *shape), device=self.device)

    def add_inputs(self, x: Tensor) -> None:
        """Count a batch of inputs [b, S, w]."""
        flat = x.reshape(-1, x.shape[-1])
        self._inputs += flat.T @ flat
        self.tokens += len(flat)

    def add_attention(self, x: Tensor, probabilities: Tensor) -> None:
        """Count what a batch's attention does with its inputs.

        Args:
            x: [b, S, w].
            probabilities: of all or some of the queries, [b, H, R, S].
        """
        heads = probabilities.shape[1]
        flat = x.reshape(-1, x.shape[-1])
        for group in range(self.kv):
            mine = probabilities[:, group * heads // self.kv : (group + 1) * heads // self.kv]
            weight = mine.sum((1, 2)).reshape(-1, 1)
            self._keys[group] += flat.T @ (flat * weight)
            for head in mine.unbind(1):
                mixed = (head @ x).reshape(-1, x.shape[-1])
                self._mixed[group] += mixed.T @ mixed
        self._mixed_count += probabilities.shape[0] * probabilities.shape[2] * (heads // self.kv)

    def finish(self, angles: Tensor | None, length: int) -> LayerStatistics:
        """The means. Without :meth:`add_attention`, plain input statistics stand in for the weighted ones."""
        inputs = self._inputs / max(self.tokens, 1)
        if self._mixed_count:
            keys, mixed = self._keys / self._mixed_count, self._mixed / self._mixed_count
        else:
            keys = mixed = inputs.expand_as(self._keys)
        return LayerStatistics(inputs, keys, mixed, angles, length, self.tokens)
