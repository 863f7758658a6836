"""Calibration text: where it comes from, and how it becomes sequences of tokens."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from rehead.convert.source import Source
from rehead.errors import UsageError

BUILT_IN = "calibration.txt.gz"
RANDOM = "random"
#: With less than this, second moments say more about the sample than about the model.
MIN_TOKENS = 1024


@dataclass(frozen=True)
class CalibrationText:
    """Sequences to run a model over.

    Attributes:
        tokens: int64 [sequences, length].
        names: what they were taken from.
    """

    tokens: Tensor
    names: list[str]


def load_calibration(
    texts: Sequence[str], source: Source, vocab_size: int, tokens: int, length: int, seed: int = 0
) -> CalibrationText:
    """Read texts and cut them into sequences with the model's own tokenizer.

    Excerpts are spread evenly over each text; several texts share the tokens equally and take turns. Each excerpt is
    tokenised by itself, so a tokenizer that starts a text with a special token starts every sequence with it.

    Args:
        texts: files (.txt, .txt.gz, .md, .jsonl, .parquet), folders or Hub datasets, with options as
            :mod:`rehead.recipes.data.sources` reads them; or ``"random"`` for uniformly random tokens (a model without
            a tokenizer, tests). Empty: the text that ships with Rehead.
        source: the model, for its tokenizer.
        vocab_size: for ``"random"``.
        tokens: how many in all; fewer are used where the texts hold fewer.
        length: tokens in a sequence.
        seed: for ``"random"``.

    Raises:
        UsageError: a text is missing, empty, not text, or too short; or the model has no tokenizer.
    """
    wanted = max(tokens // length, 1)
    if list(texts) == [RANDOM]:
        generator = torch.Generator().manual_seed(seed)
        return CalibrationText(torch.randint(0, vocab_size, (wanted, length), generator=generator), ["random tokens"])
    names = list(texts) or ["built in"]
    contents = [_read(name) for name in names]
    for name, content in zip(names, contents):
        if not content.strip():
            raise UsageError(f"--calibration {name}: is empty; give a file with text")
    tokenizer = _tokenizer(source)
    share = -(-wanted // len(names))
    found = [_sequences(content, tokenizer, share, length) for content in contents]
    mixed = [row for rows in zip(*_padded(found)) for row in rows if row is not None][:wanted]
    least = min(MIN_TOKENS, wanted * length)
    if len(mixed) * length < least:
        raise UsageError(
            f"--calibration {', '.join(names)}: too short, {len(mixed) * length} tokens in whole sequences of {length} "
            f"where at least {least} are needed; give more text or a smaller --calibration-length"
        )
    return CalibrationText(torch.tensor(mixed), names)


def _padded(found: list[list[list[int]]]) -> list[list[list[int] | None]]:
    longest = max(len(rows) for rows in found)
    return [[*rows, *[None] * (longest - len(rows))] for rows in found]


def _sequences(text: str, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """At most ``count`` sequences of ``length`` tokens, spread evenly over a text."""
    # Excerpts generous enough for a sequence each at up to seven characters a token, evenly spread.
    size = min(7 * length, max(len(text) // count, 1))
    if size < 7 * length:
        ids = tokenizer(text).input_ids
        rows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        step = max(len(rows) / count, 1.0)
        return [rows[int(i * step)] for i in range(min(count, len(rows)))]
    rows = []
    stride = (len(text) - size) / max(count - 1, 1)
    for i in range(count):
        start = int(i * stride)
        if start:  # not in the middle of a word
            space = text.find(" ", start, start + 200)
            start = space + 1 if space >= 0 else start
        ids = tokenizer(text[start : start + size]).input_ids[:length]
        if len(ids) == length:
            rows.append(ids)
    return rows


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    from rehead.convert.meta import quiet_transformers

    place = getattr(source, "folder", None)
    if place is None:
        for name in source.small_files():
            source.small_path(name)
        place = source.small_path("config.json").parent
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(place), model_max_length=10**9)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{source.id}: its tokenizer cannot be loaded ({first[:120]}), and calibration needs one; "
            "add the tokenizer's files or use a method that needs no calibration (mean, procrustes)"
        ) from None


def built_in_text() -> str:
    """The text that ships with Rehead for calibration."""
    return gzip.decompress((files("rehead.convert.assets") / BUILT_IN).read_bytes()).decode("utf-8")


def _read(name: str) -> str:
    """The whole of a text as one string."""
    if name == "built in":
        return built_in_text()
    # Imported here: recipes build on conversions, and most conversions read no text.
    from rehead.recipes.data.sources import read_documents

    return _join(read_documents([name], streaming=True, option="--calibration"))


def _join(texts: Iterable[str], limit: int = 64_000_000) -> str:
    """Documents as one text; at most ``limit`` characters, which is far more than any calibration needs."""
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size > limit:
            break
    return "\n\n".join(parts)
