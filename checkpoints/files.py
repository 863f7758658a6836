"""Write files and folders completely or not at all: to a temporary name beside the target, synced, renamed last."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rehead.checkpoints.stream import sync_dir, write_error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path for a file or a folder, which replaces ``path`` when the block ends without an error.

    Args:
        path: the final place; a missing parent folder is created.

    Raises:
        ResourceError: the disk is full or fails. After any error, ``path`` is unchanged.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            number = left.name.split(".")[-2]
            if left == part or (number.isdigit() and not is_running(int(number))):  # its process was killed
                remove(left)
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


def is_running(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def write_file(path: Path, data: str | bytes) -> None:
    """Write a small file completely or not at all; text is encoded as UTF-8. Raises as :func:`whole`."""
    with whole(path) as part:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its contents, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically (Linux's renameat2); False where that cannot be done."""
    at_cwd, swap = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), ctypes.c_uint(swap)) == 0
