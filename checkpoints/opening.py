"""Open a checkpoint by name: a folder, a Hub id, or ``id@revision``."""

from __future__ import annotations

import contextlib
import os
import threading
from importlib.resources import files
from pathlib import Path

from rehead.checkpoints.hub import HubSource
from rehead.checkpoints.source import LocalSource, Source, fetch_ahead
from rehead.errors import UnsupportedError, UsageError

#: The small model that ships with Rehead.
EMBEDDED = "embedded"

#: Bytes of a checkpoint that the disk reads while libraries load, and how many are asked for at once.
_BEFOREHAND, _PIECE = 1 << 30, 8 << 20


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision`` of the Hub into (id, revision); a revision may contain slashes.

    A path, or an id without a revision, gives (name, None).
    """
    place, _, revision = name.partition("@")
    if not place or not revision or name.startswith((".", "/", "~")) or os.path.exists(name):
        return name, None
    return place, revision


def embedded_model() -> Path:
    """The folder of the model that ships with Rehead.

    Raises:
        UnsupportedError: this installation lacks it.
    """
    folder = Path(str(files("rehead.recipes.assets") / EMBEDDED))
    if not (folder / "config.json").is_file():
        raise UnsupportedError("embedded: this installation lacks the embedded model; install Rehead again")
    return folder


def open_source(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """Open a checkpoint without reading weights: a local folder if one has this name, else a Hub repository.

    Args:
        model: a folder, a Hub id such as ``"meta-llama/Llama-2-7b-hf"``, or ``embedded`` for the small model that ships
            with Rehead.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: no such folder, repository or revision, or a revision given for a folder.
        UnsupportedError: the checkpoint is in another format or broken, or the Hub refuses or cannot be reached.
    """
    text = os.fspath(model)
    if not text.strip():
        raise UsageError("the model's name is empty; give a checkpoint's folder or a Hub id (owner/name)")
    if text == EMBEDDED and not os.path.exists(text):
        return LocalSource(embedded_model(), id=text)
    if os.path.isdir(text):
        if revision is not None:
            raise UsageError(f"{text}: is a local folder, which has no revisions; leave --revision out")
        return LocalSource(text)
    if os.path.exists(text):
        raise UsageError(f"{text}: is a file; give the checkpoint's folder or a Hub id")
    parts = text.split("/")
    looks_local = text.startswith((".", "/", "~")) or "\\" in text or len(parts) > 2 or not all(parts)
    if looks_local:
        raise UsageError(f"{text}: no such folder; give a checkpoint's folder or a Hub id (owner/name)")
    return HubSource(text, revision)


def read_beforehand(model: str) -> None:
    """Have the disk read where a local checkpoint's weights begin, while this process loads libraries.

    Returns at once. The system keeps what it read as long as nothing else needs that memory; errors are left to whoever
    opens the checkpoint.
    """
    threading.Thread(target=_fetch_start, args=(Path(model),), daemon=True, name="rehead-fetch").start()


def _fetch_start(folder: Path) -> None:
    left = _BEFOREHAND
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                size = min(path.stat().st_size, left)
                for start in range(0, size, _PIECE):
                    fetch_ahead(file.fileno(), start, min(_PIECE, size - start))
            left -= size
