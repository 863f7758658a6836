"""The pieces of calibration alone, against their definitions: statistics, the layer-wise fit, the output refit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from known_heads import shown
from torch import nn

from rehead.healing.fit import fit_attention
from rehead.healing.gatherer import Gatherer
from rehead.healing.sight import queries_of, spread
from rehead.healing.writers import LeastSquares, OutputTarget
from rehead.models.watch import Seen, observing, probe_attention

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_are_those_of_the_definition() -> None:
    """Second moments of inputs, of inputs weighted by the attention they get, and of inputs as attention mixes them."""
    kv, heads, length, width = 2, 6, 5, 3
    gatherer = Gatherer(["key_inputs", "mixed_inputs"], kv, draw(3, heads, 2), None)
    batches = [(draw(2, length, width, seed=s), draw(2, heads, 4, length, seed=9 + s).softmax(-1)) for s in range(2)]
    for x, p in batches:
        gatherer.add_inputs(x)
        gatherer.add_attention(x, shown(p))
    moments = replace(gatherer.finish(), angles=torch.tensor([1.0, -0.1, 0.001]))
    rows = torch.cat([x.flatten(0, 1) for x, _ in batches])
    assert moments.tokens == len(rows) == 20
    torch.testing.assert_close(moments.inputs, rows.T @ rows / 20)
    assert moments.slow_pairs(0.6).tolist() == [False, True, True]
    assert moments.slow_pairs(0.5).tolist() == [False, False, True]
    for group in range(kv):
        keys, mixed, count = torch.zeros(width, width), torch.zeros(width, width), 0
        for x, p in batches:
            for b in range(2):
                for head in range(group * 3, group * 3 + 3):
                    for query in range(4):
                        weights = p[b, head, query]
                        keys += sum(w * torch.outer(t, t) for w, t in zip(weights, x[b]))
                        mixed += torch.outer(weights @ x[b], weights @ x[b])
                        count += 1
        torch.testing.assert_close(moments["key_inputs"][group], keys / count)
        torch.testing.assert_close(moments["mixed_inputs"][group], mixed / count)


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True)])
def test_attention_is_seen_as_it_is(mask: str | None, softcap: float | None, sinks: bool) -> None:
    """Some queries' rows of plain attention: the logits as they are, the probabilities after cap, mask and sinks."""
    q, k, v = draw(2, 4, 7, 8), draw(2, 2, 7, 8, seed=1), draw(2, 2, 7, 8, seed=2)
    rows, visible = torch.tensor([0, 3, 6]), torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    attention_mask, extra = None, draw(4, seed=3) if sinks else None
    if mask is not None:
        visible = visible & (draw(2, 1, 7, 7, seed=4) > -0.5) | torch.eye(7, dtype=torch.bool)
        attention_mask = visible if mask == "bool" else torch.zeros(visible.shape).masked_fill(~visible, -3.4e38)
    observed: list[Seen] = []
    with observing(observed.append, rows):
        probe_attention(nn.Module(), q, k, v, attention_mask, scaling=0.3, softcap=softcap, s_aux=extra)
        raise AssertionError("what follows is not run")
    logits = q @ k.repeat_interleave(2, 1).mT * 0.3
    capped = logits if softcap is None else softcap * (logits / softcap).tanh()
    weights = capped.masked_fill(~visible, -torch.inf).exp()
    below = weights.sum(-1, keepdim=True) + (0 if extra is None else extra.exp()[None, :, None, None])
    (seen,) = observed
    torch.testing.assert_close(seen.scores, logits[:, :, rows])
    torch.testing.assert_close(seen.probabilities, (weights / below)[:, :, rows])
    assert torch.equal(seen.visible.expand(2, 1, 3, 7), visible[:, :, rows].expand(2, 1, 3, 7))
    assert seen.scaling == 0.3


def test_positions_that_are_looked_at_come_up_all() -> None:
    for length, count in ((64, 64), (100, 7), (512, 64), (5, 9)):
        seen = [spread(length, count, number, CPU) for number in range(length)]
        assert all(len(at) == min(count, length) == len(at.unique()) and int(at.max()) < length for at in seen)
        assert len(torch.cat(seen).unique()) >= length - length % min(count, length)
    assert [queries_of(length) for length in (10, 64, 512, 2048)] == [10, 64, 64, 256]


class Products:
    """Two matrices in a row, of very different sizes, and sequences of two lengths."""

    def __init__(self) -> None:
        self.true = [draw(6, 6, seed=1) * 30, draw(6, 6, seed=2) * 0.03]
        start = [t + 0.3 * t.square().mean().sqrt() * draw(6, 6, seed=3 + i) for i, t in enumerate(self.true)]
        self.weights = {str(i): nn.Parameter(w, requires_grad=False) for i, w in enumerate(start)}
        self.x = [draw(8, 4, 6, seed=5), draw(3, 16, 6, seed=6)]
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self.path: list[dict[str, torch.Tensor]] = []

    def forward(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        return self.x[index][rows] @ self.weights["0"].T @ self.weights["1"].T

    def target(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append((index, tuple(rows.tolist())))
        self.path.append({name: weight.detach().clone() for name, weight in self.weights.items()})
        return self.x[index][rows] @ self.true[0].T @ self.true[1].T

    def error(self) -> float:
        pairs = [(self.forward(i, slice(None)), self.target(i, torch.arange(len(x)))) for i, x in enumerate(self.x)]
        return sum(float((a - b).square().sum(-1).mean()) for a, b in pairs) / 2

    def fit(self, steps: int, seed: int = 0) -> float:
        return fit_attention(self.weights, self.forward, self.target, steps, [(8, 2), (3, 1)], seed)


def test_a_fit_finds_what_it_is_asked_for_whatever_the_size_of_the_weights() -> None:
    layer = Products()
    before, start = layer.error(), {name: weight.detach().clone() for name, weight in layer.weights.items()}
    loss = layer.fit(300)
    assert layer.error() < 1e-3 * before
    assert loss < 1e-2 * before
    moved = [float((w - start[n]).norm() / start[n].norm()) for n, w in layer.weights.items()]
    assert 0.1 < moved[0] / moved[1] < 10
    assert all(weight.grad is None and not weight.requires_grad for weight in layer.weights.values())
    again, other = Products(), Products()
    assert again.fit(300) == loss
    assert torch.equal(again.weights["0"], layer.weights["0"])
    assert other.fit(300, seed=1) != loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("waits", [False, True], ids=["recorded", "waits for the GPU"])
def test_a_recorded_fit_is_the_fit_and_what_cannot_be_recorded_runs_as_it_is(waits: bool) -> None:
    true, x = [w.cuda() for w in Products().true], [part.cuda() for part in Products().x]
    losses = []
    for record in (False, True):
        weights = {name: nn.Parameter(w.detach().cuda(), requires_grad=False) for name, w in Products().weights.items()}

        def forward(index: int, rows: torch.Tensor, weights: dict[str, nn.Parameter] = weights) -> torch.Tensor:
            out = x[index][rows] @ weights["0"].T @ weights["1"].T
            return out * (1 if not waits or float(out.detach().sum()) < 1e9 else 0)

        target = lambda index, rows: x[index][rows] @ true[0].T @ true[1].T  # noqa: E731
        losses.append(fit_attention(weights, forward, target, 60, [(8, 2), (3, 1)], 0, record=record))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_fit_goes_through_all_sequences_before_it_sees_one_again() -> None:
    layer = Products()
    layer.fit(14)
    for epoch in (layer.asked[:7], layer.asked[7:]):
        assert sorted(row for index, rows in epoch for row in rows if index == 0) == list(range(8))
        assert sorted(row for index, rows in epoch for row in rows if index == 1) == list(range(3))
    assert layer.asked[:7] != layer.asked[7:]


def test_a_fit_steps_relative_to_the_weights_and_comes_to_rest() -> None:
    """Adam's first step has the rate's size in every number; the rate warms up over 20 steps and ends at nothing."""
    layer = Products()
    layer.fit(200)
    for name in layer.weights:
        at = [weights[name] for weights in layer.path]
        first, size = (at[1] - at[0]).abs(), at[0].square().mean().sqrt()
        torch.testing.assert_close(first, torch.full_like(first, float(1e-2 * size / 20)), rtol=1e-2, atol=0)
        moves = [float((b - a).norm()) for a, b in pairwise(at)]
        assert sum(moves[-10:]) < 0.02 * sum(moves[20:30])
        assert sum(moves[:3]) < 0.2 * sum(moves[20:23])


def test_a_fit_of_no_steps_changes_nothing() -> None:
    layer = Products()
    start = layer.weights["0"].detach().clone()
    assert layer.fit(0) == 0
    assert torch.equal(layer.weights["0"], start)


@pytest.mark.parametrize("bias", [False, True])
def test_an_output_refit_finds_the_projection(bias: bool) -> None:
    """Least squares over all batches; what the text does not show stays at the prior."""
    prior, start = draw(5, 12), draw(5, seed=8) if bias else None
    weight, shift = draw(5, 12, seed=1), draw(5, seed=2) * bias
    problem = LeastSquares([prior[:, :8], prior[:, 8:]], start)
    for seed in range(3):
        mixed = draw(2, 20, 12, seed=3 + seed)
        mixed[..., -1] = 0
        problem.add([mixed[..., :8], mixed[..., 8:]], mixed @ weight.T + shift)
    parts, bias_sum, errors = problem.solve()
    assert [part.shape for part in parts] == [(5, 8), (5, 4)]
    torch.testing.assert_close(torch.cat(parts, 1)[:, :-1], weight[:, :-1], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(parts[1][:, -1], prior[:, -1])
    assert errors[1] < 1e-2 < errors[0]
    assert (bias_sum is None) == (not bias)
    if bias:
        torch.testing.assert_close(bias_sum, shift, atol=2e-3, rtol=1e-3)


def test_a_target_takes_back_a_share_of_the_drift() -> None:
    clean, drift, rows = [draw(3, 4, 2), draw(2, 8, 2)], [draw(3, 4, 2, seed=1), draw(2, 8, 2, seed=2)], slice(0, 2)
    for share in (0.0, 0.5, 1.0):
        wanted = clean[1][rows] + share * drift[1][rows]
        assert torch.equal(OutputTarget(clean, drift).at(1, rows, share, CPU), wanted)
    assert torch.equal(OutputTarget(clean, None).at(0, rows, 1.0, CPU), clean[0][rows])
