"""The modules that a fused block runs with, in place of its norms and matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rehead.models.live import LayerState
from rehead.variants.fuse.norms import NormKind


class Exchange:
    """What the parts of one fused block hand each other within one forward pass."""

    def __init__(self) -> None:
        self.pieces: dict[str, Tensor] = {}
        self.held: Tensor | None = None


class FusedLinear(nn.Module):
    """One matrix in place of several that read the same input.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, trained along, or None.
        trains: whether the parameters ask for gradients.
        own: bool ``[out]``, where a bias belongs to the model; elsewhere ``bias`` is what was folded in, and stays as
            it is, since no parameter of the model could take it when it has been trained. None: everywhere.
    """

    own: Tensor | None
    fixed: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, trains: bool, own: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trains)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=trains)
        partly = bias is not None and own is not None and not bool(own.all())
        self.register_buffer("own", own.to(weight.dtype) if partly and own is not None else None, persistent=False)
        fixed = bias.detach() * (~own).to(weight.dtype) if partly and bias is not None and own is not None else None
        self.register_buffer("fixed", fixed, persistent=False)

    def full_bias(self) -> Tensor | None:
        """``[out]`` as it is added."""
        if self.bias is None or self.own is None or self.fixed is None:
            return self.bias
        return self.bias * self.own + self.fixed

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.full_bias())


class _Part(nn.Module):
    """A module that takes part in an exchange. The fused matrix is the block's, so it is not registered here again.

    Attributes:
        elsewhere: the weights that it computes with are in another module.
    """

    elsewhere = True

    def __init__(self, exchange: Exchange, matrix: FusedLinear | None = None) -> None:
        super().__init__()
        self.exchange = exchange
        self._matrix = (matrix,)

    @property
    def matrix(self) -> FusedLinear:
        (matrix,) = self._matrix
        assert matrix is not None
        return matrix


class NormAndProduct(_Part):
    """In place of a norm: normalises, makes the product and leaves each reader its piece.

    Hands on the bare normalised input. Readers that were replaced ignore it; anything else would compute with a norm
    that lacks its weight, which the proof after fusing finds out.

    Args:
        sizes: reader -> its share of the product.
        clamped: attention clamps its pieces where they are (OLMo), which autograd allows no part of a split.
    """

    def __init__(
        self,
        exchange: Exchange,
        matrix: FusedLinear,
        kind: NormKind,
        sizes: dict[str, int],
        state: LayerState,
        clamped: bool,
    ) -> None:
        super().__init__(exchange, matrix)
        self.kind, self.sizes, self.state, self.clamped = kind, sizes, state, clamped

    def forward(self, x: Tensor) -> Tensor:
        self.state.count()
        bare = self.kind.normalise(x)
        pieces = self.matrix(bare).split(list(self.sizes.values()), dim=-1)
        self.exchange.pieces.update(zip(self.sizes, (p.clone() for p in pieces) if self.clamped else pieces))
        return bare


class PassOn(nn.Module):
    """In place of the second norm of a parallel block, whose readers already have their pieces."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Piece(_Part):
    """In place of a matrix that reads the norm: its share of the product."""

    def __init__(self, exchange: Exchange, name: str) -> None:
        super().__init__(exchange)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.exchange.pieces.pop(self.name)


class Hold(_Part):
    """In place of attention's output matrix: keeps its input for the joint product, and adds nothing."""

    def __init__(self, exchange: Exchange, out_features: int) -> None:
        super().__init__(exchange)
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        self.exchange.held = x
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)


class Join(_Part):
    """In place of the FFN's output matrix: both outputs in one product."""

    def forward(self, x: Tensor) -> Tensor:
        held, self.exchange.held = self.exchange.held, None
        assert held is not None, "the FFN ran before attention"
        return self.matrix(torch.cat((held.view(*x.shape[:-1], held.shape[-1]), x), dim=-1))
