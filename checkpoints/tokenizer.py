"""A checkpoint's own tokenizer, for whatever reads text with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rehead.checkpoints.source import Source


def open_tokenizer(place: Source | str | os.PathLike[str]) -> Any:
    """Load a tokenizer with plain transformers: without its limit on the length of a text, and without remote code.

    Args:
        place: an open checkpoint, whose small files are fetched first, or a folder.

    Raises:
        Whatever transformers raises for files that are missing or broken, or that want code of their own; callers know
        what the tokenizer was wanted for.
    """
    from transformers import AutoTokenizer

    from rehead.console import quiet_transformers

    folder = _folder(place) if isinstance(place, Source) else Path(place)
    with quiet_transformers():
        # Said, since transformers would ask whoever sits before the terminal.
        return AutoTokenizer.from_pretrained(str(folder), model_max_length=10**9, trust_remote_code=False)


def _folder(source: Source) -> Path:
    for name in source.small_files():
        source.small_path(name)
    return source.small_path("config.json").parent
