"""What is written is there whole or not at all, files and folders alike."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rehead.checkpoints.files import remove, whole, write_file
from rehead.checkpoints.stream import ResourceError


def test_a_file_replaces_what_was_there(tmp_path: Path) -> None:
    write_file(tmp_path / "new" / "a.json", "größe")
    write_file(tmp_path / "new" / "a.json", b"two")
    assert (tmp_path / "new" / "a.json").read_bytes() == b"two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_folder_replaces_what_was_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with whole(tmp_path / "step") as part:
            (part / "deep").mkdir(parents=True)
            (part / "deep" / text).write_text(text)
    assert [path.name for path in (tmp_path / "step" / "deep").iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    write_file(tmp_path / "kept", "old")

    def fail(folder: bool) -> None:
        with whole(tmp_path / "kept") as part:
            part.mkdir() if folder else part.write_text("half")
            raise error

    for folder in (False, True):
        with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)):
            fail(folder)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "old")]


def test_a_sync_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "kept", "old")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=r"kept: cannot be written"):
        write_file(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old"


def test_a_link_is_removed_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
