"""The closed form on layers whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_heads import SIZE, WIDTH, angles, attend, make_heads
from latent_layers import latent_moments, planted

from rehead.errors import UnsupportedError, UsageError
from rehead.models.heads import Heads
from rehead.variants.latent.gauge import resized
from rehead.variants.latent.module import LatentAttention, module_weights, with_module_weights
from rehead.variants.latent.pairs import enough_pairs, fastest, rope_fields, turning_energy
from rehead.variants.latent.solve import solve
from rehead.variants.latent.trial import trial

LENGTH = 120


def inputs(seed: int = 5, length: int = LENGTH) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(length, WIDTH, generator=g, dtype=torch.float64) @ torch.diag(
        torch.linspace(0.3, 1.5, WIDTH).double()
    )


def error(latent, heads: Heads, x: torch.Tensor) -> float:
    wanted = attend(heads, x)[0]
    wanted = wanted if heads.o_bias is None else wanted + heads.o_bias
    return float((latent.attend(x[None])[0] - wanted).norm() / wanted.norm())


def whole(heads: Heads, rank: int, x: torch.Tensor | None = None, pairs: torch.Tensor | None = None, **more):
    x = inputs() if x is None else x
    pairs = torch.arange(len(heads.pairs)) if pairs is None else pairs
    return solve(heads, latent_moments(heads, x), angles(heads), pairs, rank, **more)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pairing", "dims"), [("half", SIZE), ("interleaved", SIZE), ("half", 4)])
def test_complex_multiples_of_one_key_and_values_of_low_rank_are_exact(pairing, dims, bias) -> None:
    heads = planted(pairing, dims, 6, bias)
    assert error(whole(heads, 6 + bias).latent, heads, inputs(7)) < 1e-5
    assert error(whole(heads, 4).latent, heads, inputs(7)) > 1e-2


@pytest.mark.parametrize("kv", [1, 4, 8])
def test_every_number_of_kv_heads_is_exact_at_full_rank_where_nothing_turns(kv) -> None:
    """Slow pairs lose nothing in the latent, whatever the heads, from MQA to MHA."""
    heads, x = make_heads(kv), inputs()
    still = 1e-9 * angles(heads)
    moments = latent_moments(heads, x)
    moments = replace(moments, means={**moments.means, "mean_rotation": torch.ones(8, 4, dtype=torch.complex128)})
    latent = solve(heads, moments, still, torch.arange(1), min(WIDTH, 2 * kv * SIZE)).latent
    wanted = torch.einsum("mhd,hsd->sm", heads.o, _plain(heads, x))
    assert float((latent.attend(x[None])[0] - wanted).norm() / wanted.norm()) < 1e-5


def _plain(heads: Heads, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (torch.einsum("hdn,sn->hsd", w, x) for w in (heads.q, heads.k, heads.v))
    k, v = (t.repeat_interleave(heads.group_size, 0) for t in (k, v))
    scores = (q @ k.mT * SIZE**-0.5).masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


def test_more_rank_is_never_worse_and_the_spectrum_says_so() -> None:
    heads, x = make_heads(4), inputs()
    solution = whole(heads, WIDTH, x)
    ranks = (2, 6, 10, 16, WIDTH)
    errors = [error(whole(heads, rank, x).latent, heads, x) for rank in ranks]
    assert all(more < less for less, more in pairwise(errors))
    predicted = [solution.loss(rank) for rank in ranks]
    assert all(more < less for less, more in pairwise(predicted))
    assert errors[0] > 1.3 * errors[-1]


def test_the_residual_of_a_kept_pair_is_worth_having_in_the_latent() -> None:
    """Read with its mean rotation it lowers the error; multiplied by one, as if nothing had turned, it does not."""
    heads, x = make_heads(2), inputs()
    moments = latent_moments(heads, x)
    with_rotation = lambda turn: replace(moments, means={**moments.means, "mean_rotation": turn})  # noqa: E731
    turn = moments["mean_rotation"]
    errors = [
        error(solve(heads, with_rotation(t), angles(heads), torch.arange(2), WIDTH).latent, heads, x)
        for t in (turn, torch.ones_like(turn), torch.zeros_like(turn))
    ]
    assert errors[0] < 0.9 * errors[1]
    assert errors[0] < 0.9 * errors[2]


def test_the_latent_varies_alike_in_all_directions_and_its_factors_are_balanced() -> None:
    heads = make_heads(4)
    moments = latent_moments(heads, inputs())
    latent = whole(heads, 8).latent
    metric = (moments["inputs"] + moments["squared_inputs"][0]).double()[:-1, :-1] / 2
    spread = latent.down @ metric @ latent.down.T
    assert torch.allclose(spread, torch.eye(8).double(), atol=1e-3)
    for head in range(8):
        up = torch.linalg.svdvals(latent.value_up[head])
        assert torch.allclose(up, torch.linalg.svdvals(latent.o[:, head])[: len(up)], atol=1e-9)
    assert torch.allclose(latent.rope.square().sum() * 8, latent.q_rope.square().sum(), rtol=1e-6)


def test_head_sizes_follow_what_heads_use() -> None:
    """Keys that are multiples of one leave nothing beside the rotated part; a small rank leaves small heads."""
    heads, x = planted("half", 4, 3, bias=True), inputs(7)
    latent = whole(heads, 4).latent
    wanted = latent.attend(x[None])
    nope, value = (
        int((size > 1e-9 * size.amax()).sum(1).amax())
        for size in (up.square().sum(-1) for up in (latent.key_up, latent.value_up))  # squares of singular values
    )
    assert nope <= 4
    assert value == 3
    for sizes in ((nope, value), (16, 24)):
        other = resized(latent, *sizes)
        assert (other.nope_dim, other.value_dim) == sizes
        assert torch.allclose(other.attend(x[None]), wanted, atol=1e-7)
    assert not torch.allclose(resized(latent, nope, 2).attend(x[None]), wanted, atol=1e-2)


def test_biases_of_values_go_into_the_output_and_those_of_keys_into_the_latent() -> None:
    heads = planted("half", SIZE, 6, bias=True)
    latent = whole(heads, 7).latent
    assert latent.o_bias is not None
    assert latent.rope_bias is not None
    assert latent.q_rope_bias is not None
    values_alone = replace(heads, q_bias=None, k_bias=None)
    latent = whole(values_alone, 6).latent
    assert latent.down_bias is None
    assert error(latent, values_alone, inputs(7)) < 1e-5


def test_the_fastest_pairs_hold_what_would_be_lost() -> None:
    heads = make_heads(2)
    energy = turning_energy(heads, latent_moments(heads, inputs()))
    assert torch.isclose(energy.sum(), torch.ones(()).double())
    assert energy[0] > energy[-1]
    assert fastest(angles(heads).flip(0), 2).tolist() == [2, 3]
    assert fastest(angles(heads), 3).tolist() == [0, 1, 2]
    flat = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    assert enough_pairs([flat, flat], angles(heads), 0.06) == 3
    assert enough_pairs([flat], angles(heads), 0.2) == 2
    assert enough_pairs([flat], angles(heads), 0.06, multiple=4) == 4


def test_rope_of_the_kept_pairs() -> None:
    series = lambda theta, dims: theta ** (-torch.arange(dims // 2).double() / (dims // 2))  # noqa: E731
    assert rope_fields(series(10000.0, 64)) == {"rope_type": "default", "rope_theta": 10000.0}
    assert rope_fields(series(10000.0, 64)[:16])["rope_theta"] == 100.0
    assert rope_fields(series(10000.0, 64)[:1])["rope_type"] == "default"
    scaled = rope_fields(series(10000.0, 64) / 4)
    assert scaled["rope_type"] == "linear"
    assert scaled["factor"] == pytest.approx(4)
    bent = series(10000.0, 64) * torch.linspace(1, 0.1, 32).double()
    assert rope_fields(bent, {"rope_type": "llama3", "rope_theta": 1.0})["rope_type"] == "llama3"
    with pytest.raises(UnsupportedError, match="no geometric series"):
        rope_fields(bent)


def test_a_module_computes_what_its_heads_compute_and_every_weight_learns() -> None:
    heads, x = planted("half", SIZE, 6, bias=True), inputs().float()[None]
    latent = whole(heads, 6).latent
    module = LatentAttention(latent)
    assert torch.allclose(module(x)[0], latent.attend(x.double()).float(), atol=1e-4)
    module(x)[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    weights = module_weights(latent)
    assert set(dict(module.named_parameters())) == set(weights)
    assert torch.equal(with_module_weights(latent, weights).attend(x.double()), latent.attend(x.double()))


def test_what_cannot_be_converted_is_refused() -> None:
    heads = make_heads(2)
    moments = latent_moments(heads, inputs())
    convert = lambda h, pairs, rank: solve(h, moments, angles(h), torch.tensor(pairs), rank)  # noqa: E731
    for pairs in ([], [0, 0], [4], [-1]):
        with pytest.raises(UsageError, match="rotary pairs"):
            convert(heads, pairs, 8)
    for rank in (0, WIDTH + 1):
        with pytest.raises(UsageError, match="rank"):
            convert(heads, [0], rank)
    with pytest.raises(UnsupportedError, match="normed"):
        convert(replace(heads, key_norm="rms"), [0], 8)
    with pytest.raises(UnsupportedError, match="gate"):
        convert(replace(heads, fixed_values=True), [0], 8)
    with pytest.raises(UnsupportedError, match="rotary"):
        solve(make_heads(2, "none", 0), moments, torch.empty(0), torch.empty(0).long(), 8)
    with pytest.raises(ValueError, match="groups"):
        solve(heads, latent_moments(heads, inputs(), 2), angles(heads), torch.arange(2), 8)


def test_a_short_fit_lowers_the_error_on_sequences_that_it_does_not_see() -> None:
    heads = make_heads(2)
    x = torch.stack([inputs(seed, 32) for seed in range(32)])
    latent = whole(heads, 6, x[0], torch.arange(2)).latent.to(torch.float32)
    y = torch.stack([attend(heads, one)[0] for one in x]).float()
    closed, fitted = (trial(latent, x.float(), y, steps) for steps in (0, 60))
    assert fitted < 0.8 * closed
    held = x[-4:].float()
    wanted = float((latent.attend(held) - y[-4:]).square().sum() / y[-4:].square().sum())
    assert closed == pytest.approx(wanted, rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    pairing=st.sampled_from(["half", "interleaved"]),
    dims=st.sampled_from([4, SIZE]),
    rank=st.integers(2, 10),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whatever_is_planted_comes_out_exactly_and_less_rank_is_never_better(pairing, dims, rank, bias, seed) -> None:
    heads, x = planted(pairing, dims, rank, bias, seed), inputs(seed + 1)
    solution = whole(heads, rank + bias)
    assert error(solution.latent, heads, x) < 1e-5
    errors = [error(whole(heads, less).latent, heads, x) for less in range(1, rank + bias + 1, 3)]
    assert all(after <= before * 1.05 + 1e-6 for before, after in pairwise(errors))
