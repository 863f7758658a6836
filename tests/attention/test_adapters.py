"""Adapters beyond a plain pass: attention to an encoder, its cache, and dropout, which tiles do not have."""

import pytest
import torch
from probes import TOKENS, logits, one_line
from transformers import DynamicCache, EncoderDecoderCache, MvpConfig, MvpForConditionalGeneration

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UnsupportedError
from rehead.models.modeling.modeling_rehead_cache import cache_argument
from rehead.models.tiny import randomize
from rehead.patches import patch_model

DECODERS = ["rembert", "roformer", "xglm", "trocr"]
DROPOUTS = {
    "gptj": "attn_pdrop",
    "codegen": "attn_pdrop",
    "gpt_neo": "attention_dropout",
    "gpt_neox_japanese": "attention_dropout",
    "openai-gpt": "attn_pdrop",
    "bloom": "attention_dropout",
    "falcon": "attention_dropout",
    "xglm": "attention_dropout",
    "rembert": "attention_probs_dropout_prob",
    "roformer": "attention_probs_dropout_prob",
}


def decoder(model_type):
    model = tiny_model(model_type, is_decoder=True, add_cross_attention=True)
    width = getattr(model.config, "cross_attention_hidden_size", None) or model.config.hidden_size
    generator = torch.Generator().manual_seed(3)
    seen = torch.ones(2, 11, dtype=torch.long)
    seen[0, 8:] = 0
    return model, {
        "encoder_hidden_states": torch.randn(2, 11, width, generator=generator),
        "encoder_attention_mask": seen,
    }


@pytest.mark.parametrize("model_type", DECODERS)
def test_attention_to_an_encoder(model_type):
    model, encoder = decoder(model_type)
    mask = torch.ones_like(TOKENS)
    mask[1, 20:] = 0
    before, alone = logits(model, attention_mask=mask, **encoder), logits(model, attention_mask=mask)
    assert float((before - alone)[0].abs().max()) > 1e-2  # or nothing was tested
    with patch_model(model, "tiled"):
        after = logits(model, attention_mask=mask, **encoder)
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", DECODERS)
def test_attention_to_an_encoder_from_a_cache(model_type):
    """Keys of the encoder are projected once; whatever is handed over later is not looked at, as in the class."""
    model, encoder = decoder(model_type)

    def steps():
        cache, parts = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
        for start, stop in ((0, 9), (9, 10), (10, 14)):
            inputs = {
                **encoder,
                "encoder_hidden_states": encoder["encoder_hidden_states"] * (1.0 if start == 0 else 3.0),
            }
            parts.append(model(TOKENS[:, start:stop], use_cache=True, **cache_argument(cache), **inputs).logits)
        return torch.cat(parts, 1)

    before = steps()
    with patch_model(model, "tiled"):
        torch.testing.assert_close(steps(), before, atol=2e-5, rtol=1e-5)


def test_an_encoder_and_its_decoder():
    config = MvpConfig(
        vocab_size=128, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = randomize(MvpForConditionalGeneration(config)).eval()
    mask = torch.ones_like(TOKENS)
    mask[0, 15:] = 0
    inputs = {"attention_mask": mask, "decoder_input_ids": TOKENS[:, :9]}
    before = logits(model, **inputs)
    with patch_model(model, "tiled") as patch:
        torch.testing.assert_close(logits(model, **inputs), before, atol=2e-5, rtol=1e-5)
        assert patch.prove().layers == 6


@pytest.mark.parametrize("model_type", DROPOUTS)
def test_dropout_is_refused_in_training_and_no_matter_in_evaluation(model_type):
    others = {"alibi": True} if model_type == "falcon" else {}  # with rotary positions the class itself drops nothing
    model = tiny_model(model_type, **{DROPOUTS[model_type]: 0.3}, **others).eval()
    before = logits(model)
    with patch_model(model, "tiled"):
        torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)
        model.train()
        with pytest.raises(UnsupportedError, match="dropout") as error:
            model(TOKENS, use_cache=False)
        one_line(error)


def test_a_bool_mask_says_what_the_same_mask_of_numbers_says():
    """GPT-Neo's layers apply their own window to whatever mask they get."""
    model = tiny_model("gpt_neo", "eager")
    seen = (torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(4)) > 0.3) | torch.eye(24).bool()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    before = logits(model, attention_mask=added)
    with patch_model(model, "tiled"):
        torch.testing.assert_close(logits(model, attention_mask=added), before, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logits(model, attention_mask=seen), before, atol=2e-5, rtol=1e-5)


def test_a_bias_that_the_class_adds_twice_is_refused():
    model = tiny_model("falcon", "eager", alibi=True)
    with patch_model(model, "tiled"), pytest.raises(UnsupportedError, match="adds its bias twice") as error:
        logits(model)
    one_line(error)
