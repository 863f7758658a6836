"""Load a checkpoint's own tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rehead.checkpoints.source import Source
from rehead.errors import UnsupportedError


def open_tokenizer(place: Source | str | os.PathLike[str]) -> Any:
    """A checkpoint's tokenizer, without its limit on the length of a text and without remote code.

    Args:
        place: an open checkpoint, whose small files are downloaded first, or a folder.

    A ``tokenizer.json`` is read where the config names code as well.

    Raises:
        UnsupportedError: it needs remote code.
        Exception: as transformers raises it, for missing or broken files.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from rehead.console import quiet_transformers

    folder = _folder(place) if isinstance(place, Source) else Path(place)
    code = _own_code(folder)
    with quiet_transformers():
        if code is not None:
            if not (folder / "tokenizer.json").is_file():
                raise UnsupportedError(f"needs remote code ({code[:40]}); put its tokenizer.json beside it")
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        # False, since by default transformers would ask the user at the terminal.
        return AutoTokenizer.from_pretrained(str(folder), model_max_length=10**9, trust_remote_code=False)


def _own_code(folder: Path) -> str | None:
    """The class in remote code that a tokenizer needs; None where transformers has its class."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = config["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if tokenizer_class_from_name(str(config.get("tokenizer_class"))) is not None:
        return None
    names = named if isinstance(named, list) else [named]
    return next((str(name) for name in names if name), None)


def _folder(source: Source) -> Path:
    for name in source.small_files():
        source.small_path(name)
    return source.small_path("config.json").parent
