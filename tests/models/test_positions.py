"""Rows longer than a model has positions for: refused where they would crash, told of where they would extrapolate."""

from __future__ import annotations

import pytest
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rehead.benchmarks.tiny import tiny_model
from rehead.errors import UsageError
from rehead.models.positions import check_positions, position_rows


def _opt():
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=16, max_position_embeddings=24))


def _gptj():
    return GPTJForCausalLM(GPTJConfig(vocab_size=40, n_positions=24, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))


@pytest.mark.parametrize("make", [_opt, _gptj])
def test_a_table_of_positions_is_as_long_as_the_model_can_read(make) -> None:
    import torch

    model = make().eval()
    rows = position_rows(model)
    assert rows == 24
    ids = torch.zeros(1, rows + 1, dtype=torch.int64)
    model(ids[:, :rows])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)
    assert check_positions(model, rows, "m", "--window 24") is None
    with pytest.raises(UsageError, match=r"--window 25: m has positions for 24 tokens; give 24 or less"):
        check_positions(model, rows + 1, "m", "--window 25")


def test_rotary_positions_run_on_and_are_told_of() -> None:
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=24))
    assert position_rows(model) is None
    assert check_positions(model, 24, "m", "--window 24") is None
    assert "more than the 24 positions that this llama was made for" in check_positions(model, 25, "m", "--window 25")


@pytest.mark.parametrize("kind", ["bloom", "mamba", "gemma2", "xglm", "gpt_oss"])
def test_models_without_a_table_have_none(kind: str) -> None:
    assert position_rows(tiny_model(kind)) is None


def test_a_vision_towers_table_is_not_the_decoders() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    assert position_rows(model) is None
