"""Linear heads in place of normed ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_heads import QUERIES, SIZE, WIDTH, make_heads

from rehead.errors import UnsupportedError
from rehead.variants.latent.norms import linear_heads, without_norms


def fitted(weight: torch.Tensor, x: torch.Tensor):
    states = torch.einsum("hdn,sn->hsd", weight, x)
    normed = states * states.square().mean(-1, keepdim=True).rsqrt()
    wide = torch.cat([x, torch.ones(len(x), 1)], -1)
    gram, cross = wide.T @ wide / len(x), normed.mT @ wide / len(x)
    return linear_heads(gram, cross, normed.square().sum(-1).mean(-1), weight), normed


def test_keys_of_one_length_are_linear_and_others_say_how_far_from_it_they_are() -> None:
    heads, g = make_heads(2), torch.Generator().manual_seed(2)
    x = torch.randn(400, WIDTH, generator=g, dtype=torch.float64)
    u = torch.linalg.qr(heads.k.flatten(0, 1).T)[0][:, : 2 * SIZE]  # what the keys see of x
    even = torch.sign(x @ u) @ u.T
    orthogonal = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))[0]
    k = torch.stack([orthogonal @ u[:, :SIZE].T, orthogonal @ u[:, SIZE:].T])
    fit, normed = fitted(k, even)  # sums of eight signs along orthonormal rows: the same length for every token
    assert float(fit.r2.min()) > 1 - 1e-6
    assert torch.allclose(torch.einsum("hdn,sn->hsd", fit.weight, even) + fit.bias[:, None], normed, atol=1e-3)
    loose, _ = fitted(heads.k, x * torch.rand(400, 1, generator=g).double() ** 3)
    assert float(loose.r2.max()) < 0.9
    both = replace(heads, key_norm="rms", k_norm=torch.ones(SIZE), q_norm=torch.ones(SIZE))
    many = replace(fit, weight=fit.weight.repeat(QUERIES // 2, 1, 1), bias=fit.bias.repeat(4, 1), r2=fit.r2.repeat(4))
    plain = without_norms(both, many, fit)
    assert plain.key_norm == "none"
    assert plain.k_norm is None
    with pytest.raises(UnsupportedError, match="key head"):
        without_norms(both, many, loose)
