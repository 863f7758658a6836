"""A tiny model with a tokenizer of its own, a text, and the CLI in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from rehead.recipes.scratch import NewModel, new_model

TEXT = "the of and to in we that our for a people nation government have not this will all with be war peace law"
WORDS = TEXT.split()


def make_text(length: int, seed: int = 0) -> str:
    """Sentences of common words, different for each seed; many documents, one a line."""
    import random

    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))).capitalize() + "." for _ in range(length)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of 2 layers and 4 heads of 8."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shape = NewModel(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    return new_model(folder, [make_text(200)], shape)


def _write_home(folder: Path, model: Path) -> Path:
    """Texts and a recipe that does everything, small."""
    (folder / "train.txt").write_text(make_text(150, seed=1))
    (folder / "heldout.txt").write_text(make_text(60, seed=2))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return folder


@pytest.fixture(scope="session")
def write_home(tiny_model: Path):
    """Fill a folder with texts and a recipe that does everything, small."""
    return lambda folder: _write_home(folder, tiny_model)


@pytest.fixture
def home(tmp_path: Path, write_home) -> Path:
    """A folder with texts and the recipe."""
    return write_home(tmp_path)


RECIPE = """\
name: tiny
description: everything, small
model: {model}
out: out
device: cpu

convert:
  num_key_value_heads: 2
  method: mean

uptrain:
  data: train.txt#lines
  eval_data: heldout.txt
  eval_tokens: 256
  tokens: 2048
  batch_tokens: 512
  seq_length: 64
  checkpoint_every: 2

evaluate:
  data: heldout.txt
  tokens: 512
  window: 64
  conventions: [disjoint]
  damage: true
  damage_tokens: 128
  speed: true
  speed_batch: 1
  speed_context: 32
  speed_repeats: 2
  resamples: 50
"""
