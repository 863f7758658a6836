"""What the tests of reading and writing share."""

from __future__ import annotations

from pathlib import Path

import pytest

import checkpoints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A LLaMA in three files of weights."""
    return checkpoints.write_llama(tmp_path / "m", shards=3)
