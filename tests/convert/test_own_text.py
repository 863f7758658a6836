"""Text that a model writes itself to calibrate on."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from rehead.convert import convert
from rehead.convert.options import ConvertOptions
from rehead.convert.own_text import NAME, written
from rehead.errors import UsageError
from rehead.models.watch import PLAIN, register_plain
from rehead.recipes.pipeline.named_models import embedded_model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_sure_model_writes_what_generate_does(tmp_path, family):
    """Where one word has all the probability, what is drawn at temperature 1 is the greedy text."""
    tiny.save_tiny(family, tmp_path / "m", tie_word_embeddings=False, sliding_window=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    model.lm_head.weight.data *= 1e4
    beginnings = torch.tensor([[1, 5], [1, 9], [1, 30]])
    with torch.no_grad():
        wished = model.generate(
            beginnings, do_sample=False, max_new_tokens=22, eos_token_id=None, pad_token_id=0, use_cache=False
        )
        register_plain()
        model.set_attn_implementation(PLAIN)
        text = written(model, beginnings, 24)
    assert torch.equal(text, wished)


def test_draws_follow_the_model(tmp_path):
    """Frequencies of second words are the model's probabilities, and a seed fixes them."""
    tiny.save_tiny("llama", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        chances = model(torch.tensor([[7]])).logits[0, -1].softmax(-1)
        register_plain()
        model.set_attn_implementation(PLAIN)
        text = written(model, torch.full((4000, 1), 7), 2, seed=3)
        assert torch.equal(text, written(model, torch.full((4000, 1), 7), 2, seed=3))
    seen = torch.bincount(text[:, 1], minlength=len(chances)) / 4000
    assert float((seen - chances).abs().sum()) < 0.2


def test_latents_fitted_on_it(tmp_path):
    done = convert(
        str(embedded_model()), tmp_path / "out", latent=32, rope_dims=8, refit=True, fit=2, device="cpu", own_text=512,
        calibration_tokens=1024, calibration_length=128,
    )  # fmt: skip
    record = json.loads((done.out / "rehead.json").read_text())
    assert record["options"]["own_text"] == 512
    assert NAME in json.dumps(record)
    assert '"tokens": 1536' in json.dumps(record)


def test_no_tokenizer_no_text(tmp_path):
    source = tiny.save_tiny("llama", tmp_path / "m")
    with pytest.raises(UsageError, match="drop --own-text"):
        convert(source, tmp_path / "out", latent=24, rope_dims=8, calibration=["random"], own_text=2048, device="cpu")


def test_only_where_text_is_read():
    with pytest.raises(UsageError, match="--own-text: says nothing"):
        ConvertOptions.parse({"num_key_value_heads": 1, "method": "mean", "own_text": 2048})
