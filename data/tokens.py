"""Turn documents into tokens, long ones in pieces."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rehead.checkpoints.tokenizer import open_tokenizer
from rehead.data.sources import read_documents
from rehead.errors import UsageError, first_line

#: Longer documents are tokenised in pieces: a fast tokenizer needs about a hundred bytes per token of its input.
PIECE = 1 << 18
#: Characters passed to the tokenizer at once; it spreads the texts of one call over the cores.
_BATCH = 1 << 22
#: Characters on both sides of a cut that are tokenised to check it.
_CONTEXT = 256
_TRIES = 64
#: Places where a cut probably changes no token: between two lines, or else before a space and a word.
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
    """Raise UsageError if a tokenizer produces a token without a row in the model's embedding.

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

    A document begins with the tokenizer's own special tokens and ends with EOS, if the tokenizer has one. Documents
    longer than :data:`PIECE` characters are cut at a token's end. A piece from inside a document is tokenised with some
    text before it, since many tokenizers begin every text with a space.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
    """
    eos = tokenizer.eos_token_id
    for batch in _batches(_cut(documents, tokenizer)):
        ids: list[list[int]] = [[] for _ in batch]
        opening = [i for i, piece in enumerate(batch) if piece.begins]
        if opening:
            for i, row in zip(opening, tokenizer([batch[i].text for i in opening]).input_ids):
                ids[i] = row
        inside = [i for i, piece in enumerate(batch) if not piece.begins]  # these must not begin like a document
        for i, row in zip(inside, _continued([batch[i] for i in inside], tokenizer)):
            ids[i] = row
        for (_, begins, ends, _), row in zip(batch, ids):
            has_end = eos is not None and bool(row) and row[-1] == eos
            if ends and eos is not None and not has_end:
                row = [*row, eos]
            elif not ends and begins and has_end:
                row = row[:-1]
            yield np.asarray(row, dtype=np.int64), begins


class _Piece(NamedTuple):
    """A part of a document; the first ``before`` characters of ``text`` belong to the part before."""

    text: str
    begins: bool
    ends: bool
    before: int = 0


def _continued(pieces: Sequence[_Piece], tokenizer: Any) -> list[list[int]]:
    """The tokens of pieces from inside documents, without those of the text before each piece."""
    if not pieces:
        return []
    placed = any(piece.before for piece in pieces)
    encoded = tokenizer([p.text for p in pieces], add_special_tokens=False, return_offsets_mapping=placed)
    if not placed:
        return list(encoded.input_ids)
    return [
        [token for token, (_, end) in zip(row, places) if end > piece.before]
        for piece, row, places in zip(pieces, encoded.input_ids, encoded.offset_mapping)
    ]


def _cut(documents: Iterable[str], tokenizer: Any) -> Iterator[_Piece]:
    context = _CONTEXT if getattr(tokenizer, "is_fast", False) else 0  # slow ones do not say where a token stands
    for document in documents:
        at = 0
        while len(document) - at > PIECE:
            end = _place(document, at, tokenizer, context)
            if end is None:
                break
            yield _Piece(document[max(at - context, 0) : end], at == 0, False, min(at, context))
            at = end
        yield _Piece(document[max(at - context, 0) :], at == 0, True, min(at, context))


def _place(document: str, at: int, tokenizer: Any, context: int) -> int | None:
    """The end of the piece that begins at ``at``: the first place of the best kind where a cut changes no token.

    None if there is no such place; the piece is then the rest of the document.
    """
    matches = itertools.chain.from_iterable(cut.finditer(document, at + PIECE, at + 2 * PIECE) for cut in _CUTS)
    places = (match.end() for match in itertools.islice(matches, _TRIES))
    return next((place for place in places if not context or _seamless(document, place, tokenizer, context)), None)


def _seamless(document: str, at: int, tokenizer: Any, context: int) -> bool:
    """Whether a cut at ``at`` leaves the tokens before it as they are in running text."""
    start = max(at - context, 0)
    left = tokenizer(document[start:at], add_special_tokens=False).input_ids
    both = tokenizer(document[start : at + context], add_special_tokens=False, return_offsets_mapping=True)
    ends = [end + start for _, end in both.offset_mapping]
    return both.input_ids[: len(left)] == left and [end <= at for end in ends] == [
        i < len(left) for i in range(len(ends))
    ]


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_stream(names: Sequence[str], tokenizer: Any, limit: int | None = None, *, option: str = "--data") -> Tensor:
    """The tokens of several sources as one stream, documents joined with EOS.

    Args:
        names: sources, as :func:`~rehead.data.sources.read_documents` takes them.
        tokenizer: a transformers tokenizer.
        limit: number of tokens to read from the start; None for all.
        option: the flag that the names came from, for messages.

    Returns:
        int64 ``[T]``.

    Raises:
        UsageError: a source is missing, empty or not text, or there are fewer than two tokens.
    """
    pieces: list[np.ndarray] = []
    total = 0
    for ids, _ in token_pieces(_few_first(read_documents(names, option=option), limit), tokenizer):
        pieces.append(ids)
        total += len(ids)
        if limit is not None and total >= limit:
            break
    tokens = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.int64)
    if limit is None or total < limit:
        eos = tokenizer.eos_token_id
        if eos is not None and total and int(tokens[-1]) == eos:
            tokens = tokens[:-1]  # EOS only between documents
    tokens = tokens[:limit]
    if len(tokens) < 2:
        raise UsageError(f"{option} {', '.join(names)}: too short, {len(tokens)} tokens; give more text")
    return tokens


def _few_first(documents: Iterator[str], limit: int | None) -> Iterator[str]:
    """Cut a long first document if the limit needs only its beginning; no token is longer than twenty characters."""
    if limit is None:
        return documents
    first = next(documents, None)
    if first is None:
        return documents
    most = max(20 * limit, PIECE)
    return itertools.chain([first[:most]], documents)
