"""Pooling methods on heads whose right answer is known, without any model around them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rehead.convert.calibration.statistics import LayerStatistics, StatisticsGatherer
from rehead.convert.freedom import key_freedom
from rehead.convert.gauge import disguised
from rehead.convert.grouping import contiguous_groups, pair_costs, permute, similar_groups
from rehead.convert.heads import Heads, rotary_pairs
from rehead.convert.linalg import balance, ridge, sqrt_pair
from rehead.convert.methods.registry import METHOD_MODULES, MethodContext, get_method, register
from rehead.convert.regroup import reconstruction_error, regroup
from rehead.errors import UsageError

QUERIES, SIZE, WIDTH, OUT, LENGTH = 8, 8, 24, 20, 40


def make_heads(kv: int, pairing: str = "half", dims: int = SIZE, bias: bool = False, seed: int = 0) -> Heads:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    heads = Heads(
        draw(QUERIES, SIZE, WIDTH) * 0.4,
        draw(kv, SIZE, WIDTH) * 0.4,
        draw(kv, SIZE, WIDTH),
        draw(OUT, QUERIES, SIZE),
        pairs=rotary_pairs(pairing, dims),
    )
    if bias:
        heads.q_bias, heads.k_bias, heads.v_bias = draw(QUERIES, SIZE), draw(kv, SIZE), draw(kv, SIZE)
    return heads


def attend(heads: Heads, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [S, OUT], probabilities [H, S, S]) of plain causal attention in float64."""

    def project(name: str) -> torch.Tensor:
        states = torch.einsum("hdn,sn->hsd", getattr(heads, name).double(), x)
        bias = getattr(heads, name + "_bias")
        states = states if bias is None else states + bias.double()[:, None]
        return states if name == "q" else states.repeat_interleave(heads.group_size, 0)

    def rotate(states: torch.Tensor) -> torch.Tensor:
        if not len(heads.pairs):
            return states
        real, imag = heads.pairs.unbind(1)
        turn = torch.exp(1j * torch.arange(len(x)).double()[:, None] * angles(heads))
        z = torch.complex(states[..., real], states[..., imag]) * turn
        states = states.clone()
        states[..., real], states[..., imag] = z.real, z.imag
        return states

    def normed(states: torch.Tensor) -> torch.Tensor:
        return states if heads.key_norm == "none" else states * states.square().mean(-1, keepdim=True).rsqrt()

    scores = rotate(normed(project("q"))) @ rotate(normed(project("k"))).mT * SIZE**-0.5
    p = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return torch.einsum("mhd,hsd->sm", heads.o.double(), p @ project("v")), p


def angles(heads: Heads) -> torch.Tensor:
    count = len(heads.pairs)
    return 10000 ** (-torch.arange(count).double() / max(count, 1))


def gathered(heads: Heads, x: torch.Tensor, kv: int) -> LayerStatistics:
    gatherer = StatisticsGatherer(WIDTH + 1, kv, torch.device("cpu"))
    batch = torch.cat([x, torch.ones(len(x), 1)], -1).float()[None]
    gatherer.add_inputs(batch)
    gatherer.add_attention(batch, attend(heads, x)[1].float()[None])
    return gatherer.finish(angles(heads), len(x))


def in_own_bases(heads: Heads, kv: int, rigid: bool, seed: int = 1) -> Heads:
    """Spread each KV head over several, each in a basis of its own that its freedom allows: the same function."""
    g = torch.Generator().manual_seed(seed)
    count = heads.num_kv_heads * kv
    spread = replace(
        heads,
        **{
            name: getattr(heads, name).repeat_interleave(kv, 0)
            for name in ("k", "v", "k_bias", "v_bias")
            if getattr(heads, name) is not None
        },
    )
    keys, values = [], []
    for _ in range(count):
        key = torch.eye(SIZE, dtype=torch.float64)
        real, imag = heads.pairs.unbind(1)
        radius = torch.ones(len(real)) if rigid else torch.rand(len(real), generator=g) + 0.5
        c = torch.polar(radius.double(), torch.rand(len(real), generator=g).double() * 6)
        key[real, real], key[imag, imag], key[imag, real], key[real, imag] = c.real, c.real, c.imag, -c.imag
        rest = heads.free_dims()
        key[rest[:, None], rest] = basis(len(rest), rigid, g)
        keys.append(key)
        values.append(basis(SIZE, rigid, g))
    return changed(spread, torch.stack(keys), torch.stack(values))


def basis(size: int, rigid: bool, g: torch.Generator) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=g, dtype=torch.float64)
    return torch.linalg.qr(matrix)[0] if rigid and size else matrix


def changed(heads: Heads, keys: torch.Tensor, values: torch.Tensor) -> Heads:
    """k -> A k with q -> A^-T q, v -> B v with o -> o B^-1."""
    group = heads.group_size
    back_k = torch.linalg.inv(keys).mT.repeat_interleave(group, 0)
    back_v = torch.linalg.inv(values).repeat_interleave(group, 0)
    apply = lambda m, t: None if t is None else torch.einsum("hij,hj...->hi...", m, t)  # noqa: E731
    return replace(
        heads,
        q=apply(back_k, heads.q),
        q_bias=apply(back_k, heads.q_bias),
        k=apply(keys, heads.k),
        k_bias=apply(keys, heads.k_bias),
        v=apply(values, heads.v),
        v_bias=apply(values, heads.v_bias),
        o=torch.einsum("mhj,hji->mhi", heads.o, back_v),
    )


LAYOUTS = [("half", SIZE), ("interleaved", SIZE), ("half", 4), ("none", 0)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pairing", "dims"), LAYOUTS)
@pytest.mark.parametrize(("method", "rigid"), [("procrustes", True), ("svd", True), ("svd", False)])
def test_heads_in_their_own_bases_are_recovered(method, rigid, pairing, dims, bias) -> None:
    base = make_heads(2, pairing, dims, bias)
    heads = in_own_bases(base, 2, rigid)
    x = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted, _ = attend(heads, x)
    assert torch.allclose(wanted, attend(base, x)[0], rtol=1e-6, atol=1e-6)
    context = MethodContext(statistics=gathered(heads, x, 2))
    result = regroup(heads, 2, method, context=context)
    far = attend(get_method("mean").pool(heads, 2, context), x)[0]
    error = lambda y: float((y - wanted).norm() / wanted.norm())  # noqa: E731
    assert error(attend(result.heads, x)[0]) < 1e-4
    assert error(far) > 0.1
    assert result.key_error < 1e-4
    assert result.value_error < 1e-4


@pytest.mark.parametrize("dims", [SIZE, 4])
@pytest.mark.parametrize("method", ["procrustes", "svd"])
def test_heads_under_a_norm_are_recovered_whatever_their_scale(method, dims) -> None:
    """An RMS norm of equal weights over a head keeps rotations apart and divides scales out."""
    base = replace(make_heads(2, "half", dims), key_norm="rms", k_norm=torch.ones(SIZE), q_norm=torch.ones(SIZE))
    heads = in_own_bases(base, 2, rigid=True)
    heads.k = heads.k * torch.tensor([1.0, 3.0, 0.2, 1.0])[:, None, None]
    x = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = attend(base, x)[0]
    assert torch.allclose(wanted, attend(heads, x)[0], rtol=1e-6, atol=1e-6)
    pooled = regroup(heads, 2, method, context=MethodContext(statistics=gathered(heads, x, 2))).heads
    assert float((attend(pooled, x)[0] - wanted).norm() / wanted.norm()) < 1e-4


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


@pytest.mark.parametrize("method", ["mean", "first"])
def test_errors_of_weights_are_those_of_the_definition(method) -> None:
    heads = make_heads(4)
    result = regroup(heads, 2, method)
    for name, found in (("k", result.key_error), ("v", result.value_error)):
        old, new = getattr(heads, name), getattr(result.heads, name).double().repeat_interleave(2, 0)
        assert found == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-5)
        assert found > 0.1  # or nothing was tested


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("pairing", "dims"), LAYOUTS)
def test_errors_of_forms_are_those_of_the_definition(pairing, dims, seen) -> None:
    """Every query head's q^T k, each rotary pair by itself as complex rows, and W_o W_v; on the inputs where known."""
    heads = make_heads(4, pairing, dims)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = x @ torch.diag(torch.logspace(0, -1, WIDTH, dtype=torch.float64))
    statistics = gathered(heads, x, 2) if seen else None
    if statistics is not None:
        statistics.angles = torch.ones(len(heads.pairs))  # none so slow that they are taken together
    result = regroup(heads, 2, "procrustes", context=MethodContext(statistics=statistics))
    root = torch.eye(WIDTH + 1, dtype=torch.float64) if statistics is None else statistics.input_roots[0]
    lost, size = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for head in range(QUERIES):
        forms = []
        for some in (heads.to(torch.float32), result.heads):
            rows = {n: torch.nn.functional.pad(getattr(some, n).double(), (0, 1)) @ root for n in "qkv"}
            q, k, v = rows["q"][head], rows["k"][head // some.group_size], rows["v"][head // some.group_size]
            z = lambda t: torch.complex(t[heads.pairs[:, 0]], t[heads.pairs[:, 1]])[:, None]  # noqa: E731
            pairs = z(q).conj().mT @ z(k)
            rest = q[heads.free_dims()].T @ k[heads.free_dims()]
            forms.append((torch.cat([pairs, rest[None].to(pairs)]), some.o[:, head].double() @ v))
        for i, (old, new) in enumerate(zip(*forms)):
            lost[i] += (old - new).abs().square().sum()
            size[i] += old.abs().square().sum()
    wanted = (lost / size).sqrt()
    assert [result.key_error, result.value_error] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert float(wanted.min()) > 0.1  # or nothing was tested


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHOD_MODULES)
def test_groups_do_not_see_one_another(method, bias) -> None:
    heads, others = make_heads(4, "half", 4, bias), make_heads(4, "half", 4, bias, seed=1)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    context = MethodContext(statistics=gathered(heads, x, 2))
    mixed = {
        name: torch.cat([t[: len(t) // 2], others.tensors()[name][len(t) // 2 :]])
        for name, t in heads.tensors().items()
    }
    mixed["o"] = torch.cat([heads.o[:, :4], others.o[:, 4:]], 1)
    one, other = (get_method(method).pool(h, 2, context).tensors() for h in (heads, replace(heads, **mixed)))
    for name, tensor in one.items():
        same = tensor[:, :4] - other[name][:, :4] if name == "o" else (tensor - other[name])[: len(tensor) // 2]
        assert not same.any(), name
        assert method == "random" or not torch.equal(tensor, other[name]), name


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


@pytest.mark.parametrize("method", [name for name in METHOD_MODULES if name != "random"])
def test_equal_heads_are_kept(method) -> None:
    base = make_heads(2)
    heads = replace(base, k=base.k.repeat_interleave(2, 0), v=base.v.repeat_interleave(2, 0))
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = regroup(heads, 2, method, context=MethodContext(statistics=gathered(heads, x, 2)))
    assert torch.allclose(attend(result.heads, x)[0], attend(heads, x)[0], atol=1e-5)


@pytest.mark.parametrize("method", METHOD_MODULES)
def test_same_number_of_heads_is_untouched(method) -> None:
    heads = make_heads(4)
    result = regroup(heads, 4, method)
    assert result.heads is heads
    assert (result.key_error, result.value_error) == (0, 0)


@pytest.mark.parametrize("method", METHOD_MODULES)
def test_values_that_are_fixed_are_averaged_where_they_stand(method) -> None:
    """Where something acts on the channels of V before the output reads them, neither may turn; all come in float32."""
    heads = replace(make_heads(4, bias=True).to(torch.float32), fixed_values=True)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pooled = regroup(heads, 2, method, context=MethodContext(statistics=gathered(heads, x, 2))).heads
    assert torch.equal(pooled.o, heads.o)
    if method not in ("random", "first"):
        torch.testing.assert_close(pooled.v, heads.v.unflatten(0, (2, 2)).mean(1))
        torch.testing.assert_close(pooled.v_bias, heads.v_bias.unflatten(0, (2, 2)).mean(1))
    assert {tensor.dtype for tensor in pooled.tensors().values()} == {torch.float32}


def test_svd_beats_every_method_on_what_the_layer_sees() -> None:
    heads = make_heads(8, seed=4)
    x = torch.randn(400, WIDTH, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, WIDTH, dtype=torch.float64))
    context = MethodContext(statistics=gathered(heads, x, 2))
    wanted = attend(heads, x)[0]
    loss = {
        m: float((attend(regroup(heads, 2, m, context=context).heads, x)[0] - wanted).norm()) for m in METHOD_MODULES
    }
    assert min(loss, key=loss.get) == "svd"
    assert loss["procrustes"] < loss["mean"]


def test_svd_gauge_is_balanced() -> None:
    heads = make_heads(8, seed=2)
    x = torch.randn(400, WIDTH, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, WIDTH, dtype=torch.float64))
    pooled = regroup(heads, 1, "svd", context=MethodContext(statistics=gathered(heads, x, 1))).heads
    for name in "qkv":
        old, new = getattr(heads, name).norm(dim=(1, 2)).mean(), getattr(pooled, name).norm(dim=(1, 2)).mean()
        assert 0.1 < float(new / old) < 10, name
    assert float(torch.linalg.cond(pooled.v[0].double())) < 1e3
    # Each rotary pair of the key has the old heads' root mean square norm, and so has the value as a whole.
    sizes = lambda k: k[:, heads.pairs].square().sum((2, 3)).double()  # noqa: E731
    torch.testing.assert_close(sizes(pooled.k)[0], sizes(heads.k).mean(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        pooled.v[0].norm().double(), heads.v.square().sum((1, 2)).mean().sqrt(), rtol=1e-4, atol=0
    )
    # Values and output share the singular values, but for one scale.
    value, output = torch.linalg.svdvals(pooled.v[0].double()), torch.linalg.svdvals(pooled.o.flatten(0, 1).double())
    torch.testing.assert_close(value / value[0], output / output[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("pairing", ["half", "none"])
def test_svd_shares_heads_that_are_larger_than_their_inputs(pairing: str) -> None:
    """A head of 8 over 4 inputs, with pairs that hardly turn: equal heads stay what they are."""
    base, width = regrouped_equal(make_heads(2, pairing, SIZE if pairing == "half" else 0)), 4
    heads = replace(base, **{name: getattr(base, name)[..., :width] for name in "qkv"}, o=base.o[:3])
    x = torch.randn(LENGTH, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gatherer = StatisticsGatherer(width + 1, 2, torch.device("cpu"))
    batch = torch.cat([x, torch.ones(len(x), 1)], -1).float()[None]
    gatherer.add_inputs(batch)
    gatherer.add_attention(batch, attend(heads, x)[1].float()[None])
    statistics = gatherer.finish(1e-3 * angles(heads), LENGTH)
    pooled = regroup(heads, 2, "svd", context=MethodContext(statistics=statistics)).heads
    assert pooled.k.shape == pooled.v.shape == (2, SIZE, width)
    assert torch.allclose(attend(pooled, x)[0], attend(heads, x)[0], atol=1e-4)


def test_a_layer_of_zeros_stays_one() -> None:
    """Layers that were emptied (block expansion, pruning) have no direction to share; nothing may blow up."""
    heads = Heads(
        *(torch.zeros(4, 8, WIDTH) for _ in range(3)), torch.zeros(WIDTH, 4, 8), pairs=rotary_pairs("half", 8)
    )
    x = torch.randn(64, WIDTH + 1, generator=torch.Generator().manual_seed(0))
    moment = x.T @ x / 64
    statistics = LayerStatistics(moment, moment[None], moment[None], torch.full((4,), 1e-4), 64)
    pooled = get_method("svd").pool(heads, 1, MethodContext(statistics=statistics))
    assert max(float(tensor.abs().max()) for tensor in (pooled.q, pooled.k, pooled.v, pooled.o)) < 1e-20


def test_random_is_seeded_and_first_is_first() -> None:
    heads = make_heads(4).to(torch.float32)
    draw = lambda seed: get_method("random").pool(heads, 2, MethodContext(seed=seed)).k  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(get_method("first").pool(heads, 2, MethodContext()).v, heads.v[::2])


@pytest.mark.parametrize("method", ["mean", "procrustes", "svd"])
def test_similar_grouping_finds_the_heads_that_belong_together(method) -> None:
    base = make_heads(2)
    heads = in_own_bases(base, 2, rigid=True) if method != "mean" else regrouped_equal(base)
    mixed = permute(heads, [[0], [2], [1], [3]])
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    context = MethodContext(statistics=gathered(mixed, x, 2))
    assert similar_groups(mixed, 2, method, context.statistics) == [[0, 2], [1, 3]]
    result = regroup(mixed, 2, method, "similar", replace(context, statistics=gathered(heads, x, 2)))
    assert torch.allclose(attend(result.heads, x)[0], attend(mixed, x)[0], atol=1e-3)


def regrouped_equal(base: Heads) -> Heads:
    return replace(base, k=base.k.repeat_interleave(2, 0), v=base.v.repeat_interleave(2, 0))


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


def test_square_roots_balance_and_ridge() -> None:
    a = torch.randn(9, 4, dtype=torch.float64)
    root, inverse = sqrt_pair(a @ a.T)
    assert torch.allclose(root @ inverse, torch.eye(9, dtype=torch.float64), atol=1e-6)
    left, right = torch.randn(12, 4, dtype=torch.float64) * 1e3, torch.randn(4, 9, dtype=torch.float64) * 1e-3
    x, y = balance(left, right)
    assert torch.allclose(x @ y, left @ right, atol=1e-9)
    assert torch.allclose(torch.linalg.svdvals(x), torch.linalg.svdvals(y))
    z, w = torch.randn(200, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(ridge(z.T @ z, (z @ w.T).T @ z, torch.zeros(3, 5), 1e-9), w, atol=1e-6)
    prior = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(ridge(torch.zeros(5, 5), torch.zeros(3, 5), prior, 1.0), prior)


@pytest.mark.parametrize(
    ("norm", "weight", "rotates", "rest", "head_scale"),
    [
        ("none", None, [True, True], "any", False),
        ("rms", [1.0] * 8, [True, True], "orthogonal", True),
        ("rms", [1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0], [True, False], "orthogonal", True),
        ("rms", [1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.1], [True, True], "none", True),
        ("rms_span", [1.0] * 8, [True, True], "orthogonal", False),
        ("l2", None, [True, True], "orthogonal", True),
        ("layer", [1.0] * 8, [False, False], "none", False),
        ("layer_own", [1.0] * 8, [False, False], "none", False),
    ],
)
def test_a_norm_leaves_the_freedom_that_it_cannot_see(norm, weight, rotates, rest, head_scale) -> None:
    """One head's scale is seen by a norm over all heads; subtracting the mean sees every rotation."""
    heads = replace(make_heads(4, "half", 4), key_norm=norm)
    for name in () if weight is None else ("q_norm", "k_norm"):
        one = replace(heads, **{name: torch.tensor(weight)})
        freedom = key_freedom(one)
        assert freedom.pair_rotates.tolist() == rotates
        assert freedom.rest == rest
    freedom = key_freedom(replace(heads, k_norm=None if weight is None else torch.tensor(weight).repeat(4, 1)))
    assert freedom.pair_rotates.tolist() == rotates
    assert bool(freedom.pair_scales.any()) == (norm == "none")
    assert (freedom.rest, freedom.head_scale) == (rest, head_scale)


@pytest.mark.parametrize(("norm", "fixed"), [("none", True), ("none", False), ("layer", False), ("rms", False)])
def test_a_disguise_keeps_to_the_freedom_and_uses_it(norm: str, fixed: bool) -> None:
    """What may not be turned changes places only; what may be is turned far, and the function stays."""
    heads = replace(make_heads(4, "half", 4, bias=True), key_norm=norm, fixed_values=fixed)
    if norm == "rms":  # one pair has equal weights, the other and the rest do not
        heads.q_norm = heads.k_norm = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 3.0, 4.0])
    hidden = disguised(heads, torch.Generator().manual_seed(0))
    x = torch.randn(12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(attend(hidden, x)[0], attend(heads, x)[0], atol=1e-9)
    turned = lambda new, old: (new - old.flip(0)).norm(dim=-1).amin(0) / old.norm(dim=-1).amax(0)  # noqa: E731
    keys, values = turned(hidden.k, heads.k), turned(hidden.v, heads.v)
    free = {"none": range(8), "layer": (), "rms": (0, 2)}[norm]
    assert [dim for dim in range(8) if keys[dim] > 0.05] == list(free)
    assert keys[[dim for dim in range(8) if dim not in free]].sum() == 0
    assert float(values.max()) == 0 if fixed else float(values.min()) > 0.05


def test_registry_rejects_duplicates_and_suggests() -> None:
    with pytest.raises(ValueError, match="registered already"):
        get_method("mean") and register("mean", "again")(lambda heads, kv, context: heads)
    with pytest.raises(UsageError, match="did you mean 'procrustes'"):
        get_method("procrustis")
