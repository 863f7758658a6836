"""Store tokens on disk, two or four bytes each, and read rows from the memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rehead.checkpoints.stream import sync_dir, write_error
from rehead.data.beginning import IGNORED, NO_START, begun
from rehead.data.sources import documents_of, parse_source
from rehead.data.tokens import require_known, token_pieces
from rehead.errors import UsageError

_TOKENS, _STARTS, _FACTS = "tokens.raw", "documents.raw", "tokens.json"


class Rows(NamedTuple):
    """Rows of one forward pass, int64 ``[rows, length]`` each.

    Attributes:
        input_ids: tokens.
        position_ids: from 0 in every document, and from 0 where a row begins inside one.
        labels: the token that follows each; ``-100`` where that begins another document.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class StoreFacts:
    """The description of a store, saved beside its tokens.

    Attributes:
        key: hash of what it was made from: names, sizes and times of files, tokenizer, limit.
        dtype: ``"uint16"`` or ``"uint32"``.
        tokens: number of tokens.
        documents: number of documents.
        sha256: hash of the tokens and of the places where documents begin.
    """

    key: str
    dtype: str
    tokens: int
    documents: int
    sha256: str


class TokenStore:
    """A stream of tokens with the places where documents begin, memory-mapped from a folder.

    Args:
        folder: a folder written by :func:`write_store`.
        start: int64 ``[p]``, the tokens that begin a text (:func:`rehead.data.beginning.text_start`); every row begins
            with them, inside a document too.
    """

    def __init__(self, folder: Path, start: Tensor = NO_START) -> None:
        self.start = start
        self.facts = StoreFacts(**json.loads((folder / _FACTS).read_text()))
        self._tokens = np.memmap(folder / _TOKENS, dtype=self.facts.dtype, mode="r")
        self._starts = np.fromfile(folder / _STARTS, dtype="<i8")

    def rows(self, length: int) -> int:
        """Number of rows of ``length`` tokens; each also needs the token after it, as a label."""
        return (self.facts.tokens - 1) // length

    def read(self, rows: np.ndarray, length: int, *, isolated: bool = True) -> Rows:
        """Cut rows out of the stream.

        Args:
            rows: int64 ``[n]``, indices of the rows.
            length: tokens per row.
            isolated: restart positions at every document, with no label across two; otherwise a row is one text.
        """
        windows = np.stack([self._tokens[row * length : (row + 1) * length + 1] for row in rows]).astype(np.int64)
        labels = windows[:, 1:].copy()
        positions = np.broadcast_to(np.arange(length), (len(rows), length)).copy()
        for i, row in enumerate(rows):
            first = int(row) * length
            low, high = np.searchsorted(self._starts, [first, first + length + 1])
            begins = self._starts[low:high] - first  # in 0 .. length; `length` is the label of the last token
            if isolated or len(self.start):
                labels[i, begins[begins > 0] - 1] = IGNORED
            if isolated:
                inside = begins[begins < length]
                offsets = np.zeros(length, dtype=np.int64)
                offsets[inside] = inside
                positions[i] -= np.maximum.accumulate(offsets)
        inputs, *rest = (torch.from_numpy(part) for part in (windows[:, :-1].copy(), positions, labels))
        return Rows(begun(inputs, self.start), *rest)


def write_store(
    folder: Path,
    names: Sequence[str],
    tokenizer: Any,
    vocab_size: int,
    *,
    key: str,
    limit: int | None = None,
    streaming: bool = False,
    option: str = "--data",
    progress: Any = None,
    cache: Path | None = None,
) -> TokenStore:
    """Tokenise sources into a folder; a store with the same key there is reused.

    Args:
        folder: created if missing; another store in it is replaced.
        names: sources, as :func:`~rehead.data.sources.read_documents` takes them.
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding.
        key: hash of everything that the tokens depend on.
        limit: stop after so many tokens, taking documents from the sources in turn; None reads all, one after another.
        streaming: read Hub datasets over the network as they are needed.
        option: the flag that the names came from, for messages.
        progress: called with (stage, tokens so far, limit or 0).
        cache: a folder of stores to reuse, where this one is kept too.

    Raises:
        UsageError: a source is missing, empty or not text, or a token is outside the model's vocabulary.
        ResourceError: the disk is full.
    """
    held = _facts(folder)
    if held is not None and held.key == key:
        return TokenStore(folder)
    if cache is not None:
        return _through(cache / key[:32], folder, names, tokenizer, vocab_size, key, limit, streaming, option, progress)
    dtype = "uint16" if max(vocab_size, len(tokenizer)) <= 1 << 16 else "uint32"
    sources = [documents_of(parse_source(name, option=option), streaming, option) for name in names]
    documents = _in_turn(sources) if limit is not None else (text for source in sources for text in source)
    digest = hashlib.sha256()
    starts: list[int] = []
    total = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_FACTS, _TOKENS, _STARTS):  # never written over: a cache may have linked them elsewhere
            (folder / name).unlink(missing_ok=True)
        with open(folder / _TOKENS, "wb") as file:
            for ids, begins in token_pieces(documents, tokenizer):
                if ids.size:
                    require_known(int(ids.max()), vocab_size, option)
                if begins:
                    starts.append(total)
                data = ids.astype(dtype).tobytes()
                digest.update(data)
                file.write(data)
                total += len(ids)
                if progress is not None:
                    progress("tokenising", total, limit or 0)
                if limit is not None and total >= limit:
                    break
            file.flush()
            os.fsync(file.fileno())
        begins_at = np.asarray(starts, dtype="<i8").tobytes()
        digest.update(begins_at)
        (folder / _STARTS).write_bytes(begins_at)
        facts = StoreFacts(key, dtype, total, len(starts), digest.hexdigest())
        (folder / _FACTS).write_text(json.dumps(asdict(facts)) + "\n")
        sync_dir(folder)
    except OSError as error:
        raise write_error(error, str(folder)) from None
    return TokenStore(folder)


def _through(
    kept: Path,
    folder: Path,
    names: Sequence[str],
    tokenizer: Any,
    vocab_size: int,
    key: str,
    limit: int | None,
    streaming: bool,
    option: str,
    progress: Any,
) -> TokenStore:
    """A store from the cache, made there if missing, then linked (or copied) into ``folder``."""
    from filelock import FileLock

    try:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"--token-cache {kept.parent}: cannot be made ({reason}); give another folder") from None
        with FileLock(kept.with_suffix(".lock")):  # runs that start together tokenise once
            write_store(
                kept,
                names,
                tokenizer,
                vocab_size,
                key=key,
                limit=limit,
                streaming=streaming,
                option=option,
                progress=progress,
            )
            folder.mkdir(parents=True, exist_ok=True)
            for name in (_TOKENS, _STARTS, _FACTS):  # the facts last: without them there is no store
                (folder / name).unlink(missing_ok=True)
                try:
                    os.link(kept / name, folder / name)
                except OSError:  # another disk, or one that has no links
                    shutil.copyfile(kept / name, folder / name)
        sync_dir(folder)
    except OSError as error:
        raise write_error(error, str(folder)) from None
    return TokenStore(folder)


def _facts(folder: Path) -> StoreFacts | None:
    try:
        facts = StoreFacts(**json.loads((folder / _FACTS).read_text()))
        size = np.dtype(facts.dtype).itemsize * facts.tokens
        whole = (folder / _TOKENS).stat().st_size == size and (folder / _STARTS).stat().st_size == 8 * facts.documents
    except (OSError, ValueError, TypeError):
        return None
    return facts if whole else None


def _in_turn(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """One document of each source in turn, until all have ended."""
    left = list(sources)
    while left:
        for source in list(left):
            document = next(source, None)
            if document is None:
                left.remove(source)
            else:
                yield document
