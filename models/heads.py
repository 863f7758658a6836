"""One layer's attention weights by head: the common form that every method works on, for all checkpoint layouts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rehead.errors import UnsupportedError
from rehead.lazy import late

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")


@dataclass
class Heads:
    """Attention weights of one layer.

    Shapes: H query heads, K KV heads, D ``head_dim``, n input width, m output width.

    Attributes:
        q: [H, D, n]; k: [K, D, n]; v: [K, D, n]; o: [m, H, D] (``o[:, h]`` reads head h).
        q_bias: [H, D] or None; k_bias, v_bias: [K, D] or None; o_bias: [m] or None.
        q_norm, k_norm: weights of the query/key norm where they are resized with the heads ([H, D], [K, D]); a weight
            [D] that all heads share; or None.
        pairs: int64 [P, 2], the two dimensions of each rotary pair, real part first.
        key_norm: the family's key norm (see :data:`rehead.models.families.spec.KeyNorm`).
        norm_offset: added by the class to the stored norm weights.
        fixed_values: the basis of V must not change, since a gate or norm acts on its channels before ``o``.
        extras: tensors [H, ...] that belong to query heads and are only reordered with them (sinks, output gates), by
            their names below the attention module.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    pairs: Tensor | None = None
    key_norm: str = "none"
    norm_offset: float = 0.0
    fixed_values: bool = False
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_heads(self) -> int:
        return self.q.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        return self.q.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def tensors(self) -> dict[str, Tensor]:
        """Every weight that is not None, by field name (``pairs`` is layout, not a weight)."""
        fields = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
        return {name: tensor for name in fields if (tensor := getattr(self, name)) is not None}

    def scaled_queries(self, factor: float) -> Heads:
        """The same heads with every query multiplied by ``factor``, behind the query's norm where it has one.

        Raises:
            UnsupportedError: the norm has no weight, or a bias beside it, so that no stored number holds the factor.
        """
        if self.key_norm == "none":
            return replace(self, q=self.q * factor, q_bias=None if self.q_bias is None else self.q_bias * factor)
        if self.q_norm is None or self.key_norm == "layer":
            raise UnsupportedError(
                f"queries pass a norm ({self.key_norm}) whose weights cannot hold a factor; patch a live model instead"
            )
        return replace(self, q_norm=(self.q_norm + self.norm_offset) * factor - self.norm_offset)

    def map(self, function) -> Heads:
        """A copy with ``function`` applied to every weight."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, *args, **kwargs) -> Heads:
        """A copy with every weight moved or cast as by :meth:`torch.Tensor.to`."""
        moved = self.map(lambda tensor: tensor.to(*args, **kwargs))
        if self.pairs is not None:
            moved.pairs = self.pairs.to(moved.q.device)
        return moved

    def permute_queries(self, order: Tensor) -> Heads:
        """A copy with the query heads in another order; ``order`` int64 [H] is the old index of each new head.

        This changes which KV head a query reads, so the caller reorders the KV heads too.
        """
        moved = {name: getattr(self, name)[order] for name in ("q", "q_bias") if getattr(self, name) is not None}
        if self.q_norm is not None and self.q_norm.ndim == 2:
            moved["q_norm"] = self.q_norm[order]
        extras = {name: tensor[order.to(tensor.device)] for name, tensor in self.extras.items()}
        return replace(self, **moved, o=self.o[:, order], extras=extras)

    def free_dims(self) -> Tensor:
        """Dimensions of the head that no rotary pair covers, int64 [D - 2P]."""
        mask = torch.ones(self.head_dim, dtype=torch.bool)
        if self.pairs is not None:
            mask[self.pairs.flatten().cpu()] = False
        return mask.nonzero().flatten()


def augmented(heads: Heads, name: str) -> Tensor:
    """A projection with its bias (or zeros) as the last column: float64 [heads, D, n + 1]."""
    weight, bias = getattr(heads, name).double(), getattr(heads, name + "_bias")
    column = torch.zeros_like(weight[..., :1]) if bias is None else bias.double()[..., None]
    return torch.cat([weight, column], -1)


def rotary_pairs(pairing: str, dims: int) -> Tensor:
    """The rotary pairs over the first ``dims`` dimensions of a head: int64 [dims / 2, 2]."""
    first = torch.arange(dims // 2)
    if pairing == "half":
        return torch.stack([first, first + dims // 2], dim=1)
    if pairing == "interleaved":
        return torch.stack([2 * first, 2 * first + 1], dim=1)
    return torch.empty(0, 2, dtype=torch.int64)
