"""Files and folders that are there whole or not at all: written beside their place, synced, renamed last."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rehead.checkpoints.stream import sync_dir, write_error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write a file or a folder to, which replaces what is at ``path`` when the block ends.

    Args:
        path: where it goes; its parent is made where it is missing.

    Raises:
        ResourceError: the disk is full or fails. After this and any other error, what was at ``path`` stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        yield part
        for file in [part] if part.is_file() else sorted(part.rglob("*")):
            if file.is_file():
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
            else:
                sync_dir(file)
        if part.is_dir():
            sync_dir(part)
            remove(path)
        os.replace(part, path)
        sync_dir(path.parent)
    except OSError as error:
        raise write_error(error, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def write_file(path: Path, data: str | bytes) -> None:
    """Write a small file; see :func:`whole`.

    Args:
        path: the file.
        data: its content; text becomes UTF-8.
    """
    with whole(path) as part:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with all that is in it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
