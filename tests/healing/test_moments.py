"""Moments against their definitions, and coarser groups against what is gathered for them."""

from __future__ import annotations

import cmath

import pytest
import torch
from known_heads import shown

import rehead.healing.normed
import rehead.variants.prune.solve
import rehead.variants.window.sink_logit  # noqa: F401
from rehead.errors import UnsupportedError, UsageError
from rehead.healing.gatherer import Gatherer
from rehead.healing.moments import MOMENTS, SINKS, Moments
from rehead.healing.rotation import Rotation
from rehead.models.heads import rotary_pairs
from rehead.models.watch import Seen, observing, probe_attention

HEADS, KV, SIZE, LENGTH, WIDTH = 6, 3, 4, 9, 5
ROWS = torch.tensor([2, 5, 8])
ANGLES = torch.tensor([1.0, 0.1])
NAMES = tuple({"sink_logit": "sink_logit:4:1"}.get(name, name) for name in MOMENTS.names())
"""Every moment, as it is asked for."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OUTPUT = draw(7, HEADS, SIZE, seed=99)
FACTORS = torch.exp(1j * torch.arange(LENGTH)[:, None] * ANGLES).to(torch.complex64)
ROTATION = Rotation(FACTORS, rotary_pairs("half", SIZE))


def batch(seed: int) -> tuple[torch.Tensor, Seen]:
    """Inputs [2, S, w] and plain attention over queries, keys and values that have nothing to do with them."""
    q, k, v = draw(2, HEADS, LENGTH, SIZE, seed=seed), *draw(2, 2, KV, LENGTH, SIZE, seed=seed + 50)
    seen: list[Seen] = []
    with observing(seen.append, ROWS):
        probe_attention(torch.nn.Identity(), q, k, v, None)
    assert torch.equal(seen[0].queries, q[:, :, ROWS])
    assert torch.equal(seen[0].values, v)
    return draw(2, LENGTH, WIDTH, seed=seed + 100), seen[0]


BATCHES = [batch(0), batch(1)]


def gather(groups: int) -> Moments:
    gatherer = Gatherer(NAMES, groups, OUTPUT, ROTATION)
    for x, seen in BATCHES:
        gatherer.add_inputs(x)
        gatherer.add_attention(x, seen)
        gatherer.add_outputs(x, outputs(seen))
    return gatherer.finish()


def outputs(seen: Seen) -> torch.Tensor:
    """What the output projection reads, [b, R, H D]."""
    return (seen.probabilities @ seen.values.repeat_interleave(HEADS // KV, 1)).transpose(1, 2).flatten(2)


def test_what_heads_write_is_counted_once_for_each_token() -> None:
    every = torch.cat([outputs(seen).flatten(0, 1) for _, seen in BATCHES])
    torch.testing.assert_close(gather(1)["head_outputs"], every.T @ every / len(every))


def terms():
    """(head, query position, key position, attention, input of the key, value of the key, mixed value, query)."""
    for x, seen in BATCHES:
        mixed = torch.einsum("bhrs,bhsd->bhrd", seen.probabilities, seen.values.repeat_interleave(HEADS // KV, 1))
        for b in range(2):
            for h in range(HEADS):
                for r, i in enumerate(ROWS.tolist()):
                    for j in range(LENGTH):
                        yield (
                            h, i, j, float(seen.probabilities[b, h, r, j]), x[b, j],
                            seen.values[b, h // (HEADS // KV), j], mixed[b, h, r], seen.queries[b, h, r],
                        )  # fmt: skip


def test_moments_for_latents_are_those_of_the_definition() -> None:
    moments, groups = gather(2), 2
    squared, weight = torch.zeros(groups, WIDTH, WIDTH), torch.zeros(groups)
    spread, turned = torch.zeros(HEADS), torch.zeros(HEADS, 2, dtype=torch.complex64)
    all_of_it, behind_sinks = torch.zeros(HEADS), torch.zeros(HEADS)
    for h, i, j, a, x, v, o, _ in terms():
        squared[h * groups // HEADS] += a * a * torch.outer(x, x)
        weight[h * groups // HEADS] += a * a
        spread[h] += a * a * (OUTPUT[:, h] @ (v - o)).square().sum()
        all_of_it[h] += a * a
        if j >= SINKS:
            turned[h] += a * a * torch.tensor([cmath.exp(1j * float(t) * (i - j)) for t in ANGLES])
            behind_sinks[h] += a * a
    torch.testing.assert_close(moments["squared_inputs"], squared / weight[:, None, None])
    torch.testing.assert_close(moments["value_spread"], spread / all_of_it)
    torch.testing.assert_close(moments["mean_rotation"], turned / behind_sinks[:, None])
    assert float(moments["mean_rotation"].abs().max()) <= 1
    queries = torch.cat([seen.queries for _, seen in BATCHES]).transpose(1, 2).flatten(0, 1)  # [rows, H, D]
    energy = queries[:, :, :2].square() + queries[:, :, 2:].square()
    torch.testing.assert_close(moments["query_energy"], energy.mean(0))
    torch.testing.assert_close(moments.angles, ANGLES)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_coarser_groups_are_means_of_finer_ones(groups: int) -> None:
    """One pass over the text serves every number of KV heads."""
    fine, alone = gather(HEADS), gather(groups)
    size = HEADS // groups
    merged = fine.merged([list(range(at, at + size)) for at in range(0, HEADS, size)])
    assert merged.groups == groups
    assert merged.means.keys() == alone.means.keys() == set(NAMES)
    for name, mean in alone.means.items():
        torch.testing.assert_close(merged[name], mean, rtol=1e-5, atol=1e-5)
    assert alone.merged([[group] for group in range(groups)]) is alone
    assert merged.merged([list(range(groups))])["key_inputs"].shape == (1, WIDTH, WIDTH)
    assert torch.allclose(
        merged.merged([list(range(groups))])["squared_inputs"], gather(1)["squared_inputs"], atol=1e-5
    )


def test_groups_that_change_places_take_their_heads_along() -> None:
    fine = gather(HEADS)
    order = [4, 1, 0, 5, 2, 3]
    merged = fine.merged([order[:3], order[3:]])
    torch.testing.assert_close(merged["query_energy"], fine["query_energy"][order])
    torch.testing.assert_close(merged["mean_rotation"], fine["mean_rotation"][order])
    torch.testing.assert_close(merged["key_inputs"][1], fine["key_inputs"][order[3:]].mean(0))
    assert torch.equal(merged.inputs, fine.inputs)


def test_only_what_is_asked_for_is_gathered_and_attention_only_where_it_is_needed() -> None:
    assert not Gatherer(["inputs"], 2, OUTPUT, None).attends
    gatherer = Gatherer(["key_inputs"], 2, OUTPUT, None)
    assert gatherer.attends
    gatherer.add_inputs(BATCHES[0][0])
    plain = gatherer.finish()  # attention could not be seen
    assert plain.means.keys() == {"inputs", "key_inputs"}
    assert torch.equal(plain["key_inputs"][1], plain.inputs)
    assert plain.angles is None
    gatherer.add_attention(BATCHES[0][0], shown(BATCHES[0][1].probabilities))
    assert not torch.allclose(gatherer.finish()["key_inputs"][1], plain.inputs)
    with pytest.raises(UnsupportedError, match="query_energy: cannot be gathered"):
        Gatherer(["query_energy"], 2, OUTPUT, None)
    with pytest.raises(UsageError, match="moment"):
        Gatherer(["key_input"], 2, OUTPUT, None)
