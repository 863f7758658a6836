"""Which layers to change: measured alone, chosen greedily."""

import itertools

import pytest
import torch

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UsageError
from rehead.models.predictions import Predictions
from rehead.patches import calibration_tokens, patch_model
from rehead.variants.ranking import LayerSwitch, choose_layers
from rehead.variants.stack import live_variant

TOKENS = torch.randint(8, 128, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad():  # layers of clearly different weight
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_((0.3, 1.0, 0.05, 0.6, 0.1)[index])
    return model


def kl(model, layers):
    with patch_model(model, "parallel", layers=layers) as patch:
        return patch.measure(input_ids=TOKENS).kl


def test_ranking_is_what_the_patch_measures(model):
    before = model(TOKENS).logits
    ranked = choose_layers(live_variant(model, "parallel"), TOKENS, count=0).alone
    assert [loss.kl for loss in ranked] == sorted(loss.kl for loss in ranked)
    assert sorted(loss.layer for loss in ranked) == list(range(5))
    for loss in ranked:
        assert loss.kl == pytest.approx(kl(model, [loss.layer]), rel=1e-4)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_choice_within_a_budget(model, exhaustive):
    ranked = choose_layers(live_variant(model, "parallel"), TOKENS, count=0).alone
    budget = ranked[2].kl * 2
    choice = choose_layers(live_variant(model, "parallel"), TOKENS, kl_budget=budget, exhaustive=exhaustive)
    assert 1 <= len(choice.layers) < 5
    assert choice.kl <= budget
    assert choice.kl == pytest.approx(kl(model, choice.layers), rel=1e-4)
    assert choice.path[0][0] == ranked[0].layer
    assert sorted(layer for layer, _ in choice.path) == choice.layers


def test_greedy_is_close_to_the_best_pair(model):
    choice = choose_layers(live_variant(model, "parallel"), TOKENS, count=2, exhaustive=True)
    best = min(kl(model, list(pair)) for pair in itertools.combinations(range(5), 2))
    assert choice.kl <= 1.5 * best


def test_limits(model):
    assert choose_layers(live_variant(model, "parallel"), TOKENS, kl_budget=0.0).layers == []
    assert choose_layers(live_variant(model, "parallel"), TOKENS, count=99).layers == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="kl_budget= or count="):
        choose_layers(live_variant(model, "parallel"), TOKENS)
    with pytest.raises(UsageError, match="negative"):
        choose_layers(live_variant(model, "parallel"), TOKENS, count=-1)
    with pytest.raises(UsageError, match="every chosen layer is serial"):
        choose_layers(live_variant(model, "serial"), TOKENS, count=1)


@pytest.mark.parametrize("limit", [{"kl_budget": 100.0}, {"count": 5}])
def test_a_layer_that_overflows_is_never_chosen(model, limit, monkeypatch):
    """A loss that is no number is not below any budget, and must not hide what the others cost."""
    logits = LayerSwitch._logits

    def overflowing(self, tokens):
        on = any(state.index == 2 and state.enabled for state in self.live.states)
        return Predictions.of(logits(self, tokens).whole() * (torch.nan if on and self.live.applied else 1.0))

    monkeypatch.setattr(LayerSwitch, "_logits", overflowing)
    choice = choose_layers(live_variant(model, "parallel"), TOKENS, **limit)
    assert choice.layers == [0, 1, 3, 4]
    assert choice.alone[-1].layer == 2


def test_auto(model):
    ranked = choose_layers(live_variant(model, "parallel"), TOKENS, count=0).alone
    with patch_model(model, "parallel", layers="auto", kl_budget=ranked[1].kl * 2, calibration=TOKENS) as patch:
        assert ranked[0].layer in patch.layers
        assert patch.report().measured.kl <= ranked[1].kl * 2
    with pytest.raises(UsageError, match="give more"):
        patch_model(model, "parallel", layers="auto", kl_budget=0.0, calibration=TOKENS).apply()
    with pytest.raises(UsageError, match="calibration="):
        patch_model(model, "parallel", layers="auto", kl_budget=1.0).apply()


def test_calibration_tokens():
    class Characters:
        def __call__(self, text):
            return type("Encoded", (), {"input_ids": [ord(c) % 128 for c in text]})

    tokens = calibration_tokens(Characters(), tokens=256, length=64)
    assert tokens.shape == (4, 64)
    assert len({tuple(row.tolist()) for row in tokens}) == 4
