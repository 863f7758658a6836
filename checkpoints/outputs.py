"""Where an output may be written: not over its source, and over nothing that is not a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rehead.checkpoints.smallfiles import CONFIG_NAME, MANIFEST_NAME, is_checkpoint_file
from rehead.errors import UsageError


def out_path(out: str | os.PathLike[str]) -> Path:
    """The absolute path of OUT; raises UsageError for an empty one, which would be the working directory."""
    if not os.fspath(out).strip():
        raise UsageError("OUT is empty; give a new folder")
    return Path(os.path.abspath(out))


def check_out(out: Path, source_folder: Path | None, overwrite: bool) -> None:
    """Refuse an invalid OUT.

    Args:
        out: the folder to be written.
        source_folder: the source's folder when it is local.
        overwrite: whether an existing OUT may be replaced.

    Raises:
        UsageError: OUT is the source, inside it or around it; exists without ``overwrite``; or exists and is not a
            checkpoint, so that replacing it would delete foreign files.
    """
    if out.name in ("", ".", ".."):
        raise UsageError(f"{out}: is not a folder name; give a new folder as OUT")
    real = out.resolve()
    if source_folder is not None:
        src = source_folder.resolve()
        if real == src:
            raise UsageError(f"{out}: OUT is the source itself; choose another OUT")
        if real.is_relative_to(src):
            raise UsageError(f"{out}: OUT lies inside the source; choose an OUT outside {source_folder}")
        if src.is_relative_to(real):
            raise UsageError(f"{out}: the source lies inside OUT; choose another OUT")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UsageError(f"{out}: already exists; choose another OUT or give --overwrite")
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{out}: is a file or a link, not a folder; choose another OUT")
    names = os.listdir(out)
    if names and MANIFEST_NAME not in names and CONFIG_NAME not in names:
        raise UsageError(f"{out}: has files but no checkpoint, so it will not be overwritten; choose another OUT")
    foreign = foreign_file(out)
    if foreign is not None:
        raise UsageError(
            f"{out}: has {foreign}, which is not part of a checkpoint and would be lost; move it away or choose "
            "another OUT"
        )


def foreign_file(folder: Path) -> str | None:
    """The first file or folder, by name, that is not part of the checkpoint in a folder; None if there is none.

    Files in Rehead's manifest are part of it, and all that model hubs and training libraries put into a checkpoint's
    folder. A link is foreign, since its target is not checked.
    """
    try:
        listed = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        own = set(listed) if isinstance(listed, dict) else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    for place, folders, files in os.walk(folder):
        folders.sort()
        inside = Path(place).relative_to(folder)
        for name in sorted([*files, *(one for one in folders if (Path(place) / one).is_symlink())]):
            path = (inside / name).as_posix()
            if path not in own and not is_checkpoint_file(path):
                return path
    return None
