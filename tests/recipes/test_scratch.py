"""A new small model: its tokenizer loses nothing, its checkpoint is plain, its shape is what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehead.errors import UsageError
from rehead.recipes.scratch import NewModel, new_model, train_tokenizer

TEXT = [f"The year {year} brought {year * 7} bales of cotton and {word}." for year in range(1790, 1990) for word in
        ("peace", "commerce", "a treaty with the United Kingdom", "revenues beyond all expectation")]  # fmt: skip
TINY = NewModel(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 320)


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_vocabulary_has_the_size_asked_for(tokenizer):
    assert len(tokenizer) == 320
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer("the United Kingdom").input_ids) < len("the United Kingdom")


def test_too_little_text_is_an_error():
    with pytest.raises(UsageError, match="give more text or a smaller vocabulary"):
        train_tokenizer(["a b"], 4096)
    with pytest.raises(UsageError, match="257"):
        train_tokenizer(TEXT, 100)


def test_a_plain_checkpoint_comes_out(tmp_path: Path):
    out = new_model(tmp_path / "model", TEXT, TINY)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads == 4
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(out)) == 320
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    again = new_model(tmp_path / "again", TEXT, TINY)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    state = torch.random.get_rng_state()
    new_model(tmp_path / "third", TEXT, TINY)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("changes", [{"hidden_size": 30}, {"num_key_value_heads": 3}])
def test_an_impossible_shape_is_an_error(tmp_path: Path, changes: dict[str, int]):

    with pytest.raises(UsageError, match="choose divisors"):
        new_model(tmp_path / "model", TEXT, TINY.but(**changes))
    assert not (tmp_path / "model").exists()


def test_an_unknown_dtype_is_an_error(tmp_path: Path):
    with pytest.raises(UsageError, match="choose one of bfloat16"):
        NewModel.parse({"dtype": "int7"}, "new")


def test_an_existing_folder_is_left_alone(tmp_path: Path):
    with pytest.raises(UsageError, match="exists already"):
        new_model(tmp_path, TEXT, TINY)
