"""A model's rotary embedding: by which angle each rotary pair of its heads turns at each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rehead.healing.runner import Runner
from rehead.models.heads import Heads


@dataclass
class Rotation:
    """The rotation of each rotary pair at each position.

    Attributes:
        factors: complex64 [S, P], up to the longest sequence.
        pairs: int64 [P, 2], the two dimensions of each pair, real part first.
    """

    factors: Tensor
    pairs: Tensor

    @property
    def angles(self) -> Tensor | None:
        """Radians per token that each pair turns, [P]; None without rotary pairs."""
        if not len(self.pairs) or len(self.factors) < 2:
            return None
        return (self.factors[1] / self.factors[0]).angle().cpu()

    def order(self, size: int) -> Tensor:
        """The dimensions of a head, reordered to real parts, imaginary parts, then the rest: int64 [size]."""
        rest = torch.ones(size, dtype=torch.bool)
        rest[self.pairs.flatten().cpu()] = False
        return torch.cat([self.pairs.T.flatten().cpu(), rest.nonzero().flatten()]).to(self.factors.device)

    def turn(self, states: Tensor, rows: Tensor | None = None, inverse: bool = False) -> Tensor:
        """Rotate states [..., S, D], reordered by :meth:`order`, or [..., R, D] at ``rows``; back with ``inverse``."""
        count = len(self.pairs)
        if not count:
            return states
        factors = self.factors[: states.shape[-2]] if rows is None else self.factors[rows]
        cos, sin = factors.real, -factors.imag if inverse else factors.imag
        real, imag, rest = states[..., :count], states[..., count : 2 * count], states[..., 2 * count :]
        return torch.cat([real * cos - imag * sin, real * sin + imag * cos, rest], -1)


def rotation_of(runner: Runner, layer: int, heads: Heads, length: int) -> Rotation | None:
    """A layer's rotation as the model computes it for sequences of ``length``; None where it cannot be observed."""
    pairs, device = heads.pairs, runner.device
    if pairs is None or not len(pairs):
        return Rotation(torch.ones(length, 0, dtype=torch.complex64, device=device), torch.empty(0, 2).long())
    call = runner.model.calls[runner.model.default, length][layer]
    embeddings = call.kwargs.get("position_embeddings")
    if not (isinstance(embeddings, tuple) and len(embeddings) == 2 and isinstance(embeddings[0], Tensor)):
        return None
    cos, sin = (part.float().reshape(-1, *part.shape[-2:])[0] for part in embeddings)
    count = len(pairs)
    if cos.shape[-1] == 2 * count:
        twice = bool(torch.equal(cos[:, 0::2], cos[:, 1::2]))
        cos, sin = (part[:, 0::2] if twice else part[:, :count] for part in (cos, sin))
    if cos.shape[-1] != count or len(cos) < length:
        return None
    return Rotation(torch.complex(cos, sin)[:length].to(device), pairs.to(device))
