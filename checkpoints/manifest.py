"""The manifest ``rehead.json``: what a conversion did, and the size and SHA-256 of every file it wrote."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rehead.checkpoints.manifest_schema import FORMAT, broken_field
from rehead.checkpoints.safetensors_io import check_shard_name, loads_strict, shown
from rehead.checkpoints.smallfiles import MANIFEST_NAME
from rehead.checkpoints.stream import CHUNK, hash_file
from rehead.errors import ReheadError, UnsupportedError, UsageError, VerificationError
from rehead.version import __version__

__all__ = [
    "MANIFEST_NAME",
    "completed",
    "made_by",
    "manifest_bytes",
    "read_manifest",
    "verify_files",
    "versions",
]

_VERSION = re.compile(r"""^__version__ = ['"]([^'"]+)['"]$""", re.MULTILINE)
_MAX_BYTES = 256_000_000
_REPEAT = "convert again or fetch it again"


def versions() -> dict[str, str]:
    """The versions of Python, torch and transformers; neither library is imported for that."""
    return {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "transformers")}}


def _version(name: str) -> str:
    """A library's version in its own words, read from its files where it is not imported yet.

    What the installation says may be another: a build for GPUs calls itself ``2.11.0+cu130``, its package ``2.11.0``.
    """
    if name not in sys.modules and (spec := find_spec(name)) is not None:
        for folder in spec.submodule_search_locations or ():
            for file in ("version.py", "__init__.py"):
                with contextlib.suppress(OSError):
                    text = (Path(folder) / file).read_text(encoding="utf-8")
                    if (said := _VERSION.search(text)) is not None:
                        return said[1]
    return str(import_module(name).__version__)


def made_by(command: str) -> dict[str, Any]:
    """The first entries of every manifest: the tool, the versions and the command."""
    return {"tool": {"name": "rehead", "version": __version__}, "versions": versions(), "command": command}


def manifest_bytes(
    content: Mapping[str, Any],
    files: Mapping[str, tuple[int, str]],
    fingerprint: str,
    parts: Mapping[str, str] | None = None,
) -> bytes:
    """The manifest's bytes; equal input gives equal bytes.

    Args:
        content: the conversion's own entries: fields of :class:`~rehead.checkpoints.manifest_schema.Manifest`.
        files: (size in bytes, SHA-256 in hex) by name, without the manifest itself.
        fingerprint: hash of everything that determines the output.
        parts: a hash of each named part of that.
    """
    table = {
        "format": FORMAT,
        **{k: v for k, v in content.items() if k not in ("format", "fingerprint", "fingerprint_parts", "files")},
        "fingerprint": fingerprint,
        **({"fingerprint_parts": dict(parts)} if parts else {}),
        "files": {name: {"size": size, "sha256": sha} for name, (size, sha) in sorted(files.items())},
    }
    return (json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_manifest(out: str | os.PathLike[str]) -> dict[str, Any]:
    """A folder's manifest; its form is checked against the schema, the files are not.

    Raises:
        UsageError: the folder or the manifest is missing.
        VerificationError: the manifest is broken.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give what `rehead convert` wrote")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(
            f"{folder}: no {MANIFEST_NAME} in it, so Rehead did not write it; give what `rehead convert` wrote"
        )
    try:
        with open(path, "rb") as f:
            raw = f.read(_MAX_BYTES + 1)
        table = loads_strict(raw, MANIFEST_NAME) if len(raw) <= _MAX_BYTES else None
    except (OSError, UnsupportedError) as err:
        raise VerificationError(f"{folder}/{MANIFEST_NAME}: cannot be read ({err}); {_REPEAT}") from None
    if not isinstance(table, dict) or not isinstance(table.get("files"), dict):
        raise VerificationError(f"{folder}/{MANIFEST_NAME}: not a manifest; {_REPEAT}")
    if table.get("format") != FORMAT:
        raise VerificationError(
            f"{folder}/{MANIFEST_NAME}: its format is {shown(str(table.get('format')))}, this version reads {FORMAT}; "
            "update it"
        )
    for name, entry in table["files"].items():
        ok = isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)
        try:
            check_shard_name(f"{name}.safetensors", MANIFEST_NAME)
        except UnsupportedError:
            ok = False
        if not ok:
            raise VerificationError(f"{folder}/{MANIFEST_NAME}: bad entry for {shown(name)}; {_REPEAT}")
    if wrong := broken_field(table):
        raise VerificationError(f"{folder}/{MANIFEST_NAME}: bad {shown(wrong)}; {_REPEAT}")
    return table


def verify_files(
    out: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None, *, allow_extra: bool = False
) -> dict[str, Any]:
    """Check every file of a converted folder against its manifest and return the manifest.

    Args:
        out: the converted folder.
        progress: called with (bytes hashed, bytes in all).
        allow_extra: accept files that the manifest does not name.

    Raises:
        UsageError: no folder or no manifest.
        VerificationError: a file is missing, extra, of another size or of another SHA-256; the message names it.
    """
    folder = Path(out)
    table = read_manifest(folder)
    files: dict[str, Any] = table["files"]
    present = set(_walk(folder)) - {MANIFEST_NAME}
    missing = sorted(files.keys() - present)
    if missing:
        raise VerificationError(f"{folder}: {_named(missing)} missing; {_REPEAT}")
    extra = sorted(present - files.keys())
    if extra and not allow_extra:
        raise VerificationError(f"{folder}: {_named(extra)} not in the manifest; move what is not part of it elsewhere")
    total = sum(entry["size"] for entry in files.values())
    for name, entry in files.items():
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise VerificationError(f"{folder}/{name}: {size} bytes where the manifest says {entry['size']}; {_REPEAT}")
    done = 0
    buffer = bytearray(CHUNK)
    for name, entry in files.items():
        try:
            size, sha = hash_file(folder / name, buffer=buffer)
        except OSError as err:
            raise VerificationError(f"{folder}/{name}: cannot be read ({err.strerror}); check the disk") from None
        if (size, sha) != (entry["size"], entry["sha256"]):
            raise VerificationError(f"{folder}/{name}: its SHA-256 is not the manifest's, so it has changed; {_REPEAT}")
        done += size
        if progress is not None:
            progress(done, total)
    return table


def _walk(folder: Path) -> list[str]:
    """Files below a folder, without those of git and of the Hub's client (`.git`, `.cache`, `.gitattributes`)."""
    files = []
    for base, folders, names in os.walk(folder):
        here = Path(base).relative_to(folder)
        folders[:] = [f for f in folders if not (here == Path(".") and f in (".cache", ".git"))]
        files += [(here / name).as_posix() for name in names if (here / name).as_posix() != ".gitattributes"]
    return files


def _named(names: list[str]) -> str:
    shown_names = ", ".join(shown(n) for n in names[:3])
    return shown_names + (f" and {len(names) - 3} more are" if len(names) > 3 else " are" if len(names) > 1 else " is")


def completed(out: str | os.PathLike[str], fingerprint: str) -> dict[str, Any] | None:
    """The manifest of ``out`` if it is the complete result of the conversion with this fingerprint, else None.

    A run killed right after its rename leaves such a folder, and a resumed run has nothing more to do. Only sizes are
    compared; :func:`verify_files` reads the files.
    """
    folder = Path(out)
    try:
        table = read_manifest(folder)
    except ReheadError:
        return None
    same = table.get("fingerprint") == fingerprint
    files = table["files"].items()
    if same and all((folder / n).is_file() and (folder / n).stat().st_size == e["size"] for n, e in files):
        return table
    return None
