"""Small files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rehead.checkpoints.stream import sync_dir, write_error


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file beside its place, sync it, and rename it over what is there.

    Args:
        path: the file; its folder is made where it is missing.
        data: its content; text becomes UTF-8.

    Raises:
        ResourceError: the disk is full or fails; what was there stays.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        sync_dir(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise write_error(error, str(path)) from None
