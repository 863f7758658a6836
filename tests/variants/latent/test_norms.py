"""Linear heads in place of normed ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known_heads import QUERIES, SIZE, WIDTH, angles, make_heads

from rehead.errors import UnsupportedError
from rehead.healing.normed import unrotated
from rehead.healing.rotation import Rotation
from rehead.variants.latent.norms import linear_heads, without_norms


def states(weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(second moments of [x, 1, normed states] by head, the normed states [heads, S, D])."""
    plain = torch.einsum("hdn,sn->hsd", weight, x)
    normed = plain * plain.square().mean(-1, keepdim=True).rsqrt()
    wide = torch.cat([x, torch.ones(len(x), 1)], -1)
    both = torch.cat([wide.expand(len(weight), -1, -1), normed], -1)
    return both.mT @ both / len(x), normed


def test_keys_of_one_length_are_linear_and_others_say_how_far_from_it_they_are() -> None:
    heads, g = make_heads(2), torch.Generator().manual_seed(2)
    x = torch.randn(400, WIDTH, generator=g, dtype=torch.float64)
    u = torch.linalg.qr(heads.k.flatten(0, 1).T)[0][:, : 2 * SIZE]  # what the keys see of x
    even = torch.sign(x @ u) @ u.T
    orthogonal = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))[0]
    k = torch.stack([orthogonal @ u[:, :SIZE].T, orthogonal @ u[:, SIZE:].T])
    seen, normed = states(k, even)  # sums of eight signs along orthonormal rows: the same length for every token
    fit = linear_heads(seen, k)
    assert float(fit.r2.min()) > 1 - 1e-6
    assert torch.allclose(torch.einsum("hdn,sn->hsd", fit.weight, even), normed, atol=1e-3)
    loose, _ = states(heads.k, x * torch.rand(400, 1, generator=g).double() ** 3)
    assert float(linear_heads(loose, heads.k).r2.max()) < 0.9
    both = replace(heads, k=k, key_norm="rms", k_norm=torch.ones(SIZE), q_norm=torch.ones(SIZE))
    both = replace(both, q=k.repeat_interleave(QUERIES // 2, 0))
    moments = {"normed_queries": seen.repeat_interleave(QUERIES // 2, 0), "normed_keys": seen}
    plain, r2 = without_norms(both, moments)
    assert plain.key_norm == "none"
    assert plain.k_norm is None
    assert r2 > 1 - 1e-6
    with pytest.raises(UnsupportedError, match="key head"):
        without_norms(both, moments | {"normed_keys": loose})
    assert without_norms(both, moments | {"normed_keys": loose}, least=0.0)[1] < 0.9
    assert without_norms(plain, {}) == (plain, 1.0)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_states_are_turned_back_to_where_they_were_normed(pairing: str) -> None:
    heads = make_heads(2, pairing, 4)
    turn = torch.exp(1j * torch.arange(9).double()[:, None] * angles(heads)).to(torch.complex64)
    rotation = Rotation(turn, heads.pairs)
    real, imag = heads.pairs.T
    before = torch.randn(1, 2, 9, SIZE, generator=torch.Generator().manual_seed(0))
    turned = before.clone()
    whole = torch.complex(before[..., real], before[..., imag]) * turn
    turned[..., real], turned[..., imag] = whole.real, whole.imag
    assert torch.allclose(unrotated(turned, rotation), before, atol=1e-5)
    rows = torch.tensor([2, 7])
    assert torch.allclose(unrotated(turned[:, :, rows], rotation, rows), before[:, :, rows], atol=1e-5)
