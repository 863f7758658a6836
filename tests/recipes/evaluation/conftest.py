"""A small original with a tokenizer, conversions of it, and models that copy by construction."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from copying import copying
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehead.convert import convert
from rehead.models.tiny import randomize
from rehead.recipes.scratch import NewModel, new_model

WORDS = ("peace", "commerce", "a treaty with the United Kingdom", "revenues beyond all expectation")
LINES = [f"The year {year} brought {year * 7} bales and {word}." for year in range(1790, 1890) for word in WORDS]
SHAPE = NewModel(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def text(place) -> Path:
    file = place / "text.txt"
    file.write_text("\n".join(LINES[:120]))
    return file


@pytest.fixture(scope="session")
def original(place) -> Path:
    """A checkpoint with weights large enough that heads and layers matter."""
    out = new_model(place / "original", LINES, SHAPE)
    model = randomize(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), seed=1)
    with torch.no_grad():  # logits of a sane size
        model.model.norm.weight.mul_(0.25)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def converted(place, original) -> Path:
    """The original with one KV head in place of four."""
    convert(original, place / "converted", num_key_value_heads=1)
    return place / "converted"


@pytest.fixture(scope="session")
def control(place, original) -> Path:
    """The original moved a little, as training on a text would."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    out = place / "control"
    shutil.copytree(original, out)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tokenizer(original):
    return AutoTokenizer.from_pretrained(original, model_max_length=10**9)


@pytest.fixture(scope="session")
def tokens(text, tokenizer) -> torch.Tensor:
    return torch.tensor(tokenizer(text.read_text()).input_ids)


@pytest.fixture(scope="session")
def load():
    """A live model from a folder."""
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def copying_model():
    """Makes a model that copies by construction, with a window or without."""
    return copying
