"""The machinery around a patch: registry, undo, reports, proofs that fail when they should, and bad input."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

import rehead.patches.proof as proof_module
from rehead.errors import ReheadError, UnsupportedError, UsageError, VerificationError
from rehead.patches import PATCHES, Patch, patch_model, register_patch
from rehead.patches.adapters import register_adapter
from rehead.patches.base import UndoLog
from rehead.patches.tiny import randomize, tiny_model

TOKENS = torch.randint(8, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_model("llama")


def logits(model, **kwargs):
    with torch.no_grad():
        return model(TOKENS, use_cache=False, **kwargs).logits


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# Applying, reverting, reporting


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

    monkeypatch.setattr("rehead.patches.tiled_patch.TiledPatch._set_implementation", fail)
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


@pytest.mark.parametrize("model_type", ["bloom", "codegen", "xglm", "gpt_neox_japanese"])
def test_models_that_accept_the_name_and_ignore_it_say_so(model_type):
    """Without a mask function of our own these lose causality in silence."""
    named = tiny_model(model_type, attn_implementation="rehead_tiled")
    with pytest.raises(UnsupportedError, match="patch_model") as error:
        logits(named)
    one_line(error)


# Proofs


def test_prove_restores_mode_counters_and_random_state(model):
    model.train()
    with patch_model(model, "tiled") as patch:
        state = torch.get_rng_state()
        patch.prove()
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert patch.applied


def test_prove_takes_tokens_and_half_precision(model):
    model.to(torch.bfloat16)
    with patch_model(model, "tiled") as patch:
        assert patch.prove(input_ids=TOKENS).tolerance >= 1e-2
        assert "proved: 2 layers" in str(patch.prove(length=16))


def wrong_attention(change):
    """The real attention function with one rule changed."""
    from rehead.patches import tiled

    real = tiled.attention
    return lambda *args, **kwargs: real(*args, **change(dict(kwargs)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rules: {**rules, "causal": False}, "differ|causality"),
        (lambda rules: {**rules, "kv_start": None, "kv_end": None, "key_mask": None}, "differ"),
        (lambda rules: {**rules, "scale": 1.01 * rules["scale"]}, "differ"),
        (lambda rules: {**rules, "window": 9}, "differ"),
    ],
)
def test_prove_catches_wrong_attention(model, monkeypatch, change, word):
    with patch_model(model, "tiled") as patch:
        monkeypatch.setattr("rehead.patches.interface.tiled.attention", wrong_attention(change))
        with pytest.raises(VerificationError, match=word) as error:
            patch.prove()
        one_line(error)
        assert patch.applied


def test_prove_catches_a_leak_that_parity_tolerates(model, monkeypatch):
    with patch_model(model, "tiled") as patch:
        real = proof_module._logits
        monkeypatch.setattr(
            proof_module, "_logits", lambda m, x: real(m, x) + 1e-6 * x["input_ids"][:, -1].sum() * patch.applied
        )
        with pytest.raises(VerificationError, match="causality"):
            patch.prove(tolerance=1.0)


def test_prove_catches_a_layer_that_ignores_the_patch(model):
    layer = model.model.layers[1].self_attn
    own = copy.deepcopy(layer.config)

    def stubborn(*args, **kwargs):
        # As a class would that looked its attention up when it was built.
        held, layer.config = layer.config, own
        try:
            return type(layer).forward(layer, *args, **{**kwargs, "attention_mask": None})
        finally:
            layer.config = held

    layer.forward = stubborn
    with patch_model(model, "tiled") as patch:
        with pytest.raises(VerificationError, match=r"layers\.1\.self_attn ran without calling") as error:
            patch.prove()
        one_line(error)


@pytest.mark.parametrize("name", ["T5", "Bart", "Bert"])
def test_encoders_are_proved_too(name):
    """Relative position biases, cross-attention and attention in both directions."""
    sizes = {
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "Bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                 "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vocab_size=128, **sizes[name])
    suffix = "Model" if name == "Bert" else "ForConditionalGeneration"
    model = randomize(getattr(transformers, f"{name}{suffix}")(config)).eval()
    mask = torch.ones_like(TOKENS)
    mask[0, 15:] = 0
    inputs = {"input_ids": TOKENS, "attention_mask": mask}
    if name != "Bert":
        inputs["decoder_input_ids"] = TOKENS[:, :9]
    with torch.no_grad():
        before = model(**inputs)[0]
        with patch_model(model, "tiled") as patch:
            after = model(**inputs)[0]
            proof = patch.prove()
    assert proof.layers == (2 if name == "Bert" else 6)
    keep = mask.bool() if name == "Bert" else torch.ones(2, 9, dtype=torch.bool)
    torch.testing.assert_close(after[keep], before[keep], atol=2e-5, rtol=1e-5)


def test_an_implementation_that_drops_something_is_held_to_eager(model, monkeypatch):
    """As SDPA in older transformers drops a soft cap: the patch is right and the unpatched model is not."""
    sdpa = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "lossy", lambda *a, scaling=None, **k: sdpa(*a, scaling=0.9 * scaling, **k)
    )
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "lossy", AttentionMaskInterface._global_mapping["sdpa"])
    model.config._attn_implementation_internal = "lossy"
    with patch_model(model, "tiled") as patch:
        proof = patch.prove()
    assert proof.against == "eager"
    assert "against eager" in str(proof)
    assert model.config._attn_implementation == "lossy"


def test_prove_needs_an_applied_patch(model):
    with pytest.raises(UsageError, match="not applied"):
        patch_model(model, "tiled").prove()


# Approximate patches


def test_a_window_is_measured_and_not_proved(model):
    with patch_model(model, "tiled", window=4) as patch:
        assert not patch.exact
        with pytest.raises(UsageError, match="measure"):
            patch.prove()
        measured = patch.measure(input_ids=TOKENS)
        assert measured.kl > 1e-3
        assert measured.difference > 0.01
        assert measured.residual < 1e-4
        assert 0 <= measured.agreement < 1
        assert "KL" in str(measured)
    with patch_model(model, "tiled", window=1000) as patch:
        assert patch.measure().difference < 1e-4
    with patch_model(model, "tiled") as patch, pytest.raises(UsageError, match="exact"):
        patch.measure()


def test_a_window_option_is_the_window_of_the_model():
    wide, narrow = (tiny_model("mistral", sliding_window=w) for w in (None, 5))
    with patch_model(wide, "tiled", window=5):
        torch.testing.assert_close(logits(wide), logits(narrow), atol=1e-5, rtol=1e-5)


# Registry


def test_registry_rejects_a_second_patch_of_a_name():
    class Again(PATCHES["tiled"]):
        name = "tiled"

    with pytest.raises(ValueError, match="already registered"):
        register_patch(Again)
    with pytest.raises(ValueError, match="already has an adapter"):
        register_adapter("bloom.BloomAttention")(lambda module: {})


def test_another_patch_fits(model, monkeypatch):
    """A patch of another kind needs a name, a check and a change; everything else is inherited."""

    class Negate(Patch):
        name, summary, exact = "negate", "negates the head", False

        def _check(self):
            pass

        def _apply(self, undo: UndoLog):
            head = self.model.lm_head
            undo.set_attribute(head, "forward", lambda x: -nn.functional.linear(x, head.weight))

    monkeypatch.setitem(PATCHES, "negate", Negate)
    before = logits(model)
    with patch_model(model, "negate"):
        torch.testing.assert_close(logits(model), -before)
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="takes no options"):
        patch_model(model, "negate", strength=2)


# Bad input: one line with the mend, and the model left as it was


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("tield", {}, "did you mean 'tiled'"),
        ("tiled", {"windw": 3}, "did you mean 'window'"),
        ("tiled", {"window": 0}, "positive number"),
        ("tiled", {"window": "wide"}, "positive number"),
    ],
)
def test_unknown_names_and_values(model, name, options, word):
    with pytest.raises(UsageError, match=word) as error:
        patch_model(model, name, **options)
    one_line(error)


def test_a_patch_already_applied(model):
    with patch_model(model, "tiled"):
        with pytest.raises(UsageError, match="already applied") as error:
            patch_model(model, "tiled").apply()
        one_line(error)
        with pytest.raises(UsageError, match="already applied"):
            patch_model(model.model, "tiled").apply()
        assert model.config._attn_implementation == "rehead_tiled"
    with pytest.raises(UsageError, match="not applied"):
        patch_model(model, "tiled").revert()


def refused(model, error_type, word):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error_type, match=word) as error:
        patch_model(model, "tiled").apply()
    one_line(error)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    refused(model, UnsupportedError, "load the weights")


def test_nothing_to_patch():
    refused(tiny_model("mamba"), UnsupportedError, "no softmax attention")
    refused(nn.Linear(2, 2), UnsupportedError, "no softmax attention")


@pytest.mark.parametrize("model_type", ["xlnet", "prophetnet", "big_bird", "cpmant"])
def test_attention_without_an_adapter(model_type):
    refused(tiny_model(model_type), UnsupportedError, "no adapter")


def test_tensor_parallel(model):
    model._tp_size = 2
    refused(model, UnsupportedError, "tensor parallelism")


def test_unsupported_dtype(model):
    refused(model.to(torch.float8_e4m3fn), UnsupportedError, "cast it")


def test_attention_weights(model):
    with patch_model(model, "tiled"), pytest.raises(UsageError, match="set_attn_implementation") as error:
        model(TOKENS, output_attentions=True)
    one_line(error)
    assert model(TOKENS, output_attentions=False).logits is not None


def test_a_quantised_cache(model):
    class QuantizedLayer(DynamicLayer):
        """Named as transformers' own are; their backends are not installed here."""

    cache = DynamicCache(config=model.config)
    cache.layers[0] = QuantizedLayer()
    with patch_model(model, "tiled"), pytest.raises(UnsupportedError, match="quantised") as error:
        model(TOKENS, past_key_values=cache)
    one_line(error)


def test_dropout_in_training():
    model = tiny_model("gpt2", attn_pdrop=0.1)
    with patch_model(model, "tiled"):
        model.eval()
        logits(model)
        model.train()
        with pytest.raises(UnsupportedError, match=r"dropout 0\.1") as error:
            model(TOKENS)
    one_line(error)


def test_errors_carry_exit_codes():
    assert UsageError.exit_code == 2
    assert UnsupportedError.exit_code == 3
    assert VerificationError.exit_code == 4
    assert issubclass(UnsupportedError, ReheadError)
