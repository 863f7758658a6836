"""Calibration text: where it comes from, and how it becomes sequences of tokens."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
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
        texts: files (.txt, .txt.gz, .md, .jsonl, .parquet), Hub datasets, or ``"random"`` for uniformly random tokens
            (a model without a tokenizer, tests). Empty: the text that ships with Rehead.
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


def _read(name: str) -> str:
    """The whole of a text as one string."""
    if name == "built in":
        return gzip.decompress((files("rehead.convert.assets") / BUILT_IN).read_bytes()).decode("utf-8")
    path = Path(name)
    try:
        if path.is_file():
            return _read_file(path)
    except UsageError:
        raise
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"--calibration {name}: is not readable as text ({error}); give UTF-8 text") from None
    if path.exists() or path.suffix in (".txt", ".gz", ".jsonl", ".parquet", ".md"):
        raise UsageError(f"--calibration {name}: no such file; give a text file or a Hub dataset")
    return _join(_dataset_texts(name))


def _read_file(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as f:
            return f.read()
    if path.suffix in (".jsonl", ".json", ".parquet"):
        from datasets import load_dataset

        kind = "parquet" if path.suffix == ".parquet" else "json"
        rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        return _join(_column(rows, str(path)))
    return path.read_text(encoding="utf-8")


def _dataset_texts(name: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        yield from _column(load_dataset(name, split="train", streaming=True), name)
    except UsageError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--calibration {name}: is neither a file nor a Hub dataset that can be read ({first[:160]}); "
            "check the name"
        ) from None


def _column(rows: Iterable[dict[str, object]], name: str) -> Iterator[str]:
    """The text of each row: the column ``text``, or the first that holds strings."""
    column = None
    for row in rows:
        if column is None:
            column = (
                "text" if "text" in row else next((key for key, value in row.items() if isinstance(value, str)), None)
            )
            if column is None:
                raise UsageError(f"--calibration {name}: has no column of text; give one with a column 'text'")
        yield str(row[column])


def _join(texts: Iterable[str], limit: int = 64_000_000) -> str:
    """Documents as one text; at most ``limit`` characters, which is far more than any calibration needs."""
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size > limit:
            break
    return "\n\n".join(parts)
