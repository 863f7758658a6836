"""The staging folder beside OUT: one writer at a time, a journal of finished files, one rename at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehead.checkpoints.files import exchange, is_running, remove
from rehead.checkpoints.smallfiles import MANIFEST_NAME
from rehead.checkpoints.stream import sync_dir, write_error
from rehead.errors import UnsupportedError, UsageError, output_expected

try:
    import fcntl
except ImportError:  # Windows has no flock; the process id in the journal stands in for it
    fcntl = None  # type: ignore[assignment]

PRIVATE = ".rehead"  # inside the staging folder; gone before the rename
_JOURNAL = "journal.jsonl"
_OWNER = "owner.json"


def fingerprint_of(parts: str | Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """(a hash of everything that determines the output, a hash of each named part of it)."""
    if isinstance(parts, str):
        return parts, {}
    hashes = {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for name, value in parts.items()
    }
    whole = hashlib.sha256("\n".join(f"{k}={v}" for k, v in sorted(hashes.items())).encode()).hexdigest()
    return whole, hashes


def noted_parts(out: Path) -> dict[str, str] | None:
    """The hashes by name that an interrupted run of ``out`` noted of what determines its output; None without one."""
    path = staging_path(out)
    head, _ = _read_journal(path)
    return _parts_of(head or _read_manifest(path)[0])


def _parts_of(head: Mapping[str, Any]) -> dict[str, str] | None:
    parts = head.get("parts")
    return parts if isinstance(parts, dict) else {} if head else None


def refuse_other(out: Path, changed: list[str]) -> None:
    if changed:
        what = ", ".join(changed).replace("asked", "the options")
        raise UsageError(
            f"{out}: cannot resume, since {what} changed after the interrupted run; run again without --resume"
        )


def _read_journal(staging: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """(fingerprint and parts, files) as far as a journal is whole; empty where there is none."""
    try:
        lines = (staging / PRIVATE / _JOURNAL).read_bytes().split(b"\n")[:-1]  # an unfinished line does not count
    except OSError:
        return {}, {}
    head: dict[str, Any] = {}
    files: dict[str, tuple[int, str]] = {}
    for line in lines:
        try:
            record = json.loads(line)
            if "fingerprint" in record:
                head = record
            else:
                files[record["file"]] = (int(record["size"]), str(record["sha256"]))
        except (ValueError, TypeError, KeyError):
            break
    return head, files


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """(fingerprint and parts, files) of a run killed just before the rename: no journal any more, a whole manifest."""
    try:
        table = json.loads((folder / MANIFEST_NAME).read_bytes())
        files = {k: (int(v["size"]), str(v["sha256"])) for k, v in table["files"].items()}
        return {"fingerprint": table["fingerprint"], "parts": table.get("fingerprint_parts")}, files
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}, {}


def staging_path(out: Path) -> Path:
    """The staging folder of an output folder: beside it, so on the same file system, and always of the same name."""
    return out.parent / f".{out.name}.rehead-staging"


def only_unpublished(out: Path) -> bool:
    """Whether a killed run left a staging folder that is complete but for the rename."""
    path = staging_path(out)
    return (path / MANIFEST_NAME).is_file() and not (path / PRIVATE / _JOURNAL).exists()


class Staging:
    """The locked staging folder of one run.

    Args:
        out: the folder that will appear at the end.
        fingerprint: hash of what determines the output.
        parts: hash of each named part of it, so that an error can name the part that differs.
        resume: keep the finished files of an interrupted run; otherwise they are removed.

    Attributes:
        path: the staging folder.
        files: (size, SHA-256) of every finished file.
        resumed: whether an interrupted run's files were kept.

    Raises:
        UsageError: another run is writing OUT, or the files to resume from belong to another conversion.
        ResourceError: the folder cannot be created.
    """

    def __init__(self, out: Path, fingerprint: str, parts: Mapping[str, str], *, resume: bool) -> None:
        self.out = out
        self.path = staging_path(out)
        self.retired = out.parent / f".{out.name}.rehead-old"
        self.fingerprint, self.parts = fingerprint, dict(parts)
        self.files: dict[str, tuple[int, str]] = {}
        self.resumed = False
        self._journal_fd = -1
        self._made: list[Path] = []
        self._fd = -1
        try:
            self._make_parents()
            self._lock()
        except OSError as err:
            raise write_error(err, str(out)) from None
        try:
            self._recover()
            if not (resume and self._load(parts)):
                self._empty()
                self._begin(parts)
        except OSError as err:
            self.keep() if self.resumed else self.discard()
            raise write_error(err, str(out)) from None
        except BaseException:
            self.keep()
            raise

    # ---- one writer at a time

    def _make_parents(self) -> None:
        missing = []
        parent = self.out.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        if not parent.is_dir():
            raise UsageError(f"{self.out}: {parent} is not a folder; choose another OUT")
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._made.append(folder)

    def _lock(self) -> None:
        """Lock the staging folder itself, so that no lock file is left to clean up.

        Another run may rename or remove the folder between opening and locking it. The path then no longer leads to
        the locked folder, and the loop tries again.
        """
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
            if self.path.is_symlink() or not self.path.is_dir():
                raise UsageError(f"{self.path}: is in the way of the staging folder; remove it")
            if fcntl is None:
                self._refuse_if_owned()
                return
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise UsageError(self._busy(self._owner())) from None
            except OSError:  # a file system without locks
                os.close(fd)
                self._refuse_if_owned()
                return
            try:
                same = os.path.samestat(os.fstat(fd), os.stat(self.path))
            except FileNotFoundError:
                same = False
            if same:
                self._fd = fd
                return
            os.close(fd)

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads((self.path / PRIVATE / _OWNER).read_text())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _busy(self, owner: dict[str, Any]) -> str:
        who = f" (process {owner['pid']})" if type(owner.get("pid")) is int else ""
        return f"{self.out}: another run{who} is writing it; wait for that to end or choose another OUT"

    def _refuse_if_owned(self) -> None:
        owner = self._owner()
        pid = owner.get("pid")
        if type(pid) is int and pid != os.getpid() and owner.get("host") == socket.gethostname() and is_running(pid):
            raise UsageError(self._busy(owner))

    def _unlock(self) -> None:
        for fd in (self._fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal_fd = -1

    # ---- what an earlier run left

    def _recover(self) -> None:
        """Put the old OUT back if a run was killed between the two renames of an overwrite; else remove it."""
        if os.path.lexists(self.retired):
            if os.path.lexists(self.out):
                remove(self.retired)
            else:
                os.rename(self.retired, self.out)

    def _load(self, parts: Mapping[str, str]) -> bool:
        """Read the journal of an earlier run; False when there is none."""
        head, files = _read_journal(self.path)
        if not head:
            head, files = _read_manifest(self.path)
        if not head:
            return False
        if head.get("fingerprint") != self.fingerprint:
            earlier = _parts_of(head) or {}
            differ = sorted(k for k in {*parts, *earlier} if parts.get(k) != earlier.get(k))
            refuse_other(self.out, differ if parts and earlier and differ else ["the source or the options"])
        self.files = files
        self.resumed = True
        self._begin(parts)
        return True

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            remove(entry)

    # ---- the journal

    @property
    def private(self) -> Path:
        """The folder inside the staging folder that does not become part of OUT."""
        return self.path / PRIVATE

    def _begin(self, parts: Mapping[str, str]) -> None:
        self.private.mkdir(exist_ok=True)
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        (self.private / _OWNER).write_text(json.dumps(owner))
        fresh = self.private / (_JOURNAL + ".new")
        self._journal_fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        self._append({"fingerprint": self.fingerprint, "parts": dict(parts)}, *self._records())
        os.replace(fresh, self.private / _JOURNAL)
        sync_dir(self.private)
        sync_dir(self.path)

    def _records(self) -> list[dict[str, Any]]:
        return [{"file": name, "size": size, "sha256": sha} for name, (size, sha) in self.files.items()]

    def _append(self, *records: Mapping[str, Any]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records).encode()
        while text:
            text = text[os.write(self._journal_fd, text) :]
        os.fsync(self._journal_fd)

    def record(self, name: str, size: int, sha256: str) -> None:
        """Record in the journal that a file is complete and on disk.

        Raises:
            ResourceError: the journal cannot be written.
        """
        try:
            self._append({"file": name, "size": size, "sha256": sha256})
        except OSError as err:
            raise write_error(err, str(self.out)) from None
        self.files[name] = (size, sha256)

    # ---- the end

    def publish(self, overwrite: bool) -> None:
        """Make the staging folder OUT: drop the private part, sync, rename, sync.

        Raises:
            UsageError: OUT has been created since this run began.
            ResourceError: a rename failed; OUT is unchanged.
        """
        output_expected(self.out)
        try:
            # The journal goes first: from here on the complete manifest lists the files (see _read_manifest).
            (self.private / _JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.private)
            sync_dir(self.path)
            if os.path.lexists(self.out):
                if not overwrite:
                    raise UsageError(f"{self.out}: was created during this run; move it away or give --overwrite")
                self._replace()
            else:
                os.rename(self.path, self.out)
            for folder in (self.out, *self._made):
                sync_dir(folder.parent)
        except OSError as err:
            raise write_error(err, str(self.out)) from None
        self._unlock()
        if os.path.lexists(self.retired):
            with contextlib.suppress(OSError):
                remove(self.retired)

    def _replace(self) -> None:
        """Rename the staging folder to OUT and the old OUT to ``retired``, atomically where the system can."""
        if exchange(self.path, self.out):
            os.rename(self.path, self.retired)
            return
        os.rename(self.out, self.retired)
        try:
            os.rename(self.path, self.out)
        except OSError:
            os.rename(self.retired, self.out)
            raise

    def discard(self) -> None:
        """Remove the staging folder, and the parents of OUT that this run created."""
        with contextlib.suppress(OSError, UnsupportedError):
            remove(self.path)
        self._unlock()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def keep(self) -> None:
        """Keep the staging folder, so that a later run can resume."""
        self._unlock()
