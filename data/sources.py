"""Read documents from files, folders, saved datasets and Hub datasets, each given by one name.

A name is a path or a Hub dataset id. A revision may follow a Hub id, and options any name::

    speeches.txt.gz#lines,chars=:-200000      one document per line, all but the last 200,000 characters
    allenai/c4@main#config=en,split=train     a configuration and a split of a Hub dataset
    posts.jsonl#column=body                   another column than "text"
    built-in:heldout                          a text that ships with Rehead

Without ``#lines`` a text file is one document, since nothing in it marks where another begins.
"""

from __future__ import annotations

import gzip
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rehead.checkpoints.opening import split_revision
from rehead.data.builtin import text_path
from rehead.errors import UsageError, first_line, unknown_name

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
TABLE_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
#: Characters per document; more than any book has, and few enough to keep in memory.
MAX_CHARACTERS = 1 << 29
_OPTIONS = ("lines", "chars", "config", "split", "column")
_SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class DataSource:
    """One parsed name.

    Attributes:
        name: the path or Hub id.
        revision: of a Hub dataset.
        lines: each line of a text file that is not blank is a document.
        chars: (start, stop) of the part of a text file to read, in characters, as in a Python slice.
        config: configuration of a Hub dataset.
        split: split of a Hub dataset or of a saved one.
        column: the column that holds the text; "text", or the only column of strings, when None.
    """

    name: str
    revision: str | None = None
    lines: bool = False
    chars: tuple[int | None, int | None] = (None, None)
    config: str | None = None
    split: str = "train"
    column: str | None = None


def parse_source(text: str, *, option: str = "--data") -> DataSource:
    """Parse a source's name with its revision and options.

    Args:
        text: ``NAME[@REVISION][#OPTION[=VALUE],...]``; the path of an existing file or folder is not parsed further.
        option: the flag that the name came from, for messages.

    Raises:
        UsageError: the name is empty, or an option is unknown or invalid.
    """
    if not text.strip():
        raise UsageError(f"{option}: a name is empty; give a file, a folder or a Hub dataset")
    if os.path.exists(text):
        return DataSource(text)
    name, _, options = text_path(text).partition("#")
    name, revision = split_revision(name)
    source = DataSource(name, revision)
    for part in filter(None, options.split(",")):
        key, equals, value = part.partition("=")
        if key not in _OPTIONS:
            raise UsageError(f"{option} {text}: {unknown_name('option', key, _OPTIONS)}")
        if key == "lines":
            source = replace(source, lines=True)
        elif not equals or not value:
            raise UsageError(f"{option} {text}: {key} has no value; write #{key}=VALUE")
        elif key == "chars":
            source = replace(source, chars=_slice(value, text, option))
        else:
            named: dict[str, Any] = {key: value}
            source = replace(source, **named)
    return source


def _slice(value: str, text: str, option: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(-?\d*):(-?\d*)", value)
    if match is None or "-" in match.groups():
        raise UsageError(f"{option} {text}: chars={value} is not a range; write chars=START:STOP as in a Python slice")
    start, stop = (int(edge) if edge else None for edge in match.groups())
    return start, stop


def read_documents(names: Sequence[str], *, streaming: bool = False, option: str = "--data") -> Iterator[str]:
    """The documents of several sources, one source after the other.

    Files are read as they are needed, Hub datasets through ``datasets``. Blank documents are left out.

    Args:
        names: as :func:`parse_source` reads them: text files (.txt, .md, .rst, each also .gz), .jsonl, .json, .parquet,
            folders of such files (walked in sorted order), folders written by ``Dataset.save_to_disk``, Hub datasets.
        streaming: read a Hub dataset over the network as it is needed, rather than download all of it first.
        option: the flag that the names came from, for messages.

    Raises:
        UsageError: a source is missing, empty, not text, or has no such split or column.
    """
    if not names:
        raise UsageError(f"{option}: no data given; name a file, a folder or a Hub dataset")
    for text in names:
        yield from documents_of(parse_source(text, option=option), streaming, option)


def documents_of(source: DataSource, streaming: bool = False, option: str = "--data") -> Iterator[str]:
    """The documents of one source; arguments and errors as :func:`read_documents`."""
    empty = True
    try:
        for document in _open(source, streaming, option):
            if document.strip():
                empty = False
                yield document
    except UsageError:
        raise
    except (OSError, EOFError, UnicodeDecodeError) as error:
        _refuse(source, option, f"is not readable as text ({first_line(error, 160)}); give UTF-8 text")
    if empty:
        _refuse(source, option, "is empty; give a source with text")


def identity(names: Sequence[str], option: str = "--data") -> list[list[Any]]:
    """Values that change when the sources do, without reading them: names with options, and sizes and times of files.

    Raises:
        UsageError: an option of a name is invalid.
    """
    rows: list[list[Any]] = []
    for text in names:
        source = parse_source(text, option=option)
        place = Path(source.name)
        files = _walk(place) if place.is_dir() else [place] if place.is_file() else []
        stats = [[str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        rows.append([text, stats])
    return rows


def _open(source: DataSource, streaming: bool, option: str) -> Iterator[str]:
    path = Path(source.name)
    if path.is_file():
        yield from _file(path, source, option)
    elif path.is_dir() and any((path / name).is_file() for name in _SAVED):
        yield from _saved(path, source, option)
    elif path.is_dir():
        files = _walk(path)
        if not files:
            known = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
            _refuse(source, option, f"has no text; give a folder with files ending in {known}")
        for file in files:
            yield from _file(file, source, option)
    elif source.name.startswith((".", "/", "~")) or source.name.count("/") > 1 or _suffix(path):
        _refuse(source, option, "no such file or folder; give a text file, a folder or a Hub dataset")
    else:
        yield from _hub(source, streaming, option)


def _walk(folder: Path) -> list[Path]:
    """Files of known types below a folder in sorted order, without hidden files and Rehead's staging folders."""
    files = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(base) / name for name in sorted(names) if not name.startswith(".") and _suffix(Path(name))]
    return files


def _suffix(path: Path) -> str:
    """The file's ending, without .gz, if it is a known type; else empty."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    suffix = suffix.lower()
    return suffix if suffix in TEXT_SUFFIXES or suffix in TABLE_SUFFIXES else ""


def _file(path: Path, source: DataSource, option: str) -> Iterator[str]:
    if source.split != "train" or source.config is not None:
        _refuse(source, option, "split and config are for datasets, and this is a file; leave them out")
    kind = TABLE_SUFFIXES.get(_suffix(path))
    if kind is None:
        yield from _text(path, source, option)
        return
    _refuse_ranges(source, option)
    from datasets import load_dataset

    # Streaming, since otherwise a copy of the file would be written to the cache of `datasets`.
    with _table_errors(source, option):
        yield from _column(
            load_dataset(kind, data_files=os.fspath(path), split="train", streaming=True), source, option
        )


def _refuse_ranges(source: DataSource, option: str) -> None:
    if source.chars != (None, None) or source.lines:
        _refuse(source, option, "lines and chars are for text files; leave them out for tables and datasets")


def _text(path: Path, source: DataSource, option: str) -> Iterator[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:  # drops a byte order mark at the beginning
        if source.lines and source.chars == (None, None):
            while line := file.readline(MAX_CHARACTERS + 1):
                yield _checked(line.rstrip("\n"), source, option)
            return
        start, stop = source.chars
        whole = stop is None or stop < 0 or (start or 0) < 0
        text = _read(file, MAX_CHARACTERS + 1 if whole else min(stop or 0, MAX_CHARACTERS + 1))
        text = _checked(text, source, option)[start:stop]
    yield from text.split("\n") if source.lines else [text]


def _read(file: TextIO, limit: int) -> str:
    """At most ``limit`` characters; a compressed file may expand to a thousand times its size."""
    pieces = []
    while limit > 0 and (piece := file.read(min(limit, 1 << 22))):
        pieces.append(piece)
        limit -= len(piece)
    return "".join(pieces)


def _checked(text: str, source: DataSource, option: str) -> str:
    if len(text) > MAX_CHARACTERS:
        _refuse(source, option, f"has a document of more than {MAX_CHARACTERS:,} characters; cut it into several")
    if "\0" in text:
        _refuse(source, option, "is not text (it has NUL characters); give UTF-8 text")
    return text


def _saved(path: Path, source: DataSource, option: str) -> Iterator[str]:
    _refuse_ranges(source, option)
    from datasets import DatasetDict, load_from_disk

    with _table_errors(source, option):
        data = load_from_disk(os.fspath(path))
        if isinstance(data, DatasetDict):
            if source.split not in data:
                _refuse(source, option, unknown_name("split", source.split, map(str, data)))
            data = data[source.split]
        yield from _column(data, source, option)


def _hub(source: DataSource, streaming: bool, option: str) -> Iterator[str]:
    _refuse_ranges(source, option)
    from datasets import load_dataset

    with _table_errors(source, option):
        data = load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=streaming
        )
        yield from _column(data, source, option)


class _table_errors:  # noqa: N801
    """Turns any error of ``datasets`` inside the block into one line, and silences its log, which repeats the error."""

    def __init__(self, source: DataSource, option: str) -> None:
        self._source, self._option = source, option

    def __enter__(self) -> None:
        self._logger = logging.getLogger("datasets")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        self._logger.setLevel(self._level)
        if error is None or not isinstance(error, Exception) or isinstance(error, UsageError):
            return
        if os.path.isfile(self._source.name) and not os.path.getsize(self._source.name):
            _refuse(self._source, self._option, "is empty; give a source with text")
        local = os.path.exists(self._source.name)
        what = "cannot be read" if local else "is neither a file nor a Hub dataset that can be read"
        remedy = "check its form" if local else "check the name"
        _refuse(self._source, self._option, f"{what} ({first_line(error, 160)}); {remedy}")


def _column(rows: Iterable[Any], source: DataSource, option: str) -> Iterator[str]:
    """The text of each row."""
    column = None
    for row in rows:
        if column is None:
            column = source.column or ("text" if "text" in row else _only_column(row, source, option))
            if column not in row:
                _refuse(source, option, unknown_name("column", column, map(str, row)))
        value = row[column]
        if value is not None and not isinstance(value, str):
            _refuse(source, option, f"column {column!r} has {type(value).__name__} and not text; name another")
        yield value or ""


def _only_column(row: Any, source: DataSource, option: str) -> str:
    """The only column of strings; with several (ids and titles, say) the user must choose."""
    columns = [str(key) for key, value in row.items() if isinstance(value, str)]
    if not columns:
        _refuse(source, option, "has no column of text; give one with a column 'text'")
    if len(columns) > 1:
        listed = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
        _refuse(source, option, f"has several columns of text ({listed}); name one, such as #column={columns[-1]}")
    return columns[0]


def _refuse(source: DataSource, option: str, why: str) -> NoReturn:
    # "from None": the one line says all that the user needs.
    raise UsageError(f"{option} {source.name}: {why}") from None
