"""One layer's latent attention, by head: what the closed form makes, the fit moves and a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class LatentHeads:
    """Weights of one layer's latent attention.

    A token x caches ``z = down x`` and the rotated ``rope x``, R + 2P numbers for all heads. Head h scores a key j from
    a query i by ``scaling * (q_nope_h x_i . key_up_h z_j + rotated q_rope_h x_i . rotated rope x_j)`` and reads
    ``value_up_h z_j``.

    Shapes: H query heads, R latent numbers, P rotary pairs, K numbers of a head's part that does not rotate, D of its
    values, n input width, m output width.

    Attributes:
        down: [R, n]. rope: [2P, n], the real parts of all pairs, then the imaginary ones.
        q_nope: [H, K, n]. q_rope: [H, 2P, n], in the order of ``rope``.
        key_up: [H, K, R]. value_up: [H, D, R].
        o: [m, H, D].
        frequencies: turn of each pair from one token to the next in radians, [P].
        scaling: factor on the dot products.
        down_bias, rope_bias, q_nope_bias, q_rope_bias, o_bias: [R], [2P], [H, K], [H, 2P], [m], or None.
    """

    down: Tensor
    rope: Tensor
    q_nope: Tensor
    q_rope: Tensor
    key_up: Tensor
    value_up: Tensor
    o: Tensor
    frequencies: Tensor
    scaling: float
    down_bias: Tensor | None = None
    rope_bias: Tensor | None = None
    q_nope_bias: Tensor | None = None
    q_rope_bias: Tensor | None = None
    o_bias: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.q_nope.shape[0]

    @property
    def rank(self) -> int:
        """Numbers of the latent."""
        return self.down.shape[0]

    @property
    def rope_dim(self) -> int:
        """Numbers of the rotated key that all heads share."""
        return self.rope.shape[0]

    @property
    def nope_dim(self) -> int:
        """Numbers of a head's queries and keys that do not rotate."""
        return self.q_nope.shape[1]

    @property
    def value_dim(self) -> int:
        return self.value_up.shape[1]

    @property
    def numbers_per_token(self) -> int:
        """What one more token adds to the cache."""
        return self.rank + self.rope_dim

    def weights(self) -> dict[str, Tensor]:
        """Every weight and bias that is there, by field name: what a fit moves."""
        names = ("down", "rope", "q_nope", "q_rope", "key_up", "value_up", "o")
        biases = ("down_bias", "rope_bias", "q_nope_bias", "q_rope_bias", "o_bias")
        return {name: tensor for name in (*names, *biases) if (tensor := getattr(self, name)) is not None}

    def with_weights(self, weights: Mapping[str, Tensor]) -> LatentHeads:
        """A copy with other weights under some of the names of :meth:`weights`."""
        changed: dict[str, Any] = dict(weights)
        return replace(self, **changed)

    def to(self, *args, **kwargs) -> LatentHeads:
        """A copy with every weight moved or cast as by :meth:`torch.Tensor.to`; frequencies stay float64."""
        moved = {name: tensor.to(*args, **kwargs) for name, tensor in self.weights().items()}
        return replace(self.with_weights(moved), frequencies=self.frequencies.to(moved["down"].device))

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(unrotated part [b, H, S, K], part to rotate [b, H, S, 2P]) of inputs [b, S, n]."""
        parts = []
        for weight, bias in ((self.q_nope, self.q_nope_bias), (self.q_rope, self.q_rope_bias)):
            flat = torch.nn.functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
            parts.append(flat.unflatten(-1, weight.shape[:2]).transpose(1, 2))
        return parts[0], parts[1]

    def cached(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(latent [b, S, R], shared key before its rotation [b, S, 2P]) of inputs [b, S, n]."""
        linear = torch.nn.functional.linear
        return linear(x, self.down, self.down_bias), linear(x, self.rope, self.rope_bias)

    def turn(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, P] for inputs [b, S, n], at positions int64 [S]; 0, 1, ... when None."""
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        angles = positions.double()[:, None] * self.frequencies.to(x.device, torch.float64)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def mixed(self, x: Tensor, positions: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the output projection reads, [b, S, H * D], of inputs [b, S, n] under causal attention.

        Args:
            positions: int64 [S]; 0, 1, ... when None.
            turn: as :meth:`turn` gives it, where it has been computed before.
        """
        cos, sin = self.turn(x, positions) if turn is None else turn
        (still, turning), (latent, shared) = self.queries(x), self.cached(x)
        keys, values = (
            (latent @ up.flatten(0, 1).T).unflatten(-1, up.shape[:2]).transpose(1, 2)
            for up in (self.key_up, self.value_up)
        )
        shared = rotated(shared, cos, sin)[:, None].expand(-1, self.num_heads, -1, -1)
        q, k = torch.cat([still, rotated(turning, cos, sin)], -1), torch.cat([keys, shared], -1)
        # One width for all three: flash kernels want it, and zeros cost less than a slower kernel.
        width = max(q.shape[-1], values.shape[-1])
        if x.is_cuda and values.shape[-1] < width:
            values = torch.nn.functional.pad(values, (0, width - values.shape[-1]))
        out = scaled_dot_product_attention(q, k, values, is_causal=True, scale=self.scaling)
        return out[..., : self.value_dim].transpose(1, 2).flatten(2)

    def project(self, mixed: Tensor) -> Tensor:
        """The attention's output [b, S, m] of what :meth:`mixed` gives."""
        return torch.nn.functional.linear(mixed, self.o.flatten(1), self.o_bias)

    def attend(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The attention's output [b, S, m] of inputs [b, S, n], causal; differentiable in every weight."""
        return self.project(self.mixed(x, positions))


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States [..., S, 2P], real parts first, turned by angles whose cosines and sines are [S, P]."""
    real, imag = states.chunk(2, -1)
    return torch.cat([real * cos - imag * sin, real * sin + imag * cos], -1)
