"""Proofs and measurements, which fail when they should."""

import copy

import pytest
import torch
import transformers
from probes import TOKENS, logits, one_line
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import rehead.models.probing as probing
from rehead.attention.attend import attend
from rehead.attention.call import AttentionCall
from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError, UsageError, VerificationError
from rehead.models.modeling.modeling_rehead_cache import passed_cache
from rehead.models.tiny import randomize
from rehead.patches import patch_model


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


def deep_model(spread, dtype=torch.bfloat16):
    """Weights so large that one rounding grows from layer to layer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=100, initializer_range=spread,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def test_what_16_bits_do_by_themselves_is_not_held_against_a_patch(monkeypatch):
    model = deep_model(0.2)
    with patch_model(model, "tiled") as patch:
        proof = patch.prove()
        largest = float(model(probing.probe_tokens(model, 48, 2, seed=0)).logits.detach().abs().max())
        assert 0.04 * largest < proof.difference < proof.tolerance < largest / 2
        with pytest.raises(VerificationError, match="differ"):
            patch.prove(tolerance=0.04)
        monkeypatch.setattr(
            "rehead.attention.layer.attend",
            wrong_attention(lambda rules: {**rules, "kv_start": None, "kv_end": None, "key_mask": None}),
        )
        with pytest.raises(VerificationError, match="differ"):
            patch.prove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_rounding_alone_throws_about_prove_nothing(dtype):
    model = deep_model(0.6, dtype)
    with patch_model(model, "tiled") as patch:
        if dtype == torch.float32:
            assert patch.prove(tolerance=0.01).tolerance > 0
            return
        with pytest.raises(
            VerificationError, match=r"cannot be proved in bfloat16.*prove it in float32, model.float\(\)"
        ) as error:
            patch.prove()
        one_line(error)


def wrong_attention(change):
    """The real attention function with one rule changed."""
    return lambda call: attend(AttentionCall(**change(dict(vars(call)))))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rules: {**rules, "causal": False}, "differ|causality"),
        (lambda rules: {**rules, "kv_start": None, "kv_end": None, "key_mask": None}, "differ"),
        (lambda rules: {**rules, "scale": 0.26}, "differ"),
        (lambda rules: {**rules, "window": 9}, "differ"),
    ],
)
def test_prove_catches_wrong_attention(model, monkeypatch, change, word):
    with patch_model(model, "tiled") as patch:
        monkeypatch.setattr("rehead.attention.layer.attend", wrong_attention(change))
        with pytest.raises(VerificationError, match=word) as error:
            patch.prove()
        one_line(error)
        assert patch.applied


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (1, lambda rules: {**rules, "kv_start": None, "kv_end": None, "key_mask": None}),
        (1, lambda rules: {**rules, "window": 20}),
        (23, lambda rules: {**rules, "q_offset": 0}),
    ],
)
def test_prove_catches_what_is_wrong_from_a_cache_alone(model, monkeypatch, rows, change):
    """A step of one token, and the rest of a prompt in one piece, have code of their own below the interface."""
    wrong = wrong_attention(change)
    monkeypatch.setattr(
        "rehead.attention.layer.attend",
        lambda call: (wrong if call.query.shape[2] == rows else attend)(call),
    )
    with patch_model(model, "tiled") as patch, pytest.raises(VerificationError, match="differ"):
        patch.prove(length=48)


def test_a_model_loaded_by_name_is_not_proved_against_itself(monkeypatch):
    with patch_model(tiny_model("llama", "rehead_tiled"), "tiled") as patch:
        assert patch.prove().against == "eager"
        monkeypatch.setattr("rehead.attention.layer.attend", wrong_attention(lambda rules: {**rules, "scale": 0.3}))
        with pytest.raises(VerificationError, match="differ"):
            patch.prove()
    assert patch.model.config._attn_implementation == "rehead_tiled"


def test_prove_reports_decoding(model):
    with patch_model(model, "tiled") as patch:
        proof = patch.prove()
    assert 0 < proof.decoding <= proof.difference <= proof.tolerance
    assert "from a cache" in str(proof)


def test_decoding_is_proved_of_a_model_that_keeps_no_cache_by_default(model):
    model.config.use_cache = False
    with patch_model(model, "tiled") as patch:
        assert patch.prove().decoding is not None


def shift_logits(model, monkeypatch, by):
    """Add to a model's logits what ``by`` makes of its inputs."""
    real = model.forward

    def shifted(**inputs):
        out = real(**inputs)
        out.logits = out.logits + by(inputs)
        return out

    monkeypatch.setattr(model, "forward", shifted)


def test_prove_catches_a_leak_that_parity_tolerates(model, monkeypatch):
    with patch_model(model, "tiled") as patch:
        shift_logits(model, monkeypatch, lambda x: 1e-6 * x["input_ids"][:, -1].sum() * patch.applied)
        with pytest.raises(VerificationError, match="causality"):
            patch.prove(tolerance=1.0)


def test_prove_catches_what_is_no_number_under_padding_alone(model, monkeypatch):
    """The largest of several differences must not pass over one that is not a number."""
    with patch_model(model, "tiled") as patch:
        padded = lambda x: "attention_mask" in x and not x["attention_mask"].all() and not x["use_cache"]  # noqa: E731
        shift_logits(model, monkeypatch, lambda x: float("nan") if patch.applied and padded(x) else 0.0)
        with pytest.raises(VerificationError, match="differ"):
            patch.prove()


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


def test_prove_does_not_mend_what_it_finds(model):
    with patch_model(model, "tiled") as patch:
        model.set_attn_implementation("sdpa")
        with pytest.raises(VerificationError, match="set again") as error:
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


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"length": 1000}, "smaller length="),
        ({"length": 1}, "at least two tokens"),
        ({"input_ids": TOKENS[0]}, "integer tensor"),
        ({"input_ids": [[1, 2, 3]]}, "integer tensor"),
        ({"input_ids": TOKENS[:0]}, "holds no tokens"),
        ({"input_ids": TOKENS + 1000}, "the model has 128; use the model's own tokenizer"),
        ({"input_ids": TOKENS - 1000}, "holds token -9"),
    ],
)
@pytest.mark.parametrize("window", [None, 4])
def test_a_probe_that_cannot_be(options, word, window):
    """The same tokens are refused by a proof and by a measure."""
    if window and "length" in options:
        pytest.skip("random tokens")
    with patch_model(tiny_model("gpt2"), "tiled", window=window) as patch:
        with pytest.raises(UsageError, match=word) as error:
            (patch.measure if window else patch.prove)(**options)
        one_line(error)


def test_a_classifier_is_proved_by_its_hidden_states(monkeypatch):
    model = randomize(transformers.LlamaForSequenceClassification(tiny_model("llama").config)).eval()
    with patch_model(model, "tiled") as patch:
        assert patch.prove().layers == 2
        monkeypatch.setattr("rehead.attention.layer.attend", wrong_attention(lambda rules: {**rules, "causal": False}))
        with pytest.raises(VerificationError):
            patch.prove()


def test_layers_with_values_of_their_own_in_the_config_are_proved():
    """transformers refuses to read such a value off the model's config; a probe does without it."""
    model = tiny_model("qwen3", per_layer_config={i: {"sliding_window": 8 + i} for i in range(2)})
    with pytest.raises(RuntimeError, match="per-layer"):
        model.config.sliding_window  # noqa: B018
    with patch_model(model, "tiled") as patch:
        assert patch.prove().layers == 2


def test_prove_needs_an_applied_patch(model):
    with pytest.raises(UsageError, match="not applied"):
        patch_model(model, "tiled").prove()


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
    with patch_model(model, "tiled", window=47) as patch:
        assert patch.measure().difference > 0
        assert patch.measure(length=48).difference > 0
        with pytest.raises(UsageError, match="47 tokens do not reach beyond a window of 47"):
            patch.measure(length=47)
    with patch_model(model, "tiled", window=TOKENS.shape[1]) as patch, pytest.raises(UsageError, match="input_ids"):
        patch.measure(input_ids=TOKENS)
    with patch_model(model, "tiled") as patch, pytest.raises(UsageError, match="exact"):
        patch.measure()


def test_a_window_option_is_the_window_of_the_model():
    wide, narrow = (tiny_model("mistral", sliding_window=w) for w in (None, 5))
    with patch_model(wide, "tiled", window=5):
        torch.testing.assert_close(logits(wide), logits(narrow), atol=1e-5, rtol=1e-5)


def test_an_unpatched_model_that_fails_with_a_cache_is_no_model_without_one(model, monkeypatch):
    """What could not be compared is said, with the error; running out of memory is no reason to go on."""
    real = model.forward

    def failing(**inputs):
        if passed_cache(inputs) is not None:
            raise failure
        return real(**inputs)

    monkeypatch.setattr(model, "forward", failing)
    failure: Exception = ValueError("no such cache")
    with patch_model(model, "tiled") as patch:
        proof = patch.prove()
        assert proof.decoding is None
        assert proof.undecided == "ValueError: no such cache"
        assert "nothing (unpatched it fails: ValueError: no such cache)" in str(proof)
        failure = MemoryError()
        with pytest.raises(MemoryError):
            patch.prove()


@pytest.mark.parametrize("kind", ["llama", "falcon", "bloom", "mpt"])
def test_a_trace_would_keep_the_padding_mask_and_is_refused(kind):
    model = tiny_model(kind)
    model.config.return_dict = model.config.use_cache = False
    with patch_model(model, "tiled"), pytest.raises(UnsupportedError, match=r"torch\.jit\.trace.*torch\.export"):
        torch.jit.trace(model, torch.arange(8)[None] + 5, strict=False, check_trace=False)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_batches_and_rows_stay_empty(shape, masked):
    model, ids = tiny_model("falcon"), torch.zeros(shape, dtype=torch.int64)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    with torch.no_grad(), patch_model(model, "tiled"):
        assert model(ids, **mask).logits.shape[:2] == shape
