"""A tiny model that really speaks: an MHA LLaMA trained for a moment on a made-up language, and its MQA conversion."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rehead.convert import convert
from rehead.recipes.scratch import NewModel, new_model

WORDS = (
    "peace",
    "commerce",
    "treaty",
    "revenue",
    "congress",
    "people",
    "union",
    "nation",
    "army",
    "navy",
    "law",
    "debt",
)


@dataclass(frozen=True)
class Tiny:
    """Folders and texts.

    Attributes:
        teacher: MHA, 2 layers, 4 heads.
        student: the same with 1 KV head.
        train, held: text files, one document a line (names end in ``#lines``).
    """

    teacher: Path
    student: Path
    train: str
    held: str

    def options(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of a run of 8 steps that takes a second or two."""
        return {
            "data": [self.train], "tokens": 4096, "batch_tokens": 512, "seq_length": 32, "learning_rate": 1e-2,
            "checkpoint_every": 2, "device": "cpu", **changes,
        }  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("uptraining")
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(4, 60))) + "." for _ in range(300)]
    (root / "train.txt").write_text("\n".join(documents[:250]))
    (root / "held.txt").write_text("\n".join(documents[250:]))
    shape = NewModel(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, dtype="float32",
    )  # fmt: skip
    new_model(root / "teacher", documents, shape)
    # Random weights hardly attend; larger ones make a conversion cost something that training can win back.
    from safetensors.torch import load_file, save_file

    weights = load_file(root / "teacher" / "model.safetensors")
    weights = {name: w * (6 if w.ndim == 2 else 1) for name, w in weights.items()}
    save_file(weights, root / "teacher" / "model.safetensors", metadata={"format": "pt"})
    convert(root / "teacher", root / "student", num_key_value_heads=1)
    return Tiny(root / "teacher", root / "student", f"{root / 'train.txt'}#lines", f"{root / 'held.txt'}#lines")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that runs can be compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
