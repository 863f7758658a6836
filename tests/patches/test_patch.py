"""The machinery around a patch: applying, reverting, reporting, the registry."""

import copy

import pytest
import torch
from probes import TOKENS, logits, one_line
from torch import nn
from transformers import LlamaForCausalLM

from rehead.attention.adapters import register_adapter
from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError, UsageError
from rehead.patches import patch_model
from rehead.variants.contract import VARIANTS, Variant, VariantOptions


def test_apply_and_revert_by_hand(model):
    before = logits(model)
    patch = patch_model(model, "tiled")
    assert not patch.applied
    assert patch.apply() is patch
    assert model.config._attn_implementation == "rehead_tiled"
    patch.revert()
    assert not patch.applied
    assert torch.equal(logits(model), before)


def test_a_config_shared_by_two_models_is_changed_in_one():
    first = tiny_model("llama")
    second = LlamaForCausalLM(first.config).eval()
    assert first.config is second.config
    with patch_model(first, "tiled"):
        assert first.config is not second.config
        assert second.config._attn_implementation == "sdpa"
        assert first.model.layers[0].self_attn.config is first.config
    assert first.config is second.config


def test_nothing_of_transformers_is_changed(model):
    from transformers.models.llama import modeling_llama

    before = {
        "classes": {n: dict(vars(c)) for n, c in vars(modeling_llama).items() if isinstance(c, type)},
        "module": dict(vars(modeling_llama)),
    }
    with patch_model(model, "tiled"):
        logits(model)
        assert dict(vars(modeling_llama)) == before["module"]
        for name, cls in vars(modeling_llama).items():
            if isinstance(cls, type) and cls.__module__ == modeling_llama.__name__:
                assert dict(vars(cls)) == before["classes"][name]


def test_adapters_change_the_instance_and_nothing_else():
    one, other = tiny_model("bloom"), tiny_model("bloom")
    cls = type(one.transformer.h[0].self_attention)
    before = cls.forward
    with patch_model(one, "tiled"):
        assert "forward" in one.transformer.h[0].self_attention.__dict__
        assert "forward" not in other.transformer.h[0].self_attention.__dict__
        assert cls.forward is before
    assert "forward" not in one.transformer.h[0].self_attention.__dict__


def test_an_exception_inside_the_context_reverts(model):
    before = logits(model)
    with pytest.raises(RuntimeError, match="mine"), patch_model(model, "tiled"):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)


def test_a_failure_half_way_leaves_the_model_as_it_was(model, monkeypatch):
    seen = {name: dict(module.__dict__) for name, module in model.named_modules()}

    def fail(self, found, copies):
        raise UnsupportedError("half-way")

    monkeypatch.setattr("rehead.attention.install.Installation._set_implementation", fail)
    with pytest.raises(UnsupportedError, match="half-way"):
        patch_model(model, "tiled").apply()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == seen[name].keys()
        assert module.__dict__.get("config") is seen[name].get("config")
        assert not module._forward_pre_hooks


def test_report_counts_calls(model):
    with patch_model(model, "tiled") as patch:
        logits(model)
        logits(model)
        report = patch.report()
        assert [layer.calls for layer in report.layers] == [2, 2]
        assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert {layer.was for layer in report.layers} == {"sdpa"}
        assert "sdpa -> rehead_tiled (interface), 2 calls" in str(report)
        assert report.to_dict()["applied"] is True
    assert patch.report().applied is False


def test_a_copy_of_a_patched_model_works(model):
    before = logits(model)
    with patch_model(model, "tiled"):
        clone = copy.deepcopy(model)
    torch.testing.assert_close(logits(clone), before, atol=1e-5, rtol=1e-5)
    assert clone.config._attn_implementation == "rehead_tiled"
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_checkpoint_does_not_know_of_the_patch(model, tmp_path):
    with patch_model(model, "tiled"):
        model.save_pretrained(tmp_path)
    assert "rehead" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_a_model_loaded_by_name_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    named = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="rehead_tiled").eval()
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    torch.testing.assert_close(
        logits(named, attention_mask=mask)[mask.bool()],
        logits(model, attention_mask=mask)[mask.bool()],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("model_type", ["bloom", "xglm", "gpt_neox_japanese"])
def test_models_that_accept_the_name_and_ignore_it_say_so(model_type):
    """Without a mask function of our own these lose causality in silence."""
    named = tiny_model(model_type, attn_implementation="rehead_tiled")
    with pytest.raises(UnsupportedError, match="patch_model") as error:
        logits(named)
    one_line(error)


def _own_mask():
    """A user's own 4-D masks, bool (True is visible) and float, that are neither causal nor the same in both rows."""
    gen = torch.Generator().manual_seed(4)
    seen = (torch.rand(2, 1, 24, 24, generator=gen) > 0.3) | torch.eye(24, dtype=torch.bool)
    return seen, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon", "gptj", "gpt_neo", "mpt", "xglm", "roformer"])
def test_a_float_mask_of_the_users_own_means_what_eager_reads(model_type):
    model = tiny_model(model_type, "eager")
    _, added = _own_mask()
    before = logits(model, attention_mask=added)
    with patch_model(model, "tiled"):
        torch.testing.assert_close(logits(model, attention_mask=added), before, atol=2e-5, rtol=1e-5)


def test_a_bool_mask_of_the_users_own_means_what_sdpa_reads(model):
    seen, _ = _own_mask()
    before = logits(model, attention_mask=seen)
    with patch_model(model, "tiled"):
        torch.testing.assert_close(logits(model, attention_mask=seen), before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "doge"])
def test_a_window_is_not_dropped_beside_a_mask_of_values(model_type):
    """Doge's layers read their mask, so they get one of values whatever the user passes."""
    mask = _own_mask()[0] if model_type == "llama" else torch.ones_like(TOKENS)
    with patch_model(tiny_model(model_type), "tiled", window=4) as patch, pytest.raises(UnsupportedError) as caught:
        logits(patch.model, attention_mask=mask)
    assert "window" in one_line(caught)


def test_registry_rejects_a_second_patch_of_a_name():
    with pytest.raises(ValueError, match="registered already"):
        VARIANTS.add("tiled", VARIANTS.get("tiled"))
    with pytest.raises(ValueError, match="already has an adapter"):
        register_adapter("bloom.BloomAttention")(lambda module: {})


def test_another_variant_fits(model, monkeypatch):
    """A variant of another kind needs a name and a change; everything else is there."""

    def negate(model, options, indices, undo, memory):
        head = model.lm_head
        undo.set_attribute(head, "forward", lambda x: -nn.functional.linear(x, head.weight))
        return []

    variant = Variant(
        name="negate", summary="negates the head", source="", options=VariantOptions, exact=lambda options: False,
        off=lambda options: options, redirect=negate,
    )  # fmt: skip
    monkeypatch.setitem(VARIANTS._known, "negate", variant)
    before = logits(model)
    with patch_model(model, "negate"):
        torch.testing.assert_close(logits(model), -before)
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="unknown key 'strength'"):
        patch_model(model, "negate", strength=2)
