"""A model whose weights stay on disk computes what transformers computes with all of them in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from rehead.checkpoints.source import LocalSource
from rehead.models import streamed
from rehead.models.config import resolve_config
from rehead.models.families import FAMILIES


def streaming(folder: Path) -> torch.nn.Module:
    source = LocalSource(folder)
    return streamed.stream(source, resolve_config(source.config, source.id))


NAMES = [name for name in [*FAMILIES, *tiny.VARIANTS] if tiny.available(name)]


@pytest.mark.parametrize(("name", "room"), [*((name, 0) for name in NAMES), ("llama", 1 << 30), ("mixtral", 1 << 30)])
def test_every_class_computes_the_same(name: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing kept and matrices multiplied in pieces, and with everything kept; a second pass too."""
    monkeypatch.setattr(streamed, "KEPT_BYTES", room)
    monkeypatch.setattr(streamed, "PIECE", 500)
    folder = tiny.save_tiny(name, tmp_path / "m")
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = streaming(folder)
    for _ in range(2):
        gap = (tiny.logits(model) - tiny.logits(wanted)).abs().max()
        assert gap <= 1e-4 * tiny.logits(wanted).abs().max()
    left = [p for p in model.parameters() if not isinstance(p, streamed.StreamedWeight)]
    assert not left
    assert (room == 0) == all(p.weight.kept is None for p in model.parameters())
