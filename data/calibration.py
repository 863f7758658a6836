"""Read calibration text and cut it into sequences of tokens."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.source import Source
from rehead.checkpoints.tokenizer import open_tokenizer
from rehead.data.beginning import text_start
from rehead.data.sources import read_documents
from rehead.errors import UsageError, first_line

BUILT_IN = "calibration.txt.gz"
RANDOM = "random"
#: Fewer tokens make second moments depend too much on the sample.
MIN_TOKENS = 1024
#: More characters than a token has on average in any text worth calibrating on.
_CHARACTERS = 7


@dataclass(frozen=True)
class CalibrationText:
    """Sequences to run a model over.

    Attributes:
        tokens: int64 [sequences, length], one tensor for each length, the longest first.
        names: the texts that they were taken from.
    """

    tokens: list[Tensor]
    names: list[str]

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(part.numel() for part in self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence, the longest first."""
        return [part.shape[1] for part in self.tokens]


def load_calibration(
    texts: Sequence[str], source: Source, vocab_size: int, tokens: int, lengths: Sequence[int], seed: int = 0
) -> CalibrationText:
    """Read texts and cut them into sequences with the model's own tokenizer.

    Each text is divided into equal stretches, and one sequence is taken at a random place in each, without overlap (at
    even distances, sequences could miss parts of a text with a regular structure). Several texts share the tokens
    equally. A tokenizer that starts a text with a special token starts every sequence with it.

    Args:
        texts: files (.txt, .txt.gz, .md, .jsonl, .parquet), folders or Hub datasets, with options as
            :mod:`rehead.data.sources` reads them; or ``"random"`` for uniformly random tokens (a model without
            a tokenizer, tests). Empty: the text that ships with Rehead.
        source: the model, for its tokenizer.
        vocab_size: for ``"random"``.
        tokens: total tokens; fewer are used if the texts are shorter.
        lengths: tokens per sequence; several lengths share the tokens equally, except those longer than their share.
        seed: seed for the places in the text, and for ``"random"``.

    Raises:
        UsageError: a text is missing, empty, not text, or too short; or the model has no tokenizer.
    """
    counts = shares(tokens, lengths)
    if list(texts) == [RANDOM]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(0, vocab_size, (count, length), generator=generator) for length, count in counts.items()]
        return CalibrationText(drawn, ["random tokens"])
    names = list(texts) or ["built in"]
    contents = [_read(name) for name in names]
    for name, content in zip(names, contents):
        if not content.strip():
            raise UsageError(f"--calibration {name}: is empty; give a file with text")
    rows = _excerpts(contents, _tokenizer(source), counts, seed)
    parts = [[row for row in rows if len(row) == length] for length in counts]
    least = min(MIN_TOKENS, sum(length * count for length, count in counts.items()))
    if (held := sum(map(len, rows))) < least:
        raise UsageError(
            f"--calibration {', '.join(names)}: too short, {held} tokens in whole sequences of "
            f"{' and '.join(map(str, counts))} where at least {least} are needed; give more text or a smaller "
            "--calibration-length"
        )
    text = CalibrationText([torch.tensor(part) for part in parts if part], names)
    if max(int(part.max()) for part in text.tokens) >= vocab_size:
        raise UsageError(f"{source.id}: its tokenizer has more tokens than its vocabulary; check the tokenizer")
    return text


def calibration_tokens(tokenizer: Any, tokens: int = 4096, length: int = 512, seed: int = 0) -> Tensor:
    """Token ids ``[tokens // length, length]`` of the text that ships with Rehead, for a live model.

    Args:
        tokenizer: the model's own.
        tokens: total tokens; at least one sequence is returned.
        length: tokens per sequence.
        seed: seed for the places in the text.

    Raises:
        UsageError: the text gives no sequence of that length.
    """
    rows = _excerpts([built_in_text()], tokenizer, shares(tokens, [length]), seed)
    if not rows:
        raise UsageError(f"the built-in text gives no sequence of {length} tokens; ask for shorter ones")
    return torch.tensor(rows)


def _excerpts(contents: Sequence[str], tokenizer: Any, counts: dict[int, int], seed: int) -> list[list[int]]:
    """Sequences of tokens, ``counts`` of each length, taken from the texts in turn."""
    drawn = []
    for i, content in enumerate(contents):
        share = {length: (count + len(contents) - 1 - i) // len(contents) for length, count in counts.items()}
        drawn.append(_sequences(content, tokenizer, _slots(share), seed))
    return [row for rows in zip_longest(*drawn) for row in rows if row is not None]


def shares(tokens: int, lengths: Sequence[int]) -> dict[int, int]:
    """Number of sequences of each length, longest first; tokens that a length cannot use go to the shorter ones."""
    counts: dict[int, int] = {}
    distinct = sorted(set(lengths), reverse=True)
    for i, length in enumerate(distinct):
        count = tokens // (len(distinct) - i) // length
        if i == len(distinct) - 1 and not counts:
            count = max(count, 1)
        if count:
            counts[length] = count
            tokens -= count * length
    return counts


def _slots(counts: dict[int, int]) -> list[int]:
    """The lengths of all sequences in their order in the text, with each length spread evenly over it."""
    places = [((i + 0.5) / count, length) for length, count in counts.items() for i in range(count)]
    return [length for _, length in sorted(places)]


def _sequences(text: str, tokenizer: Any, slots: Sequence[int], seed: int) -> list[list[int]]:
    """Sequences of the lengths in ``slots``, in this order and spread over a text; fewer if the text is too short."""
    wanted, draw = sum(slots), random.Random(seed).random
    spare = len(text) - _CHARACTERS * wanted
    if spare < 0:
        return _all_sequences(text, tokenizer, slots)
    # The text is long enough to tokenise only generous excerpts of it.
    rows, at = [], 0
    for length in slots:
        start = int(len(text) * (at / wanted) + draw() * spare * (length / wanted))
        at += length
        if start:  # not in the middle of a word
            space = text.find(" ", start, start + 200)
            start = space + 1 if space >= 0 else start
        ids = tokenizer(text[start : start + _CHARACTERS * length]).input_ids[:length]
        if len(ids) == length:
            rows.append(ids)
    return rows


def _all_sequences(text: str, tokenizer: Any, slots: Sequence[int]) -> list[list[int]]:
    """As :func:`_sequences`, for a text that must be tokenised whole; if too short, the last slots get nothing."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    start = text_start(tokenizer).tolist()
    spare = max(len(ids) - sum(length - len(start) for length in slots), 0)
    rows, at, shift = [], 0, spare / max(len(slots), 1)
    for i, length in enumerate(slots):
        begin = at + int(i * shift)
        body = ids[begin : begin + length - len(start)]
        if len(start) + len(body) == length:
            rows.append([*start, *body])
            at += len(body)
    return rows


def _tokenizer(source: Source) -> Any:
    try:
        return open_tokenizer(source)
    except Exception as error:
        raise UsageError(
            f"{source.id}: its tokenizer cannot be loaded ({first_line(error, 120)}), and calibration needs one; "
            "add the tokenizer's files or use a method that needs no calibration (mean, procrustes)"
        ) from None


def built_in_text() -> str:
    """Rehead's built-in calibration text."""
    return gzip.decompress((files("rehead.data.assets") / BUILT_IN).read_bytes()).decode("utf-8")


def _read(name: str) -> str:
    """All documents of a source as one string."""
    if name == "built in":
        return built_in_text()
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
