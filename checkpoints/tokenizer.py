"""Load a checkpoint's own tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rehead.checkpoints.source import Source


def open_tokenizer(place: Source | str | os.PathLike[str]) -> Any:
    """A checkpoint's tokenizer, without its limit on the length of a text and without remote code.

    Args:
        place: an open checkpoint, whose small files are downloaded first, or a folder.

    Raises:
        Exception: as transformers raises it, for missing or broken files or a tokenizer that needs remote code.
    """
    from transformers import AutoTokenizer

    from rehead.console import quiet_transformers

    folder = _folder(place) if isinstance(place, Source) else Path(place)
    with quiet_transformers():
        # False, since by default transformers would ask the user at the terminal.
        return AutoTokenizer.from_pretrained(str(folder), model_max_length=10**9, trust_remote_code=False)


def _folder(source: Source) -> Path:
    for name in source.small_files():
        source.small_path(name)
    return source.small_path("config.json").parent
