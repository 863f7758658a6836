"""The solver of the logit refit: what it takes the curvature for is the curvature."""

from __future__ import annotations

import pytest
import torch

from rehead.healing import logits
from rehead.healing.logits import LogitModel, LogitTargets, _KeySide, _QuerySide
from rehead.healing.moments import Moments
from rehead.healing.rotation import Rotation
from rehead.models.heads import Heads, rotary_pairs

HEADS, KV, SIZE, WIDTH, LENGTH = 4, 2, 4, 6, 10


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [_QuerySide, _KeySide])
def test_the_curvature_of_a_heads_states_is_that_of_the_definition(kind, monkeypatch) -> None:
    """The mean of random probes of d^2 error / d states^2, against every unit vector in turn."""
    turn = torch.exp(1j * torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0.1])).to(torch.complex64)
    model = LogitModel(Rotation(turn, rotary_pairs("half", SIZE)), 0.5)
    q, k = draw(HEADS, SIZE, WIDTH), draw(KV, SIZE, WIDTH, seed=1) * torch.logspace(0, -1, SIZE)[:, None]
    rows, x = torch.tensor([3, 6, 9]), draw(2, LENGTH, WIDTH, seed=2)
    scores = model.scores(model.states(x, q, rows), model.states(x, k))
    p = scores.masked_fill(torch.arange(LENGTH) > rows[:, None], -torch.inf).softmax(-1)
    side = kind(model, [LogitTargets.of(x, rows, p, scores)], q, k)
    count = LENGTH if side.rows(0) is None else len(rows)
    exact = torch.zeros(len(side.start), SIZE, SIZE)
    for position in range(count):
        for dim in range(SIZE):
            unit = torch.zeros(2, len(side.start), count, SIZE)
            unit[:, :, position, dim] = 1
            pulled = side.pull(0, side.scores(0, model.rotation.turn(unit, side.rows(0))))
            exact[:, :, dim] += pulled[:, :, position].sum(0)
    monkeypatch.setattr(logits, "PROBES", 4000)
    probed = side.curvature()
    torch.testing.assert_close(probed, probed.mT)
    assert float((probed - exact).norm() / exact.norm()) < 0.05
    assert float(torch.linalg.eigvalsh(exact).min()) > -1e-5


def test_weights_and_states_pull_alike() -> None:
    """The gradient is the adjoint of the logits: <A dq, e> = <dq, A' e>."""
    model = LogitModel(Rotation(torch.ones(LENGTH, 0, dtype=torch.complex64), torch.empty(0, 2).long()), 0.5)
    q, k, rows, x = (
        draw(HEADS, SIZE, WIDTH),
        draw(KV, SIZE, WIDTH, seed=1),
        torch.tensor([3, 9]),
        draw(2, LENGTH, WIDTH),
    )
    p = draw(2, HEADS, 2, LENGTH, seed=3).softmax(-1)
    for kind in (_QuerySide, _KeySide):
        side = kind(model, [LogitTargets.of(x, rows, p, p)], q, k)
        change, error = draw(*side.start.shape, seed=4), draw(*p.shape, seed=5)
        errors = [error[:, :, part.queries, : part.keys] for part in side.targets[0].parts]
        weighted = (logits._weighted(part.probabilities, e) for part, e in zip(side.targets[0].parts, errors))
        forward = sum((w * now).sum() for w, now in zip(weighted, side.of(0, change)))
        torch.testing.assert_close(forward, (side.gradient(0, errors) * change).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [_QuerySide, _KeySide])
def test_parts_leave_out_only_keys_that_no_query_attends_to(kind, monkeypatch) -> None:
    """Split or not, the logits' pull on the weights is the same, and half of a causal batch is left out."""
    turn = torch.exp(1j * torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0.1])).to(torch.complex64)
    model = LogitModel(Rotation(turn, rotary_pairs("half", SIZE)), 0.5)
    q, k, x = draw(HEADS, SIZE, WIDTH), draw(KV, SIZE, WIDTH, seed=1), draw(2, LENGTH, WIDTH, seed=2)
    rows = torch.arange(LENGTH)
    p = draw(2, HEADS, LENGTH, LENGTH, seed=3).masked_fill(rows > rows[:, None], -torch.inf).softmax(-1)
    scores = draw(2, HEADS, LENGTH, LENGTH, seed=4)
    gradients, sizes = [], []
    for parts in (1, 4, LENGTH):
        monkeypatch.setitem(logits.PARTS, "cpu", parts)
        targets = [LogitTargets.of(x, rows, p, scores)]
        side = kind(model, targets, q, k)
        gradients.append((side.gradient(0, side.gaps(0)), side.curvature()))
        sizes.append(sum(part.scores[0, 0].numel() for part in targets[0].parts))
    for split in gradients[1:]:
        torch.testing.assert_close(split, gradients[0], rtol=1e-4, atol=1e-5)
    assert sizes == [100, 3 * 3 + 3 * 6 + 3 * 9 + 10, 55]


@pytest.mark.parametrize("dead", ["weights", "attention"])
def test_a_layer_without_logits_or_with_one_key_alone_stays(dead: str) -> None:
    """Emptied layers, and text whose queries all look at one token: nothing to match, and no number is lost."""
    q = (torch.zeros if dead == "weights" else torch.ones)(HEADS, SIZE, WIDTH)
    k, o = draw(KV, SIZE, WIDTH), draw(5, HEADS, SIZE)
    heads = Heads(q, k * q[:KV], k, o, pairs=torch.empty(0, 2).long())
    model = LogitModel(Rotation(torch.ones(LENGTH, 0, dtype=torch.complex64), torch.empty(0, 2).long()), 0.5)
    x, rows = draw(2, LENGTH, WIDTH + 1, seed=2), torch.tensor([0, 5])
    p = torch.zeros(2, HEADS, 2, LENGTH)
    p[..., 0] = 1
    targets = [LogitTargets.of(x, rows, p, torch.zeros(2, HEADS, 2, LENGTH))]
    moment = x.flatten(0, 1).T @ x.flatten(0, 1) / 20
    refitted = logits.refit_logits(heads, model, targets, Moments({"inputs": moment}))
    torch.testing.assert_close(refitted.q, heads.q)
    torch.testing.assert_close(refitted.k, heads.k)
