"""Write a file while its SHA-256 is computed: reading, hashing and writing overlap in three threads.

Python's file and hash calls release the interpreter lock on large buffers, so the slowest of the three sets the pace.
The buffers come from a small fixed pool, which bounds the memory whatever the size of the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from rehead.convert.source import drop_cache
from rehead.errors import UnsupportedError

CHUNK = 4 << 20  # large enough that Python's share is nothing, small enough to stay near the cache
POOL = 6
_WRITEBACK = 64 << 20

#: Errors of a disk that cannot take more, and what to say about them.
_FULL = {
    errno.ENOSPC: "the disk is full; free some space or choose another OUT",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another OUT",
    errno.EFBIG: "the file would pass the size limit here; lower --max-shard-size or raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another OUT",
    errno.EACCES: "permission denied; choose another OUT",
    errno.EPERM: "not permitted; choose another OUT",
    errno.EIO: "the disk failed (I/O error); check it or choose another OUT",
}


class ResourceError(UnsupportedError):
    """A disk or a connection gave out: what was done so far is still good, so a resumed run may go on from it."""


def is_full(err: OSError) -> bool:
    """Whether an error says that a disk, a quota or a file's size limit is used up."""
    return err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_error(err: OSError, what: str) -> ResourceError:
    """The one-line error for a failed write of ``what``."""
    mend = _FULL.get(err.errno or 0, f"{err.strerror or err}; check the disk or choose another OUT")
    return ResourceError(f"{what}: cannot be written: {mend}")


class _Chunk:
    """A filled buffer on its way through the hashing and the writing thread."""

    __slots__ = ("_left", "_lock", "_release", "view")

    def __init__(self, view: memoryview, release: Callable[[], None]) -> None:
        self.view = view
        self._release = release
        self._left = 2
        self._lock = threading.Lock()

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._release()


class HashingWriter:
    """One output file: feed it with :meth:`put` or :meth:`write`, then :meth:`finish` or :meth:`abort`.

    Args:
        path: the file, created or emptied.
        pool: free buffers of ``CHUNK`` bytes, shared between files (see :func:`new_pool`).

    Raises:
        ResourceError: from any method, when the disk does not take the data.
    """

    def __init__(self, path: Path, pool: queue.SimpleQueue[bytearray]) -> None:
        self.path = path
        self.size = 0
        self._written = 0
        self._pool = pool
        self._behind = (threading.Semaphore(0), 0)  # the latest write() and how many pieces it queued
        self._sha = hashlib.sha256()
        self._error: BaseException | None = None
        try:
            self.fd = os.open(
                path,
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0),
                0o666,
            )
        except OSError as err:
            raise write_error(err, path.name) from None
        # The writing queue is bounded by the pool; a computed tensor's memory is queued in slices of itself.
        self._to_hash: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(self._to_hash, self._hash_one), daemon=True, name="rehead-hash"),
            threading.Thread(
                target=self._run, args=(self._to_write, self._write_one), daemon=True, name="rehead-write"
            ),
        ]
        for thread in self._threads:
            thread.start()

    # ---- the two workers

    def _run(self, inbox: queue.SimpleQueue[_Chunk | None], step: Callable[[memoryview], None]) -> None:
        while (chunk := inbox.get()) is not None:
            try:
                if self._error is None:
                    step(chunk.view)
            except BaseException as err:  # handed to the caller by the next put() or finish()
                self._error = err
            finally:
                chunk.done()

    def _hash_one(self, view: memoryview) -> None:
        self._sha.update(view)

    def _write_one(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self.fd, view[done:])
        before, self._written = self._written, self._written + done
        if before // _WRITEBACK != self._written // _WRITEBACK and hasattr(os, "posix_fadvise"):
            # Starts the write-back of what is dirty, so that the final fsync has little left to wait for.
            start = max(0, self._written - 4 * _WRITEBACK)
            drop_cache(self.fd, start, self._written - start)

    # ---- the caller's side

    def buffer(self) -> bytearray:
        """A free buffer of ``CHUNK`` bytes; waits for one. Give it back with :meth:`put`."""
        return self._pool.get()

    def put(self, buffer: bytearray, length: int) -> None:
        """Append the first ``length`` bytes of a buffer got from :meth:`buffer`."""
        self._send(memoryview(buffer)[:length], lambda: self._pool.put(buffer))

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data`` of any length, which must not change before the next call of this, or of :meth:`finish`.

        It returns while ``data`` is still being written, so that the caller computes the next piece meanwhile, and
        waits for the data of the call before: two are alive at most.
        """
        view = memoryview(data)
        if view.nbytes == 0:
            return
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        gate = threading.Semaphore(0)
        pieces = 0
        for at in range(0, len(view), CHUNK):
            self._send(view[at : at + CHUNK], gate.release)
            pieces += 1
        before, self._behind = self._behind, (gate, pieces)
        for _ in range(before[1]):
            before[0].acquire()

    def _send(self, view: memoryview, release: Callable[[], None]) -> None:
        self._check()
        chunk = _Chunk(view, release)
        self.size += len(view)
        self._to_hash.put(chunk)
        self._to_write.put(chunk)

    def _check(self) -> None:
        err = self._error
        if isinstance(err, OSError):
            raise write_error(err, self.path.name) from None
        if err is not None:
            raise err

    def _stop(self) -> None:
        self._to_hash.put(None)
        self._to_write.put(None)
        for thread in self._threads:
            thread.join()

    def finish(self) -> tuple[int, str]:
        """Wait until all is written (not yet synced) and return (size in bytes, SHA-256 in hex). ``fd`` stays open."""
        self._stop()
        self._check()
        self.sha256 = self._sha.hexdigest()
        return self.size, self.sha256

    def abort(self) -> None:
        """Stop the threads and close the file, whatever state it is in."""
        self._error = self._error or RuntimeError("aborted")
        self._stop()
        os.close(self.fd)


def new_pool(buffers: int = POOL) -> queue.SimpleQueue[bytearray]:
    """The free buffers that the files written one after the other share."""
    pool: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    for _ in range(buffers):
        pool.put(bytearray(CHUNK))
    return pool


def sync_close(fd: int, what: str) -> None:
    """fsync and close.

    Raises:
        ResourceError: the disk did not take the data.
    """
    try:
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as err:
        raise write_error(err, what) from None
    finally:
        os.close(fd)


def sync_dir(path: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut; does nothing where folders cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass  # some network file systems refuse it, and there is nothing further to ask of them
    finally:
        os.close(fd)


def hash_file(path: Path, *, buffer: bytearray | None = None) -> tuple[int, str]:
    """Size in bytes and SHA-256 in hex of a file, read once in large pieces that are dropped from the page cache."""
    buffer = bytearray(CHUNK) if buffer is None else buffer
    view = memoryview(buffer)
    sha = hashlib.sha256()
    size = 0
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            sha.update(view[:n])
            drop_cache(f.fileno(), size, n)
            size += n
    return size, sha.hexdigest()
