"""SVD: the shared head that is best for what the layer really sees, in closed form, in a gauge that trains.

Keys. Under RoPE a key may change by one complex number for each rotary pair, so for each pair the rows of a group's
heads, read as complex vectors and weighted by the energy of the queries that read them, are replaced by their best
rank-one approximation in the metric of the inputs; queries take the conjugate factors. Pairs so slow that they hardly
turn over a calibration sequence need not stay apart: together they are approximated like dimensions without RoPE, by
the best shared subspace, within which the basis stays as near as can be to the pairwise one (so that what little they
turn still commutes). Dimensions without RoPE allow any invertible map and get the best shared subspace outright.

Values. W_o W_v of all the query heads of a group, stacked, in the metric of the inputs as attention mixes them; its
leading right singular vectors are the shared value head, and W_o follows.

Gauge. Each of these factorisations is right as a function and, taken as it falls out, useless as a start for training,
since one factor carries a covariance's condition number. They are rebalanced: equal singular values on either side for
values, the old heads' norms for keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rehead.lazy import late
from rehead.models.freedom import KeyFreedom, key_freedom
from rehead.models.heads import Heads, augmented
from rehead.models.linalg import balance, sqrt_pair, top_rows
from rehead.variants.pool.methods.mean import grouped
from rehead.variants.pool.methods.procrustes import align
from rehead.variants.pool.methods.registry import MethodContext, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

#: Pairs that turn by less than this over a calibration sequence (radians) are approximated together.
SLOW_TURN = 0.5
_TINY = 1e-30


@register("svd", "the best shared head in closed form, weighted by what the layer sees on text", needs_calibration=True)
def svd(heads: Heads, kv: int, context: MethodContext) -> Heads:
    """Replace every group's key and value heads by the best shared ones; queries and output take up the difference.

    Raises:
        ValueError: the context has no moments.
    """
    moments = context.moments
    if moments is None:
        raise ValueError("the svd method needs calibration moments")
    freedom = key_freedom(heads)
    q, k, v = (augmented(heads, name) for name in "qkv")
    o = heads.o.double()
    new_q, new_k = q.clone(), torch.zeros(kv, *k.shape[1:], dtype=k.dtype, device=k.device)
    new_v, new_o = torch.zeros_like(new_k), torch.zeros_like(o)
    query_root, _ = moments.input_roots
    slow = moments.slow_pairs(SLOW_TURN)
    for group in range(kv):
        of_kv = slice(group * len(k) // kv, (group + 1) * len(k) // kv)
        of_q = slice(group * len(q) // kv, (group + 1) * len(q) // kv)
        key_root = sqrt_pair(moments["key_inputs"][group])
        part = _KeyGroup(q[of_q], k[of_kv], query_root, *key_root, heads, freedom)
        new_q[of_q], new_k[group] = part.solve(slow)
        if heads.fixed_values:
            new_v[group], new_o[:, of_q] = v[of_kv].mean(0), o[:, of_q]
        else:
            root = sqrt_pair(moments["mixed_inputs"][group])
            new_v[group], new_o[:, of_q] = _values(o[:, of_q], v[of_kv], *root)
    result = replace(heads, o=new_o.to(heads.o))
    for name, weight in (("q", new_q), ("k", new_k), ("v", new_v)):
        _store(result, name, weight)
    if heads.k_norm is not None and heads.k_norm.ndim == 2:
        result.k_norm = grouped(heads.k_norm, kv).mean(1)
    return result


def _store(heads: Heads, name: str, weight: Tensor) -> None:
    like = getattr(heads, name)
    setattr(heads, name, weight[..., :-1].to(like))
    if getattr(heads, name + "_bias") is not None:
        setattr(heads, name + "_bias", weight[..., -1].to(like))


@dataclass
class _KeyGroup:
    """The keys of one new group: float64; q [R, D, w] the queries that read it, k [G, D, w] its old heads."""

    q: Tensor
    k: Tensor
    query_root: Tensor
    key_root: Tensor
    key_unroot: Tensor
    heads: Heads
    freedom: KeyFreedom

    def solve(self, slow: Tensor) -> tuple[Tensor, Tensor]:
        """(new queries [R, D, w], new key [D, w])."""
        if self.freedom.head_scale:  # the norm divides a head's scale out, so heads are compared without it
            scale = (self.k @ self.key_root).pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(_TINY)
            self.k = self.k / scale * scale.mean()
        q, k = self.q.clone(), self.k.mean(0)
        pairs = self.heads.pairs
        if pairs is not None and len(pairs):
            q, k = self._pairwise(q, k, pairs.to(q.device))
            joint = slow & self.freedom.pair_scales if len(slow) == len(pairs) else None
            if joint is not None and joint.sum() > 1:
                dims = pairs[joint].to(q.device).flatten()
                q, k = self._shared_subspace(q, k, dims, basis=k[dims])
        rest = self.heads.free_dims().to(q.device)
        if len(rest):
            if self.freedom.rest == "any":
                q, k = self._shared_subspace(q, k, rest, basis=None)
            elif self.freedom.rest == "orthogonal":
                q, k = self._rotated_mean(q, k, rest)
        return q, k

    def _readers(self) -> Tensor:
        """Old KV head (within the group) that each query head of the group read: int64 [R]."""
        return torch.arange(len(self.q), device=self.q.device) // (len(self.q) // len(self.k))

    def _pairwise(self, q: Tensor, k: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        real, imag = pairs.unbind(1)
        rows = torch.complex(self.k[:, real], self.k[:, imag])  # [G, P, w]
        asked = torch.complex(self.q[:, real], self.q[:, imag])
        energy = (asked @ self.query_root.to(asked.dtype)).abs().pow(2).sum(-1)  # [R, P]
        weight = energy.unflatten(0, (len(rows), -1)).sum(1).sqrt().clamp_min(_TINY).T  # [P, G]
        seen = weight[..., None] * (rows @ self.key_root.to(rows.dtype)).transpose(0, 1)  # [P, G, w]
        _, vectors = torch.linalg.eigh(seen @ seen.mH)
        lead = vectors[..., -1]  # [P, G], the left singular vector of the best rank-one approximation
        turns, scales = self.freedom.pair_rotates.to(q.device), self.freedom.pair_scales.to(q.device)
        phase = torch.where(turns[:, None], lead / lead.abs().clamp_min(_TINY), torch.ones_like(lead))
        phase = torch.where(lead.abs() > 1e-12, phase, torch.ones_like(phase))
        mean = ((weight.pow(2) * phase.conj())[..., None] * rows.transpose(0, 1)).sum(1)
        mean = mean / weight.pow(2).sum(-1, keepdim=True)
        best = ((lead.conj() * weight)[..., None] * rows.transpose(0, 1)).sum(1)  # = s v^H in the inputs' own basis
        factor = lead / weight  # k_g is about factor_g * best
        # Scale by the old heads' root mean square norm; the factor's inverse goes to the queries.
        old = rows.abs().pow(2).sum(-1).mean(0).sqrt()
        now = best.abs().pow(2).sum(-1).sqrt()
        fit = torch.where((now > _TINY) & (old > _TINY), old / now.clamp_min(_TINY), torch.ones_like(now))
        usable = scales & (now > _TINY)
        row = torch.where(usable[:, None], best * fit[:, None], mean)
        factor = torch.where(usable[:, None], factor / fit[:, None], phase)
        k = k.clone()
        k[real], k[imag] = row.real, row.imag
        asked = asked * factor.conj().T[self._readers()][..., None]
        q = q.clone()
        q[:, real], q[:, imag] = asked.real, asked.imag
        return q, k

    def _shared_subspace(self, q: Tensor, k: Tensor, dims: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
        """Approximate some dimensions together: the best subspace of the inputs for all q^T k of the group.

        Args:
            basis: rows to stay as near to as the subspace allows, [len(dims), w]; balanced freely when None.
        """
        # A form q^T k is [w, w]; only its factors are made, a read head's rows each.
        asks = self.q[:, dims]  # [R, d, w]
        reads = self.k[self._readers()][:, dims] @ self.key_root
        seen = asks @ self.query_root
        rows = top_rows(reads.flatten(0, 1).T @ ((seen @ seen.mT) @ reads).flatten(0, 1), len(dims))  # [d, w]
        through = asks.mT @ (reads @ rows.T)  # [R, w, d], the forms within the subspace
        if basis is None:
            left, right = balance(through.flatten(0, 1), rows @ self.key_unroot)
            old, now = self.k[:, dims].pow(2).sum((1, 2)).mean().sqrt(), right.norm().clamp_min(_TINY)
            key, asked = right * (old / now), left.unflatten(0, (len(q), -1)) * (now / old.clamp_min(_TINY))
        else:
            inside = basis @ self.key_root @ rows.T  # [d, d], the basis seen within the subspace
            u, s, vh = torch.linalg.svd(inside)
            # Where a head is larger than its inputs, no key points some ways until it turns: both stay as they are.
            unread = s <= 1e-9 * s[0]
            # Directions that the pairwise rows miss would otherwise blow up the queries.
            s = s.clamp_min(max(1e-3 * float(s[0]), _TINY))
            key = (u * s.masked_fill(unread, 0)) @ vh @ rows @ self.key_unroot
            still = u[:, unread] @ u[:, unread].T
            asked = through @ (vh.T / s) @ u.T + q[:, dims].transpose(1, 2) @ still
        q, k = q.clone(), k.clone()
        k[dims], q[:, dims] = key, asked.transpose(1, 2)
        return q, k

    def _rotated_mean(self, q: Tensor, k: Tensor, dims: Tensor) -> tuple[Tensor, Tensor]:
        turns = align(self.k[:, dims])
        q, k = q.clone(), k.clone()
        k[dims] = (turns @ self.k[:, dims]).mean(0)
        q[:, dims] = turns[self._readers()] @ self.q[:, dims]
        return q, k


def _values(o: Tensor, v: Tensor, root: Tensor, unroot: Tensor) -> tuple[Tensor, Tensor]:
    """The best shared value head of a group.

    Args:
        o: [m, R, D] output columns of the group's query heads; v: [G, D, w] its old value heads.

    Returns:
        (new value head [D, w], new output columns [m, R, D]).
    """
    reader = torch.arange(o.shape[1], device=v.device) // (o.shape[1] // len(v))
    # W_o W_v of each head is [m, w]; through thin factors, so that nothing larger than [R * D, w] is made.
    through = (v @ root)[reader]  # [R, D, w]
    corner = torch.linalg.qr(o.transpose(0, 1), mode="r")[1]  # [R, D, D]: |o x| = |corner x|
    seen = (corner @ through).flatten(0, 1)
    rows = top_rows(seen.T @ seen, v.shape[1])
    left = torch.einsum("mrd,rde->rme", o, through @ rows.T)
    columns, value = balance(left.flatten(0, 1), rows @ unroot)
    scale = (v.pow(2).sum((1, 2)).mean().sqrt() / value.norm().clamp_min(_TINY)).clamp_min(_TINY)
    columns = (columns / scale).unflatten(0, (o.shape[1], -1)).transpose(0, 1)
    return value * scale, columns
