"""Which heads share a KV head: every partition keeps the function, the cheapest is found, costs are what is lost."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_heads import (
    LENGTH,
    WIDTH,
    attend,
    gathered,
    in_own_bases,
    make_heads,
    regrouped_equal,
)

from rehead.variants.pool.grouping import contiguous_groups, pair_costs, permute, similar_groups
from rehead.variants.pool.methods.registry import MethodContext
from rehead.variants.pool.regroup import reconstruction_error, regroup


@pytest.mark.parametrize("method", ["mean", "procrustes", "svd"])
def test_costs_are_what_pooling_two_heads_alone_would_lose(method) -> None:
    heads = make_heads(4, "half", 4)
    found = pair_costs(heads, method, None)
    assert torch.equal(found, found.mT)
    real, imag = heads.pairs.unbind(1)
    rows = torch.complex(heads.k[:, real], heads.k[:, imag]).transpose(0, 1)  # [P, K, n]
    rest = heads.k[:, heads.free_dims()]

    def lost(i: int, j: int, blocks: torch.Tensor) -> float:
        """By the nearest common head among what the method may choose from; blocks [K, D, n], real or complex."""
        one, other = blocks[i], blocks[j]
        if method == "svd":
            return float(torch.linalg.svdvals(torch.cat([one, other]))[len(one) :].square().sum())
        if method == "procrustes":
            u, _, vh = torch.linalg.svd(one @ other.mH)
            other = u @ vh @ other
        return float((one - other).abs().square().sum() / 2)

    for i in range(4):
        for j in range(i):
            keys = sum(lost(i, j, pair[:, None]) for pair in rows) + lost(i, j, rest)
            values = lost(i, j, heads.v)
            sizes = (t.square().sum((1, 2)).mean() for t in (heads.k, heads.v))
            wanted = sum(part / float(size) for part, size in zip((keys, values), sizes))
            assert float(found[i, j]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kv", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_of_two_heads_would_lose_less(kv, seed) -> None:
    heads = make_heads(8, seed=seed)
    costs, groups = pair_costs(heads, "svd", None), similar_groups(heads, kv, "svd", None)

    def total(parts: list[list[int]]) -> float:
        return sum(float(costs[i, j]) for part in parts for i in part for j in part) / 2

    assert sorted(head for group in groups for head in group) == list(range(8))
    assert {len(group) for group in groups} == {8 // kv}
    assert groups == sorted(sorted(group) for group in groups)
    for one, other in combinations(range(kv), 2):
        for i, j in product(range(8 // kv), repeat=2):
            tried = [list(group) for group in groups]
            tried[one][i], tried[other][j] = tried[other][j], tried[one][i]
            assert total(tried) >= total(groups) - 1e-9


@pytest.mark.parametrize("method", ["mean", "procrustes", "svd"])
def test_similar_grouping_finds_the_heads_that_belong_together(method) -> None:
    base = make_heads(2)
    heads = in_own_bases(base, 2, rigid=True) if method != "mean" else regrouped_equal(base)
    mixed = permute(heads, [[0], [2], [1], [3]])
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    context = MethodContext(moments=gathered(mixed, x, 4))
    assert similar_groups(mixed, 2, method, context.moments) == [[0, 2], [1, 3]]
    result = regroup(mixed, 2, method, "similar", context)
    assert torch.allclose(attend(result.heads, x)[0], attend(mixed, x)[0], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)))
def test_permuting_heads_keeps_the_function(order) -> None:
    heads = make_heads(4, bias=True)
    x = torch.randn(12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = permute(heads, [[i] for i in order])
    assert torch.allclose(attend(moved, x)[0], attend(heads, x)[0], atol=1e-10)
    assert sum(reconstruction_error(heads, heads)) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5))
def test_groups_partition_the_heads(size, count) -> None:
    groups = contiguous_groups(size * count, count)
    assert sorted(head for group in groups for head in group) == list(range(size * count))
    assert {len(group) for group in groups} == {size}
