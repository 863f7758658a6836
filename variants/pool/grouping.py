"""Which heads share a KV head: in order, or the most similar ones together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.healing.moments import Moments
from rehead.lazy import late
from rehead.models.heads import Heads, augmented
from rehead.models.linalg import sqrt_pair
from rehead.variants.pool.methods.mean import kv_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")


def contiguous_groups(old: int, kv: int) -> list[list[int]]:
    """Groups of neighbouring heads."""
    size = old // kv
    return [list(range(start, start + size)) for start in range(0, old, size)]


def permute(heads: Heads, groups: list[list[int]]) -> Heads:
    """Reorder KV heads so that every group is contiguous; query heads and output columns follow, the function stays.

    Args:
        groups: a partition of the KV heads.
    """
    order = torch.tensor([head for group in groups for head in group], device=heads.k.device)
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return heads
    span = torch.arange(heads.group_size, device=order.device)
    queries = (order[:, None] * heads.group_size + span).flatten()

    moved: dict[str, Any] = {name: tensor[order] for name, tensor in kv_fields(heads).items()}
    return replace(heads.permute_queries(queries), **moved)


def similar_groups(heads: Heads, kv: int, method: str, moments: Moments | None) -> list[list[int]]:
    """Partition the KV heads into ``kv`` groups of equal size so that pooling by ``method`` loses little.

    The loss of a group is taken as the sum over its pairs of what pooling those two heads alone would lose, keys and
    values each relative to their own size, in the metric of the inputs where moments are given. Groups are found by
    agglomeration from the cheapest pairs and improved by swaps until none helps; the result is deterministic.

    Returns:
        Sorted groups of old KV head indices, ordered by their first head.
    """
    cost = pair_costs(heads, method, moments).tolist()
    size = heads.num_kv_heads // kv
    groups = _agglomerate(cost, heads.num_kv_heads, size)
    _swap(cost, groups)
    return sorted(sorted(group) for group in groups)


def pair_costs(heads: Heads, method: str, moments: Moments | None) -> Tensor:
    """What pooling any two KV heads alone would lose: [K, K], symmetric, float64, keys plus values."""
    k, v = augmented(heads, "k"), augmented(heads, "v")
    if moments is not None:
        k = k @ moments.input_roots[0]
        v = v @ sqrt_pair(moments["mixed_inputs"].mean(0))[0]
    return _key_costs(k, heads, method) + _value_costs(v, method)


def _key_costs(k: Tensor, heads: Heads, method: str) -> Tensor:
    plain = torch.cdist(k.flatten(1), k.flatten(1)).pow(2) / 2
    pairs = heads.pairs
    if method in ("procrustes", "svd") and pairs is not None and len(pairs):
        real, imag = pairs.to(k.device).unbind(1)
        z = torch.complex(k[:, real], k[:, imag])  # [K, P, w]
        inner = torch.einsum("ipw,jpw->ijp", z, z.conj()).abs()
        energy = z.abs().pow(2).sum(-1)  # [K, P]
        both = energy[:, None] + energy[None]
        if method == "procrustes":
            lost = both / 2 - inner
        else:  # the smaller eigenvalue of the pair's Gram matrix
            lost = both / 2 - ((energy[:, None] - energy[None]).pow(2) / 4 + inner.pow(2)).sqrt()
        plain = lost.clamp_min(0).sum(-1)
        rest = heads.free_dims().to(k.device)
        if len(rest):
            plain = plain + _value_costs(k[:, rest], method) * k[:, rest].pow(2).sum((1, 2)).mean()
    elif method in ("procrustes", "svd"):
        return _value_costs(k, method)
    return plain / k.pow(2).sum((1, 2)).mean()


def _value_costs(v: Tensor, method: str) -> Tensor:
    count, size = v.shape[:2]
    if method not in ("procrustes", "svd"):
        cost = torch.cdist(v.flatten(1), v.flatten(1)).pow(2) / 2
    else:
        cost = torch.zeros(count, count, dtype=v.dtype, device=v.device)
        energy = v.pow(2).sum((1, 2))
        for i in range(count):
            for j in range(i + 1, count):
                if method == "procrustes":
                    lost = (energy[i] + energy[j]) / 2 - torch.linalg.matrix_norm(v[i] @ v[j].T, "nuc")
                else:
                    both = torch.cat([v[i], v[j]])
                    lost = torch.linalg.eigvalsh(both @ both.T)[:size].clamp_min(0).sum()
                cost[i, j] = cost[j, i] = lost.clamp_min(0)
    return cost / v.pow(2).sum((1, 2)).mean()


def _agglomerate(cost: list[list[float]], count: int, size: int) -> list[list[int]]:
    """Grow one group after another: the cheapest free pair first, then whoever is cheapest to add."""
    free, groups = set(range(count)), []
    while free:
        if size == 1:
            groups.append([free.pop()])
            continue
        first, second = min(((i, j) for i in free for j in free if i < j), key=lambda ij: (cost[ij[0]][ij[1]], ij))
        group = [first, second]
        while len(group) < size:
            group.append(min(free - set(group), key=lambda i: (sum(cost[i][j] for j in group), i)))
        free -= set(group)
        groups.append(group)
    return groups


def _swap(cost: list[list[float]], groups: list[list[int]]) -> None:
    """Exchange heads between groups, in place, as long as an exchange lowers the total cost."""

    def at(head: int, group: list[int], without: int) -> float:
        return sum(cost[head][other] for other in group if other not in (head, without))

    improved = True
    while improved:
        improved = False
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                for i, x in enumerate(groups[a]):
                    for j, y in enumerate(groups[b]):
                        x = groups[a][i]
                        before = at(x, groups[a], x) + at(y, groups[b], y)
                        after = at(y, groups[a], x) + at(x, groups[b], y)
                        if after < before - 1e-12:
                            groups[a][i], groups[b][j] = y, x
                            improved = True
