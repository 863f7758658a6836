"""Documents as tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehead.checkpoints.tokenizer import open_tokenizer
from rehead.data.sources import read_documents
from rehead.errors import UsageError, first_line

#: Longer documents are tokenised in pieces: a fast tokenizer holds about a hundred bytes for every token of its input.
PIECE = 1 << 18
#: Characters handed to the tokenizer at once, which spreads the texts of one call over the cores.
_BATCH = 1 << 22
#: Where a cut leaves the tokens alone: between two lines, or else before a space and a word.
_CUTS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def load_tokenizer(place: Any, option: str = "--data") -> Any:
    """A checkpoint's own tokenizer, without its limit on the length of a text.

    Args:
        place: an open checkpoint or a folder.
        option: the flag that needs it, for messages.

    Raises:
        UsageError: the checkpoint has none, or one that cannot be loaded.
    """
    try:
        return open_tokenizer(place)
    except Exception as error:
        raise UsageError(
            f"{getattr(place, 'id', place)}: its tokenizer cannot be loaded ({first_line(error, 120)}), and {option} "
            "needs one; put the tokenizer's files beside the weights"
        ) from None


def require_known(highest: int, vocab_size: int, option: str) -> None:
    """Raise UsageError where a tokenizer gives a token that a model has no embedding for.

    Args:
        highest: the highest token of a text.
        vocab_size: rows of the model's embedding.
        option: the flag that the text came from.
    """
    if highest >= vocab_size:
        raise UsageError(
            f"{option}: the tokenizer gives token {highest}, the model has {vocab_size}; give the model with its own "
            "tokenizer"
        )


def token_pieces(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[np.ndarray, bool]]:
    """The token ids of documents, piece by piece: ``(ids, whether the piece begins a document)``.

    A document begins with the tokenizer's own special tokens and ends with EOS, where the tokenizer has one. Documents
    longer than :data:`PIECE` characters are cut behind a line's end, where byte-pair tokenizers cut too.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
    """
    eos = tokenizer.eos_token_id
    for batch in _batches(_cut(documents)):
        ids: list[list[int]] = [[] for _ in batch]
        for special in (True, False):  # a piece from inside a document must not begin like a document
            chosen = [i for i, (_, begins, _) in enumerate(batch) if begins == special]
            if chosen:
                found = tokenizer([batch[i][0] for i in chosen], add_special_tokens=special).input_ids
                for i, row in zip(chosen, found):
                    ids[i] = row
        for (_, begins, ends), row in zip(batch, ids):
            has_end = eos is not None and bool(row) and row[-1] == eos
            if ends and eos is not None and not has_end:
                row = [*row, eos]
            elif not ends and begins and has_end:
                row = row[:-1]
            yield np.asarray(row, dtype=np.int64), begins


def _cut(documents: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """(text, begins a document, ends one)."""
    for document in documents:
        at = 0
        while len(document) - at > PIECE:
            end = next(filter(None, (cut.search(document, at + PIECE, at + 2 * PIECE) for cut in _CUTS)), None)
            if end is None:
                break
            yield document[at : end.end()], at == 0, False
            at = end.end()
        yield document[at:], at == 0, True


def _batches(pieces: Iterable[tuple[str, bool, bool]]) -> Iterator[list[tuple[str, bool, bool]]]:
    batch: list[tuple[str, bool, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_stream(
    names: Sequence[str], tokenizer: Any, limit: int | None = None, *, streaming: bool = False, option: str = "--data"
) -> Tensor:
    """The tokens of several sources as one stream, documents joined with EOS.

    Args:
        names: sources, as :func:`~rehead.data.sources.read_documents` takes them.
        tokenizer: a transformers tokenizer.
        limit: the first so many tokens only; what lies behind is not read.
        streaming: as for ``read_documents``.
        option: the flag that the names came from, for messages.

    Returns:
        int64 ``[T]``.

    Raises:
        UsageError: a source is missing, empty or not text, or there are fewer than two tokens.
    """
    found: list[np.ndarray] = []
    total = 0
    for ids, _ in token_pieces(_few_first(read_documents(names, streaming=streaming, option=option), limit), tokenizer):
        found.append(ids)
        total += len(ids)
        if limit is not None and total >= limit:
            break
    tokens = torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)
    if limit is None or total < limit:
        eos = tokenizer.eos_token_id
        if eos is not None and total and int(tokens[-1]) == eos:
            tokens = tokens[:-1]  # joined, not ended
    tokens = tokens[:limit]
    if len(tokens) < 2:
        raise UsageError(f"{option} {', '.join(names)}: too short, {len(tokens)} tokens; give more text")
    return tokens


def _few_first(documents: Iterator[str], limit: int | None) -> Iterator[str]:
    """Cut a long first document, of which a small limit would use little; twenty characters hold a token."""
    if limit is None:
        return documents
    first = next(documents, None)
    if first is None:
        return documents
    most = max(20 * limit, PIECE)
    return itertools.chain([first[:most]], documents)
