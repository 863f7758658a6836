"""The closed form: KV heads in groups of any sizes, each group's best shared head, all in the layer's own order.

Groups grow from single heads: the two whose union adds least are merged, again and again (agglomerative clustering with
Ward's criterion). What a group loses is taken from its pairs: for one shared head, sum over pairs of what pooling those
two alone loses, times 2 / size, as sums of squares about a mean split into pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rehead.healing.moments import Moments
from rehead.models.heads import Heads
from rehead.variants.pool.grouping import pair_costs
from rehead.variants.pool.methods.registry import MethodContext
from rehead.variants.pool.regroup import regroup

METHOD = "svd"
OF_KEYS, OF_QUERIES = ("k", "v", "k_bias", "v_bias"), ("q", "q_bias")
"""Fields of :class:`~rehead.models.heads.Heads` with a row for each KV head, and for each query head."""


def groups_of(costs: Tensor, count: int) -> list[list[int]]:
    """Partition heads into ``count`` groups of any sizes.

    Args:
        costs: what pooling any two heads alone loses, [K, K], symmetric; see :func:`pair_costs`.
        count: groups, 1 to K.

    Returns:
        Sorted groups of head indices, ordered by their first head.
    """
    groups = [[head] for head in range(len(costs))]
    while len(groups) > count:
        merged = {
            (a, b): _loss(costs, groups[a] + groups[b]) - _loss(costs, groups[a]) - _loss(costs, groups[b])
            for b in range(len(groups))
            for a in range(b)
        }
        a, b = min(merged, key=lambda pair: (merged[pair], pair))
        groups[a] = sorted(groups[a] + groups.pop(b))
    return sorted(groups)


def share_heads(heads: Heads, count: int, moments: Moments) -> tuple[Heads, list[list[int]]]:
    """A layer whose KV heads are alike within ``count`` groups, every head still in its place.

    Args:
        heads: the layer.
        count: KV heads afterwards, 1 to K.
        moments: for as many groups as there are KV heads.

    Returns:
        (the layer, its KV heads repeated within each group; the old heads of each group).
    """
    groups = groups_of(pair_costs(heads, METHOD, moments).cpu(), count)
    result = heads.map(torch.clone)
    for group in (group for group in groups if len(group) > 1):
        queries = queries_of(group, heads.group_size)
        context = MethodContext(0, 0, moments.merged([group]))
        shared = regroup(_part(heads, group, queries), 1, METHOD, "contiguous", context).heads
        for name in (*OF_KEYS, *OF_QUERIES):
            if (whole := getattr(result, name)) is not None:
                whole[group if name in OF_KEYS else queries] = getattr(shared, name)
        result.o[:, queries] = shared.o
    return result, groups


def compressed(heads: Heads, groups: Sequence[Sequence[int]]) -> Heads:
    """One KV head for each group, the query heads in the groups' order; the function stays.

    ``group_size`` and methods that rest on it have no meaning for the result.
    """
    first = torch.tensor([group[0] for group in groups])
    order = torch.tensor([query for group in groups for query in queries_of(group, heads.group_size)])
    kept: dict[str, Any] = {name: tensor[first] for name in OF_KEYS if (tensor := getattr(heads, name)) is not None}
    return replace(heads.permute_queries(order), **kept)


def queries_of(group: Sequence[int], size: int) -> list[int]:
    """The query heads that read the KV heads of a group."""
    return [kv * size + at for kv in group for at in range(size)]


def _part(heads: Heads, group: list[int], queries: list[int]) -> Heads:
    """Some of a layer's KV heads with the query heads that read them."""
    parts: dict[str, Any] = {
        name: tensor[group if name in OF_KEYS else queries]
        for name in (*OF_KEYS, *OF_QUERIES)
        if (tensor := getattr(heads, name)) is not None
    }
    return replace(heads, **parts, o=heads.o[:, queries], extras={})


def _loss(costs: Tensor, group: list[int]) -> float:
    return float(costs[group][:, group].sum()) / len(group)
