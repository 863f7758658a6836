"""Pooling methods on heads whose right answer is known, without any model around them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_heads import (
    LAYOUTS,
    LENGTH,
    SIZE,
    WIDTH,
    angles,
    attend,
    gathered,
    in_own_bases,
    make_heads,
    regrouped_equal,
)

from rehead.errors import UsageError
from rehead.healing.moments import Moments
from rehead.models.heads import Heads, rotary_pairs
from rehead.models.linalg import balance, ridge, sqrt_pair
from rehead.variants.pool.methods.registry import METHOD_MODULES, METHODS, MethodContext, register
from rehead.variants.pool.regroup import regroup


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pairing", "dims"), LAYOUTS)
@pytest.mark.parametrize(("method", "rigid"), [("procrustes", True), ("svd", True), ("svd", False)])
def test_heads_in_their_own_bases_are_recovered(method, rigid, pairing, dims, bias) -> None:
    base = make_heads(2, pairing, dims, bias)
    heads = in_own_bases(base, 2, rigid)
    x = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted, _ = attend(heads, x)
    assert torch.allclose(wanted, attend(base, x)[0], rtol=1e-6, atol=1e-6)
    context = MethodContext(moments=gathered(heads, x, 2))
    result = regroup(heads, 2, method, context=context)
    far = attend(METHODS.get("mean").pool(heads, 2, context), x)[0]
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
    pooled = regroup(heads, 2, method, context=MethodContext(moments=gathered(heads, x, 2))).heads
    assert float((attend(pooled, x)[0] - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHOD_MODULES)
def test_groups_do_not_see_one_another(method, bias) -> None:
    heads, others = make_heads(4, "half", 4, bias), make_heads(4, "half", 4, bias, seed=1)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    context = MethodContext(moments=gathered(heads, x, 2))
    mixed = {
        name: torch.cat([t[: len(t) // 2], others.tensors()[name][len(t) // 2 :]])
        for name, t in heads.tensors().items()
    }
    mixed["o"] = torch.cat([heads.o[:, :4], others.o[:, 4:]], 1)
    one, other = (METHODS.get(method).pool(h, 2, context).tensors() for h in (heads, replace(heads, **mixed)))
    for name, tensor in one.items():
        same = tensor[:, :4] - other[name][:, :4] if name == "o" else (tensor - other[name])[: len(tensor) // 2]
        assert not same.any(), name
        assert method == "random" or not torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("method", [name for name in METHOD_MODULES if name != "random"])
def test_equal_heads_are_kept(method) -> None:
    base = make_heads(2)
    heads = replace(base, k=base.k.repeat_interleave(2, 0), v=base.v.repeat_interleave(2, 0))
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result = regroup(heads, 2, method, context=MethodContext(moments=gathered(heads, x, 2)))
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
    pooled = regroup(heads, 2, method, context=MethodContext(moments=gathered(heads, x, 2))).heads
    assert torch.equal(pooled.o, heads.o)
    if method not in ("random", "first"):
        torch.testing.assert_close(pooled.v, heads.v.unflatten(0, (2, 2)).mean(1))
        torch.testing.assert_close(pooled.v_bias, heads.v_bias.unflatten(0, (2, 2)).mean(1))
    assert {tensor.dtype for tensor in pooled.tensors().values()} == {torch.float32}


def test_svd_beats_every_method_on_what_the_layer_sees() -> None:
    heads = make_heads(8, seed=4)
    x = torch.randn(400, WIDTH, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, WIDTH, dtype=torch.float64))
    context = MethodContext(moments=gathered(heads, x, 2))
    wanted = attend(heads, x)[0]
    loss = {
        m: float((attend(regroup(heads, 2, m, context=context).heads, x)[0] - wanted).norm()) for m in METHOD_MODULES
    }
    assert min(loss, key=loss.get) == "svd"
    assert loss["procrustes"] < loss["mean"]


def test_svd_gauge_is_balanced() -> None:
    heads = make_heads(8, seed=2)
    x = torch.randn(400, WIDTH, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, WIDTH, dtype=torch.float64))
    pooled = regroup(heads, 1, "svd", context=MethodContext(moments=gathered(heads, x, 1))).heads
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
    moments = replace(gathered(heads, x, 2), angles=1e-3 * angles(heads))
    pooled = regroup(heads, 2, "svd", context=MethodContext(moments=moments)).heads
    assert pooled.k.shape == pooled.v.shape == (2, SIZE, width)
    assert torch.allclose(attend(pooled, x)[0], attend(heads, x)[0], atol=1e-4)


def test_a_layer_of_zeros_stays_one() -> None:
    """Layers that were emptied (block expansion, pruning) have no direction to share; nothing may blow up."""
    heads = Heads(
        *(torch.zeros(4, 8, WIDTH) for _ in range(3)), torch.zeros(WIDTH, 4, 8), pairs=rotary_pairs("half", 8)
    )
    x = torch.randn(64, WIDTH + 1, generator=torch.Generator().manual_seed(0))
    moment = x.T @ x / 64
    moments = Moments(
        {"inputs": moment, "key_inputs": moment[None], "mixed_inputs": moment[None]},
        angles=torch.full((4,), 1e-4),
        length=64,
    )
    pooled = METHODS.get("svd").pool(heads, 1, MethodContext(moments=moments))
    assert max(float(tensor.abs().max()) for tensor in (pooled.q, pooled.k, pooled.v, pooled.o)) < 1e-20


def test_random_is_seeded_and_first_is_first() -> None:
    heads = make_heads(4).to(torch.float32)
    draw = lambda seed: METHODS.get("random").pool(heads, 2, MethodContext(seed=seed)).k  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(METHODS.get("first").pool(heads, 2, MethodContext()).v, heads.v[::2])


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


def test_registry_rejects_duplicates_and_suggests() -> None:
    with pytest.raises(ValueError, match="registered already"):
        METHODS.get("mean") and register("mean", "again")(lambda heads, kv, context: heads)
    with pytest.raises(UsageError, match="did you mean 'procrustes'"):
        METHODS.get("procrustis")
