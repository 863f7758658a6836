"""Write a checkpoint: completely or not at all, hashed on the way, and resumable after a kill.

Everything goes into a staging folder beside OUT; when all files and the manifest with every SHA-256 are on disk, one
rename makes it OUT. Until then OUT does not exist (or, with ``overwrite``, is unchanged).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rehead.checkpoints.copying import copy_run, give_back_memory, raw_bytes, runs
from rehead.checkpoints.manifest import MANIFEST_NAME, manifest_bytes, verify_files
from rehead.checkpoints.notes import Notes
from rehead.checkpoints.outputs import check_out, out_path
from rehead.checkpoints.resume import finish_commit
from rehead.checkpoints.shards import (
    DEFAULT_MAX_SHARD_SIZE,
    INDEX_FILE,
    OutputTensor,
    Shard,
    index_bytes,
    parse_size,
    plan_shards,
)
from rehead.checkpoints.source import Source
from rehead.checkpoints.staging import Staging, fingerprint_of
from rehead.checkpoints.stream import (
    HashingWriter,
    Pool,
    ResourceError,
    hash_file,
    is_full,
    new_pool,
    sync_close,
    sync_dir,
    write_error,
)
from rehead.errors import ReheadError, UnsupportedError, VerificationError

if TYPE_CHECKING:
    import torch

__all__ = ["OutputTensor", "ResourceError", "Target", "finish_commit", "parse_size", "plan_shards", "verify_files"]

_LARGE = 1 << 20
_SPARE = 16 << 20  # room for the small files, the index and the manifest


class Target:
    """One output folder being written. Use as a context manager and call :meth:`commit` last::

        with Target(out, source=source, fingerprint=hash) as target:
            target.write_weights(entries, fetch)
            target.copy_small_files()
            target.write_text("config.json", text)
            target.commit({"method": "mean"})

    Leaving the block without :meth:`commit` (an exception, Ctrl-C, SIGTERM) leaves OUT unchanged and removes the
    staging folder; with ``resume`` the folder stays after an interruption, a full disk or a lost connection. A killed
    run always leaves it.

    Attributes:
        remembered: facts by key from :meth:`remember`, of this run and the runs that it resumes.

    Args:
        out: the folder to write.
        source: the checkpoint that unchanged tensors and small files come from.
        overwrite: replace an existing checkpoint at ``out``, at the very end.
        resume: keep the finished files of an interrupted run with the same fingerprint.
        fingerprint: hash of everything that determines the output, or a mapping of named parts (source, plan, options),
            which lets an error name the part that changed.

    Raises:
        UsageError: OUT exists, is the source or nested with it, is being written by another run, or the run to resume
            belongs to another conversion.
        ResourceError: the staging folder cannot be created.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        source: Source,
        overwrite: bool = False,
        resume: bool = False,
        fingerprint: str | Mapping[str, Any],
    ) -> None:
        self.out = out_path(out)
        self.source = source
        self.overwrite = overwrite
        self.resume = resume
        folder = getattr(source, "folder", None)
        check_out(self.out, folder, overwrite)
        whole, parts = fingerprint_of(fingerprint)
        self._staging = Staging(self.out, whole, parts, resume=resume)
        self._written: set[str] = set()
        self._committed = False
        self._pool: Pool | None = None
        self._signals: dict[int, Any] = {}
        self._notes = Notes(self._staging.private / "notes.jsonl", str(self.out))
        self.remembered = self._notes.facts
        try:
            check_out(self.out, folder, overwrite)  # again, now that no other run can be writing it
        except ReheadError:
            self._staging.discard()
            raise

    # ---- life

    @property
    def resumed(self) -> bool:
        """Whether this run resumes an interrupted one."""
        return self._staging.resumed

    @property
    def fingerprint(self) -> str:
        """The hash that the manifest records; :func:`~rehead.checkpoints.manifest.completed` compares it."""
        return self._staging.fingerprint

    @property
    def path(self) -> Path:
        """The staging folder."""
        return self._staging.path

    @property
    def work_dir(self) -> Path:
        """A folder for intermediate results; it survives a kill for the resumed run, and is removed at commit."""
        path = self._staging.private / "work"
        path.mkdir(exist_ok=True)
        return path

    def remember(self, key: str, value: Any) -> None:
        """Save a fact (JSON types) for the manifest, for a resumed run too.

        A resumed run does not recompute the layers of finished files, so it needs their facts from here.
        """
        self._notes.note(key, value)

    def __enter__(self) -> Target:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
                if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                    self._signals[number] = signal.signal(number, _terminate)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: object) -> None:
        try:
            if not self._committed:
                self._abandon(err)
                if isinstance(err, OSError) and is_full(err):  # a full disk, met by the caller's own writing
                    raise write_error(err, str(self.out)) from None
        finally:
            for number, handler in self._signals.items():
                signal.signal(number, handler)
            self._signals.clear()
            self.source.close()

    def _abandon(self, err: BaseException | None) -> None:
        final = isinstance(err, ReheadError) and not isinstance(err, ResourceError)  # it would fail again
        if self.resume and err is not None and not final:
            self._staging.keep()
        else:
            self._staging.discard()

    # ---- weights

    def write_weights(
        self,
        entries: Sequence[OutputTensor],
        fetch: Callable[[str], torch.Tensor],
        max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
        progress: Callable[[int, int], None] | None = None,
        check_finite: bool = True,
    ) -> list[str]:
        """Write every weight file, and the index when there is more than one.

        Tensors with an ``origin`` are copied as bytes. ``fetch`` is called once for each of the others, in the order
        in which they are stored (the source's), and not for files that an earlier run finished.

        Args:
            entries: every tensor of the output.
            fetch: returns a computed tensor by name, of the planned dtype and shape, on any device.
            max_shard_size: bytes of tensor data in one file, or text such as ``"5GB"``.
            progress: called with (bytes of weights done, bytes in all).
            check_finite: refuse a NaN or an infinity among the copied weights as well; costs a tenth of the hashing.

        Returns:
            The weight files' names in order.

        Raises:
            UsageError: the plan names a tensor twice, or the size is invalid.
            UnsupportedError: a copied weight is not finite, or the source ends early.
            VerificationError: ``fetch`` returned another dtype or shape than planned.
            ResourceError: the disk is full or fails.
        """
        shards = plan_shards(entries, self.source.stored, parse_size(max_shard_size), self.source.metadata)
        for entry in entries:
            self._check_origin(entry)
        total = sum(s.nbytes for s in shards)
        finished = {s.file for s in shards if self._still_good(s)}
        self._check_room([s.nbytes for s in shards if s.file not in finished])
        tick = _Ticker(progress, total)
        self._pool = new_pool()
        with ThreadPoolExecutor(1, thread_name_prefix="rehead-sync") as syncer:
            pending: Future[None] | None = None
            for shard in shards:
                if shard.file in finished:
                    tick(shard.nbytes)
                    continue
                writer = self._write_shard(shard, fetch, tick, check_finite)
                # The sync of one file overlaps the writing of the next; a file is journalled only once it is on disk.
                before = pending
                pending = syncer.submit(self._sync_shard, writer.fd, shard.file, writer.size, writer.sha256)
                if before is not None:
                    before.result()
            if pending is not None:
                pending.result()
        self._pool = None
        if len(shards) > 1:
            self.write_bytes(INDEX_FILE, index_bytes(shards))
        self._written.update(s.file for s in shards)
        return [s.file for s in shards]

    def _check_origin(self, entry: OutputTensor) -> None:
        if entry.origin is None:
            return
        info = self.source.info(entry.origin)
        if (info.dtype, info.shape) != (entry.dtype, entry.shape):
            raise VerificationError(
                f"{entry.name}: planned as {entry.dtype} {list(entry.shape)} but its source {entry.origin} is "
                f"{info.dtype} {list(info.shape)}; please report this plan"
            )

    def _still_good(self, shard: Shard) -> bool:
        """Whether an earlier run's file exists with the planned size and the hash in the journal."""
        noted = self._staging.files.get(shard.file)
        if noted is None or noted[0] != shard.nbytes:
            return False
        try:
            return hash_file(self.path / shard.file) == noted
        except OSError:
            return False

    def _check_room(self, sizes: Sequence[int]) -> None:
        need = sum(sizes)
        free = shutil.disk_usage(self.path).free
        if need + _SPARE > free:
            raise ResourceError(
                f"{self.out}: needs {(need + _SPARE) / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
                "free some space or choose another OUT"
            )

    def _write_shard(
        self, shard: Shard, fetch: Callable[[str], torch.Tensor], tick: _Ticker, check: bool
    ) -> HashingWriter:
        assert self._pool is not None
        writer = HashingWriter(self.path / shard.file, self._pool)
        try:
            writer.write(shard.header)
            tick(len(shard.header))
            for item in runs(shard.tensors, self.source):
                if isinstance(item, OutputTensor):
                    writer.write(raw_bytes(fetch(item.name), item))
                    tick(item.nbytes)
                    if item.nbytes > _LARGE:
                        give_back_memory()
                else:
                    copy_run(item, self.source, writer, tick, check)
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        if writer.size != shard.nbytes:
            os.close(writer.fd)
            raise VerificationError(
                f"{shard.file}: {writer.size} bytes written, {shard.nbytes} planned; please report this"
            )
        return writer

    def _sync_shard(self, fd: int, name: str, size: int, sha: str) -> None:
        sync_close(fd, name)
        self._staging.record(name, size, sha)

    # ---- other files

    def copy_small_files(self, skip: Sequence[str] = ()) -> list[str]:
        """Copy the tokenizer, chat template and other small files byte for byte; returns their names.

        Files in ``skip`` and files already written are left out.
        """
        copied = []
        for name in self.source.small_files():
            if name in skip or name in self._written:
                continue
            with self.source.open_small(name) as src:
                self._write_stream(name, iter(lambda src=src: src.read(1 << 20), b""))  # type: ignore[misc]
            copied.append(name)
        return copied

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file into the output.

        Raises:
            ResourceError: the disk is full or fails.
        """
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file into the output; raises as :meth:`write_text`."""
        self._write_stream(name, iter((data,)))

    def _write_stream(self, name: str, pieces: Iterator[bytes]) -> None:
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise UnsupportedError(f"{name}: would be written outside OUT; fix the name")
        sha, size = hashlib.sha256(), 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as f:
                for piece in pieces:
                    f.write(piece)
                    sha.update(piece)
                    size += len(piece)
                f.flush()
                os.fsync(f.fileno())
        except OSError as err:
            raise write_error(err, name) from None
        self._staging.files[name] = (size, sha.hexdigest())  # not journalled: a resumed run writes it again
        self._written.add(name)

    # ---- the end

    def commit(self, manifest: Mapping[str, Any] | None = None) -> None:
        """Write the manifest with the SHA-256 of every file, sync, and rename the staging folder to OUT.

        Args:
            manifest: the conversion's own entries (JSON types); files, fingerprint and format are added.

        Raises:
            UsageError: OUT has been created since this run began.
            ResourceError: the disk is full or fails; OUT is unchanged.
        """
        self._drop_strays()
        files = {name: self._staging.files[name] for name in self._written}
        data = manifest_bytes(manifest or {}, files, self._staging.fingerprint, self._staging.parts)
        self.write_bytes(MANIFEST_NAME, data)
        for folder in {(self.path / name).parent for name in files}:
            _sync_up(folder, self.path)
        self._staging.publish(self.overwrite)
        self._committed = True

    def _drop_strays(self) -> None:
        """Remove an interrupted run's files that this run did not write, such as shards of another split."""
        for path in [p for p in self.path.rglob("*") if p.is_file() or p.is_symlink()]:
            name = path.relative_to(self.path).as_posix()
            if name not in self._written and not path.is_relative_to(self._staging.private):
                with contextlib.suppress(OSError):
                    path.unlink()


class _Ticker:
    """Adds up progress."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _sync_up(folder: Path, root: Path) -> None:
    while folder != root:
        sync_dir(folder)
        folder = folder.parent
    sync_dir(root)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
