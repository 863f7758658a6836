"""What a layer's heads may be changed by, and how far off pooled ones are, against the definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_heads import (
    LAYOUTS,
    LENGTH,
    QUERIES,
    WIDTH,
    attend,
    gathered,
    make_heads,
)

from rehead.convert.prove_layout import disguised
from rehead.models.freedom import key_freedom
from rehead.variants.pool.methods.registry import MethodContext
from rehead.variants.pool.regroup import regroup


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
    moments = gathered(heads, x, 2) if seen else None
    if moments is not None:
        moments.angles = torch.ones(len(heads.pairs))  # none so slow that they are taken together
    result = regroup(heads, 2, "procrustes", context=MethodContext(moments=moments))
    root = torch.eye(WIDTH + 1, dtype=torch.float64) if moments is None else moments.input_roots[0]
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
