"""Damage by layer: each layer alone, the baseline untouched."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError
from rehead.models.live import decoder_layers
from rehead.recipes.evaluation.damage import borrowed, layer_damage
from rehead.recipes.evaluation.divergence import compare


def test_each_layer_alone_is_what_a_model_with_that_layer_gives(load, original, converted, tokens):
    baseline, model = load(original), load(converted)
    before = {name: tensor.clone() for name, tensor in baseline.state_dict().items()}
    layers = list(baseline.model.layers)
    found = layer_damage(baseline, model, tokens[:512], 64)
    assert [row.layer for row in found] == [0, 1, 2]
    # Referee: the layer's weights in a plain MHA model, its one KV head repeated for every query head.
    theirs = load_file(converted / "model.safetensors")
    for row in found:
        hybrid = load(original)
        with torch.no_grad():
            for stem in "kv":
                weight = theirs[f"model.layers.{row.layer}.self_attn.{stem}_proj.weight"]
                own = getattr(hybrid.model.layers[row.layer].self_attn, f"{stem}_proj").weight
                own.copy_(weight.repeat(len(own) // len(weight), 1))
        alone = compare(load(original), {"model": hybrid}, tokens[:512], 64)["model"]
        assert row.kl == pytest.approx(alone.kl, rel=1e-4)
        assert row.kl > 1e-3
        assert row.top1_agreement == pytest.approx(alone.top1_agreement, abs=2 / row.tokens)
    assert list(baseline.model.layers) == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in baseline.state_dict().items())


def test_equal_layers_are_left_out(load, original, tokens):
    model = load(original)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    found = layer_damage(load(original), model, tokens[:128], 64)
    assert [row.layer for row in found] == [1]
    assert layer_damage(load(original), load(original), tokens[:128], 64) == []


def test_the_layer_comes_back_when_the_measurement_fails(load, original):
    model = load(original)
    own = model.model.layers[0]
    with contextlib.suppress(KeyboardInterrupt), borrowed(model.model.layers, 0, model.model.layers[1]):
        assert model.model.layers[0] is model.model.layers[1]
        raise KeyboardInterrupt
    assert model.model.layers[0] is own


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "qwen3_moe", "gemma2", "phi3", "gpt_bigcode", "bloom", "olmo2"])
def test_any_architecture(kind):
    """Borrowing knows no architecture: a layer of another seed changes the logits, its own does not."""
    model, other = tiny_model(kind), tiny_model(kind)
    with torch.no_grad():
        for parameter in decoder_layers(other)[1].parameters():
            parameter.mul_(1.3)
    tokens = torch.randint(0, model.config.vocab_size, (96,), generator=torch.Generator().manual_seed(0))
    found = layer_damage(model, other, tokens, 16)
    assert [row.layer for row in found] == [1]
    assert found[0].kl > 0


def test_layers_of_a_derived_class_stand_in(load, original, tokens):
    """Parallel blocks derive from serial ones and may even have the same weights."""
    model = load(original)
    serial = type(model.model.layers[0])

    class Louder(serial):
        def forward(self, *args, **kwargs):
            return 1.5 * super().forward(*args, **kwargs)

    model.model.layers[0].__class__ = Louder
    for baseline, other in ((load(original), model), (model, load(original))):
        found = layer_damage(baseline, other, tokens[:128], 64)
        assert [row.layer for row in found] == [0]
        assert found[0].kl > 1e-3
    model.model.layers[1].__class__ = Louder
    assert [row.layer for row in layer_damage(load(original), model, tokens[:128], 64)] == [0, 1]


def test_layers_of_other_kinds_are_refused(load, original, copying_model):
    with pytest.raises(UnsupportedError, match="has 2 layers and the baseline 3"):
        layer_damage(load(original), copying_model(), torch.arange(64), 16)
    with pytest.raises(UnsupportedError, match="MistralDecoderLayer and the baseline's a LlamaDecoderLayer"):
        layer_damage(copying_model(), copying_model(16), torch.arange(64), 16)


def test_layers_of_another_width_are_refused(load, original):
    from transformers import LlamaForCausalLM

    config = load(original).config
    config.hidden_size *= 2  # as when what was freed goes into the hidden size; heads stay as wide as they were
    with pytest.raises(UnsupportedError, match="has a hidden_size of 64 and the baseline one of 32"):
        layer_damage(load(original), LlamaForCausalLM(config), torch.arange(64), 16)
