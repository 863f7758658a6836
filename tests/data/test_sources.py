"""Sources of documents: every form gives the same documents, and what is no text says so in one line."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from rehead.data import sources as sources_module
from rehead.data.sources import identity, parse_source, read_documents
from rehead.errors import UsageError

DOCUMENTS = ["The first speech, on peace.", "Zweite Rede: über Handel – und Zölle.", "A third.\twith a tab"]


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, str]:
    """The same three documents in every form."""
    lines = "\n".join([DOCUMENTS[0], "", *DOCUMENTS[1:]]) + "\n"
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    rows = [{"id": i, "text": text, "body": text.upper()} for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    (tmp_path / "folder" / "1.md").write_text(DOCUMENTS[0], encoding="utf-8")
    (folder / "2.txt").write_text(DOCUMENTS[1], encoding="utf-8")
    (folder / "3.rst").write_text(DOCUMENTS[2], encoding="utf-8")
    (folder / "weights.bin").write_bytes(b"\0\1")
    (folder / ".hidden.txt").write_text("not this")
    names = ("a.txt#lines", "a.txt.gz#lines", "a.jsonl", "a.parquet", "saved", "splits", "folder")
    return {name: str(tmp_path / name) for name in names}


def test_every_form_gives_the_same_documents(forms: dict[str, str]) -> None:
    for name, place in forms.items():
        documents = list(read_documents([place]))
        assert sorted(documents) == sorted(DOCUMENTS), name
    # A folder is walked in sorted order, files before what lies deeper.
    assert list(read_documents([forms["folder"]])) == DOCUMENTS


def test_whole_files_ranges_splits_and_columns(tmp_path: Path, forms: dict[str, str]) -> None:
    plain = str(tmp_path / "a.txt")
    whole = Path(plain).read_text(encoding="utf-8")
    assert list(read_documents([plain])) == [whole]
    assert list(read_documents([plain + "#chars=:20", plain + "#chars=20:"])) == [whole[:20], whole[20:]]
    assert list(read_documents([plain + "#lines,chars=-18:"])) == [DOCUMENTS[2][-17:]]
    assert list(read_documents([forms["splits"] + "#split=test"])) == DOCUMENTS[:1]
    assert list(read_documents([forms["a.jsonl"] + "#column=body"])) == [text.upper() for text in DOCUMENTS]
    assert parse_source("owner/name@main#config=en").revision == "main"
    # Where the Hub keeps its own conversion of a dataset.
    assert parse_source("owner/name@refs/convert/parquet#config=en").revision == "refs/convert/parquet"
    hashed = tmp_path / "c#lines"
    hashed.write_text("a file whose name has a hash")
    assert list(read_documents([str(hashed)])) == ["a file whose name has a hash"]


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (None, "missing.txt", "no such file"),
        (None, "/no/such/folder", "no such file"),
        (b"", "empty.txt", "is empty"),
        (b"", "empty.jsonl", "is empty"),
        (b" \n\t\n", "blank.txt", "is empty"),
        (b"\xff\xfe\x00binary", "binary.txt", "not readable as text"),
        (b"text\0text", "nul.txt", "NUL"),
        (b"not gzip", "a.txt.gz", "not readable as text"),
        (b'{"text": 3}\n', "numbers.jsonl", "has int"),
        (b'{"a": "x"}\n', "a.jsonl#column=b", "unknown column 'b'"),
        (b'{"text": broken\n', "broken.jsonl", "cannot be read"),
        (b"text", "a.txt#linse", "did you mean 'lines'"),
        (b"text", "a.txt#chars=1", "not a range"),
        (b"text", "a.txt#chars", "has no value"),
        (b'{"a": "x"}\n', "a.jsonl#lines", "text files"),
        (b'{"id": "a1", "title": "x", "body": "y"}\n', "a.jsonl", "several columns of text (id, title, body)"),
        (b'{"a": "x"}\n', "a.jsonl#split=test", "split and config are for datasets"),
        (b"text", "a.txt#config=en", "split and config are for datasets"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, make: bytes | None, name: str, words: str) -> None:
    place = name if name.startswith("/") else str(tmp_path / name)
    if make is not None:
        Path(place.split("#")[0]).write_bytes(make)
    with pytest.raises(UsageError) as error:
        list(read_documents([place]))
    line = str(error.value)
    assert words in line
    assert line.startswith("--data ")
    assert "\n" not in line


def test_the_only_column_of_text_is_taken_and_a_mark_of_byte_order_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"id": 1, "content": "x"}\n{"id": 2, "content": null}\n{"id": 3, "content": "y"}\n'
    )
    assert list(read_documents([str(tmp_path / "a.jsonl")])) == ["x", "y"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert list(read_documents([str(tmp_path / "a.txt")])) == ["text"]


@pytest.mark.parametrize("name", ["owner/name#chars=:-100", "saved#lines"])
def test_ranges_of_datasets_are_refused_not_ignored(forms: dict[str, str], tmp_path: Path, name: str) -> None:
    place = str(tmp_path / name) if name.startswith("saved") else name
    with pytest.raises(UsageError, match="lines and chars are for text files"):
        list(read_documents([place]))


def test_a_table_that_cannot_be_read_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(UsageError, match="cannot be read"):
        list(read_documents([str(tmp_path / "a.jsonl")]))
    assert capfd.readouterr().err == ""


def test_a_hub_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def missing(*arguments, **options):
        asked.append((arguments, options))
        raise FileNotFoundError("no such dataset\non any server")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UsageError, match=r"neither a file nor a Hub dataset that can be read \(no such dataset\);"):
        list(read_documents(["owner/name@v2#config=en,split=dev"], streaming=True))
    assert asked == [(("owner/name", "en"), {"split": "dev", "revision": "v2", "streaming": True})]


def test_no_names_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data given"):
        list(read_documents([]))
    with pytest.raises(UsageError, match="name is empty"):
        list(read_documents([""]))
    with pytest.raises(UsageError, match="has no text"):
        list(read_documents([str(tmp_path)]))


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    place.write_text("some text")
    before = identity([str(place)])
    assert identity([str(place)]) == before
    place.write_text("some other text")
    assert identity([str(place)]) != before


def test_texts_that_ship_are_known_by_name() -> None:
    whole = "".join(read_documents(["built-in:heldout"]))
    assert len(whole) > 50_000
    assert next(read_documents(["built-in:heldout#chars=100:200"])) == whole[100:200]
    assert len(list(read_documents(["built-in:speeches#lines"]))) > 5
    with pytest.raises(UsageError, match="did you mean 'built-in:heldout'"):
        list(read_documents(["built-in:heldouts"]))


@pytest.mark.parametrize("lines", ["", "#lines"])
def test_a_packed_file_is_bounded_while_it_is_read(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may hold a thousand times its size; of this one, little more than the bound is ever unpacked."""
    monkeypatch.setattr(sources_module, "MAX_CHARACTERS", 1 << 16)
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wt") as file:
        for _ in range(200):
            file.write("x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"more than 65,536 characters; cut it"):
        list(read_documents([f"{path}{lines}"]))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    if not lines:
        assert list(read_documents([f"{path}#chars=10:20"])) == ["x" * 10]
