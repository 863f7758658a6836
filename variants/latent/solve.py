"""The closed form: one layer's grouped attention as latent attention, from what the layer sees on text.

With complex rows K_gf of the keys (KV head g, rotary pair f), S* the inputs' second moment, half plain and half
weighted by the square of the attention that a token receives, e the queries' energy, lambda the spread of values and
rho the mean rotation where attention goes (see :mod:`rehead.healing.moments`):

1. A kept pair becomes one shared row: the best rank one of [sqrt(e lambda) K_gf]_g in the metric of S*; queries take
   the conjugate factors, which commutes with the rotation.
2. What is left of the keys cannot turn, so it is read with its mean rotation: Re(conj(rho q) D x).
3. Latent: the best R directions, in the metric of S*, for what the heads read of the values and for those keys, with
   lambda as the exchange rate between the two. The eigenvalues give the error at every R from one decomposition.

Keys that are complex multiples of one another over the kept pairs and stacked values of rank R convert exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rehead.errors import UnsupportedError, UsageError
from rehead.models.heads import Heads, augmented
from rehead.models.linalg import sqrt_pair
from rehead.variants.latent.gauge import balanced
from rehead.variants.latent.heads import LatentHeads
from rehead.variants.latent.seen import Means, one_group

#: Weight of the keys' errors: their errors last over many tokens, where those of values average out. Measured: 2 to 4
#: are alike on SmolLM2-135M, 1 costs a fifth more out of domain.
CURRENCY = 2.0
_TINY = 1e-30


@dataclass(frozen=True)
class Solution:
    """A converted layer and what it loses.

    Attributes:
        latent: the layer, float64, in a gauge that trains.
        spectrum: error that each direction of the latent takes away, descending, float64: what is lost at rank R is
            ``spectrum[R:].sum()``. In squared output per token and unit of squared attention: comparable between ranks
            and choices of pairs in one layer, not an error of the output.
        rotary_loss: error of what does not turn any more though it should, which no rank takes away.
    """

    latent: LatentHeads
    spectrum: Tensor
    rotary_loss: float

    def loss(self, rank: int) -> float:
        """What is lost at a rank, in the units of ``spectrum``."""
        return float(self.spectrum[rank:].sum()) + self.rotary_loss


def solve(
    heads: Heads,
    moments: Means,
    angles: Tensor,
    pairs: Tensor,
    rank: int,
    scaling: float | None = None,
    currency: float = CURRENCY,
) -> Solution:
    """One layer as latent attention.

    Args:
        heads: the original layer: GQA, MQA or MHA, partial or whole RoPE in either pairing, biases allowed.
        moments: of x~ = [x, 1], those of :data:`~rehead.variants.latent.seen.NEEDS`.
        angles: turn of each of ``heads.pairs`` from one token to the next in radians, [P].
        pairs: indices into ``heads.pairs`` of those that keep turning, int64; see
            :func:`~rehead.variants.latent.pairs.fastest`.
        rank: numbers of the latent.
        scaling: factor on the dot products; head_dim**-0.5 when None.
        currency: weight of keys against values.

    Raises:
        UsageError: the rank or the pairs are out of range.
        UnsupportedError: a norm stands on queries or keys, or the values' basis is not free.
    """
    _check(heads, pairs, rank)
    scaling = heads.head_dim**-0.5 if scaling is None else scaling
    o_bias = _output_bias(heads)
    q, k = augmented(heads, "q"), augmented(heads, "k")
    v = torch.nn.functional.pad(heads.v.double(), (0, 1))
    inputs, squared = moments["inputs"].double(), one_group(moments["squared_inputs"]).double()
    biased = heads.q_bias is not None or heads.k_bias is not None
    if not biased:  # a one that no projection reads must not enter the latent
        q, k, v, inputs, squared = q[..., :-1], k[..., :-1], v[..., :-1], inputs[:-1, :-1], squared[:-1, :-1]
    metric = (inputs + squared) / 2
    reader = torch.arange(len(q), device=q.device) // heads.group_size
    keys = _Keys.split(heads, q, k, angles.to(q.device), pairs.to(q.device))
    rates = moments["value_spread"].double().to(q.device) * scaling**2  # [H]
    energy = moments["query_energy"].double().to(q.device)
    turn = moments["mean_rotation"].to(q.device, torch.complex128)
    rope, q_rope, shared_loss = keys.shared(energy * rates[:, None], turn, metric, reader)
    q_nope, k_nope = keys.still(turn)
    root, unroot = moments.once(f"latent metric of {len(metric)}", lambda: sqrt_pair(metric))  # of all ranks
    through = o_metric(heads.o.double(), v[reader])
    spread = torch.einsum("hkw,wv,hlv->hkl", q_nope, inputs, q_nope) * rates[:, None, None]
    gamma = through + currency * torch.einsum("hkw,hkl,hlv->wv", k_nope[reader], spread, k_nope[reader])
    values, vectors = torch.linalg.eigh(root @ gamma @ root)
    basis = vectors.flip(1)[:, :rank]  # [w, R]
    up = root @ basis
    latent = LatentHeads(
        down=basis.T @ unroot,
        rope=rope,
        q_nope=q_nope,
        q_rope=q_rope,
        key_up=(k_nope @ up)[reader],
        value_up=(v @ up)[reader],
        o=heads.o.double(),
        frequencies=angles.double().to(q.device)[pairs.to(q.device)],
        scaling=scaling,
        o_bias=o_bias,
    )
    latent = balanced(latent, root, unroot)
    latent = _with_biases(latent, heads) if biased else latent
    return Solution(latent, values.flip(0).clamp_min(0), shared_loss)


def o_metric(o: Tensor, v: Tensor) -> Tensor:
    """sum_h V_h^T O_h^T O_h V_h, [w, w], of outputs [m, H, D] and value rows [H, D, w]: what the output sees of x."""
    gram = torch.einsum("mhd,mhe->hde", o, o)
    return torch.einsum("hdw,hde,hev->wv", v, gram, v)


@dataclass
class _Keys:
    """A layer's queries [H, ., w] and keys [K, ., w], taken apart: pairs as complex rows, and what has none."""

    q: Tensor
    k: Tensor
    q_free: Tensor
    k_free: Tensor
    kept: Tensor
    factors: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def split(cls, heads: Heads, q: Tensor, k: Tensor, angles: Tensor, kept: Tensor) -> _Keys:
        pairs, free = heads.pairs, heads.free_dims().to(q.device)
        assert pairs is not None
        real, imag = pairs.to(q.device).T
        return cls(
            torch.complex(q[:, real], q[:, imag]), torch.complex(k[:, real], k[:, imag]), q[:, free], k[:, free], kept
        )

    def shared(self, weight: Tensor, turn: Tensor, metric: Tensor, reader: Tensor) -> tuple[Tensor, Tensor, float]:
        """(shared rows [2P, w], queries [H, 2P, w], what neither they nor the latent can express).

        Args:
            weight: [H, pairs], what an error of a key costs; turn: [H, pairs].
        """
        heads_per_key = len(self.q) // len(self.k)
        of_key = weight[:, self.kept].unflatten(0, (-1, heads_per_key)).sum(1).clamp_min(_TINY).sqrt()  # [K, P]
        scaled = (of_key[..., None] * self.k[:, self.kept]).transpose(0, 1)  # [P, K, w]
        _, vectors = torch.linalg.eigh(scaled @ metric.to(scaled.dtype) @ scaled.mH)
        lead = vectors[..., -1]  # [P, K]
        self.rows = (lead.conj()[:, None] @ scaled)[:, 0]  # [P, w]
        self.factors = lead.T / of_key  # k_g is about factors_g * rows
        q = self.factors[reader].conj()[..., None] * self.q[:, self.kept]
        rest, wide = self._rest(), metric.to(self.k.dtype)
        energy = torch.einsum("kpw,wv,kpv->kp", rest, wide, rest.conj()).real[reader]
        lost = float((weight * (1 - turn.abs().square().clamp_max(1)) * energy).sum()) / 2  # of Re(conj(q) k)
        return torch.cat([self.rows.real, self.rows.imag]), torch.cat([q.real, q.imag], 1), lost

    def _rest(self) -> Tensor:
        rest = self.k.clone()
        if self.rows is not None and self.factors is not None:
            rest[:, self.kept] -= self.factors[..., None] * self.rows
        return rest

    def still(self, turn: Tensor) -> tuple[Tensor, Tensor]:
        """(queries [H, D, w], keys [K, D, w]) of what does not turn, the queries with the mean rotation."""
        q, rest = turn[..., None] * self.q, self._rest()
        return torch.cat([q.real, q.imag, self.q_free], 1), torch.cat([rest.real, rest.imag, self.k_free], 1)


def _output_bias(heads: Heads) -> Tensor | None:
    """The output's bias with that of the values in it: attention weights sum to one, so it passes through as it is."""
    bias = None if heads.o_bias is None else heads.o_bias.double()
    if heads.v_bias is None:
        return bias
    through = torch.einsum("mhd,hd->m", heads.o.double(), heads.v_bias.double().repeat_interleave(heads.group_size, 0))
    return through if bias is None else bias + through


def _with_biases(latent: LatentHeads, heads: Heads) -> LatentHeads:
    """Weights of width n and biases, of weights whose last column reads the one."""
    fields: dict[str, Tensor] = {}
    having = {"down": True, "rope": heads.k_bias is not None}
    having |= dict.fromkeys(("q_nope", "q_rope"), heads.q_bias is not None)
    for name, bias in having.items():
        wide = getattr(latent, name)
        fields[name] = wide[..., :-1].contiguous()
        if bias:  # without one the column is nothing but rounding
            fields[name + "_bias"] = wide[..., -1].contiguous()
    return latent.with_weights(fields)


def _check(heads: Heads, pairs: Tensor, rank: int) -> None:
    if heads.key_norm != "none":
        raise UnsupportedError(
            "latent: queries and keys are normed per head, so keys are not linear in what is cached; "
            "give the linear keys that come nearest (rehead.variants.latent.norms)"
        )
    if heads.fixed_values:
        raise UnsupportedError("latent: a gate or norm acts on the values' channels, so their basis is not free")
    if heads.pairs is None or not len(heads.pairs):
        raise UnsupportedError("latent: the layer has no rotary pairs; keys without RoPE are a plain low-rank problem")
    count = len(heads.pairs)
    if not len(pairs) or int(pairs.min()) < 0 or int(pairs.max()) >= count or len(pairs.unique()) != len(pairs):
        raise UsageError(f"latent rotary pairs: must be 1 to {count} different ones of the layer's {count}")
    most = heads.num_kv_heads * heads.head_dim * 2
    if not 1 <= rank <= min(most, heads.q.shape[-1]):
        raise UsageError(f"latent rank {rank}: must be from 1 to {min(most, heads.q.shape[-1])}")
