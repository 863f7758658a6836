"""Patches on one live model together, switched layer by layer, and the variants' own meanings."""

import copy
import itertools

import pytest
import torch

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UsageError
from rehead.models.heads import Heads
from rehead.patches import patch_model
from rehead.variants.contract import VARIANTS

TOKENS = torch.randint(8, 120, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(model, tokens=TOKENS, **inputs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("order", itertools.permutations(("tiled", "window", "parallel")))
def test_three_patches_each_proved_or_measured(order):
    """And reverted in the order in which they came, which takes the lowest first."""
    model = tiny_model("llama")
    before, options = logits(model), {"window": {"size": 7, "sinks": 2}}
    patches = {name: patch_model(model, name, **options.get(name, {})).apply() for name in order}
    assert patches["tiled"].prove().against == "unpatched"
    together = logits(model)
    for name in ("window", "parallel"):
        measured = patches[name].measure(input_ids=TOKENS)
        assert measured.kl > 1e-3
        assert measured.residual <= 2e-5
        assert torch.equal(logits(model), together)
    for name in order:
        patches[name].revert()
    assert torch.equal(logits(model), before)


def test_a_proof_on_top_of_a_window_still_sees_wrong_attention(monkeypatch):
    from rehead.attention.attend import attend
    from rehead.errors import VerificationError

    model = tiny_model("llama")
    patch_model(model, "window", size=7).apply()
    with patch_model(model, "tiled") as patch:
        patch.prove()
        monkeypatch.setattr("rehead.attention.layer.attend", lambda call: attend(call.with_(scale=0.26)))
        with pytest.raises(VerificationError, match="differ"):
            patch.prove()


@pytest.mark.parametrize("name", ["window", "temperature", "parallel"])
def test_only_some_layers(name):
    model = tiny_model("llama", num_hidden_layers=3)
    options = {"window": {"size": 5}, "temperature": {"start": 2.0}, "parallel": {}}[name]
    wanted = {}
    for layers in ([0], [1, 2]):
        with patch_model(model, name, layers=layers, **options):
            wanted[tuple(layers)] = logits(model)
    with patch_model(model, name, **options) as patch:
        full = logits(model)
        for layers, want in wanted.items():
            with patch.only(layers):
                close(logits(model), want)
        assert torch.equal(logits(model), full)


def test_a_temperature_over_fused_products():
    """A fused parallel block leaves its attention module no parameters to tell the device from."""
    model = tiny_model("llama")
    with patch_model(model, "parallel"), patch_model(model, "temperature", start=1.3):
        want = logits(model)
    with patch_model(model, "parallel", fused=True), patch_model(model, "temperature", start=1.3):
        close(logits(model), want)


def test_a_switched_block_under_a_fused_one():
    """Fused matrices hold the form of their blocks, so they are lifted while it is switched."""
    model = tiny_model("llama")
    before = logits(model)
    with patch_model(model, "parallel") as form:
        changed = logits(model)
        with patch_model(model, "fuse") as fused:
            close(logits(model), changed)
            assert fused.prove().layers == 2
            with form.only(()):
                close(logits(model), before)
            close(logits(model), changed)
            form.revert()
            close(logits(model), before)
            assert fused.prove().layers == 2
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_window_is_its_mask(implementation, sinks):
    """On a model that was not patched before, held to eager attention with the whole mask spelled out."""
    model = tiny_model("llama", implementation)
    pad = torch.tensor([5, 0])
    place = torch.arange(30)
    row, key = place[None, :, None], place[None, None, :]
    first = pad[:, None, None]
    seen = (key <= row) & (key >= first) & ((row - key < 6) | (key < first + sinks))
    mask = torch.zeros(2, 1, 30, 30).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    positions = (place[None] - pad[:, None]).clamp(min=0)
    padding = (place[None] >= pad[:, None]).long()
    want = logits(model, attention_mask=mask, position_ids=positions)
    with patch_model(model, "window", size=6, sinks=sinks):
        got = logits(model, attention_mask=padding, position_ids=positions)
    close(got[padding.bool()], want[padding.bool()])


def test_a_narrower_window_of_the_model_stays():
    model = tiny_model("mistral", sliding_window=4)
    before = logits(model)
    with patch_model(model, "window", size=8, sinks=2):
        close(logits(model), before)


def test_layers_of_a_window_are_chosen_by_what_they_lose():
    model = tiny_model("llama", num_hidden_layers=4)
    with patch_model(model, "window", size=4, layers="auto", kl_budget=0.5, calibration=TOKENS) as patch:
        assert 1 <= len(patch.layers) < 4
        assert patch.measure().kl <= 0.5
    with pytest.raises(UsageError, match="within kl_budget"):
        patch_model(model, "window", size=4, layers="auto", kl_budget=0.0, calibration=TOKENS).apply()


def test_a_temperature_is_learned_and_folds_into_the_query():
    model = tiny_model("llama").train()
    patch = patch_model(model, "temperature").apply()
    variant = patch.variant
    trained = [p for layer in model.model.layers for p in variant.trains(layer.self_attn)]
    assert [tuple(p.shape) for p in trained] == [(4,), (4,)]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    twin, learned = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), learned)
    with torch.no_grad():
        next(iter(variant.trains(twin.model.layers[0].self_attn))).mul_(3)
    assert not torch.equal(logits(twin), learned)
    assert torch.equal(logits(model), learned)
    assert patch.measure(input_ids=TOKENS).kl > 0
    patch.revert()
    assert not any("temperature" in name for name in model.state_dict())
    patch.apply()
    assert torch.equal(logits(model), learned)
    patch.revert()


def test_weights_of_a_temperature_are_the_live_one():
    model = tiny_model("llama")
    options = VARIANTS.get("temperature").options(start=1.7)
    with patch_model(model, "temperature", start=1.7):
        want = logits(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        q, k, v = (
            w.weight.detach().unflatten(0, (-1, 16)) for w in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        heads = Heads(q, k, v, attention.o_proj.weight.detach().unflatten(1, (-1, 16)))
        changed = VARIANTS.get("temperature").weights(heads, options, None)
        attention.q_proj.weight.data.copy_(changed.q.flatten(0, 1))
    close(logits(model), want)
