"""Write a file and compute its SHA-256 on the way: reading, hashing and writing overlap in three threads.

Python's file and hash calls release the interpreter lock on large buffers, so the slowest of the three sets the speed.
The buffers come from a small fixed pool, so memory does not grow with the file.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from rehead.checkpoints.source import drop_cache
from rehead.errors import UnsupportedError

CHUNK = 4 << 20  # bytes; large enough that Python's overhead is negligible, small enough for the processor's cache
POOL = 6
_WRITEBACK = 64 << 20

Pool = queue.SimpleQueue[mmap.mmap]

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
    """A disk or a connection failed; finished files are still good, so the run can be resumed."""


def is_full(err: OSError) -> bool:
    """Whether an error means that a disk, a quota or a file's size limit is used up."""
    return err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_error(err: OSError, what: str) -> ResourceError:
    """The one-line error for a failed write of ``what``."""
    reason = _FULL.get(err.errno or 0, f"{err.strerror or err}; check the disk or choose another OUT")
    return ResourceError(f"{what}: cannot be written: {reason}")


class _Chunk:
    """A filled buffer for the hashing and the writing thread; it returns to the pool after both."""

    __slots__ = ("_left", "_lock", "buffer", "offset", "view")

    def __init__(self, buffer: mmap.mmap, length: int, offset: int) -> None:
        self.buffer, self.offset = buffer, offset
        self.view = memoryview(buffer)[:length]
        self._left = 2
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Mark one thread as done; True when both are."""
        with self._lock:
            self._left -= 1
            return self._left == 0


class HashingWriter:
    """One output file, hashed as it is written: :meth:`write` to it, then :meth:`finish` or :meth:`abort`.

    To avoid a copy, fill what :meth:`space` gives and call :meth:`advance` instead of :meth:`write`.

    Full buffers bypass the page cache where the file system allows it (``O_DIRECT``): a copy into the cache costs more
    processor time than the hash does, and evicts other files from it. The rest goes through the cache.

    Args:
        path: the file, created or emptied.
        pool: free buffers of ``CHUNK`` bytes, shared between files (see :func:`new_pool`).

    Raises:
        ResourceError: from any method, when the disk is full or fails.
    """

    def __init__(self, path: Path, pool: Pool) -> None:
        self.path = path
        self.size = 0
        self.sha256 = ""
        self._pool = pool
        self._buffer: mmap.mmap | None = None
        self._filled = 0
        self._sha = hashlib.sha256()
        self._error: BaseException | None = None
        flags = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
        try:
            self.fd = os.open(path, flags | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as err:
            raise write_error(err, path.name) from None
        try:
            self._direct = os.open(path, flags | os.O_DIRECT)
        except (AttributeError, OSError):  # a system or file system without it
            self._direct = -1
        self._to_hash: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(inbox, step), daemon=True, name=name)
            for inbox, step, name in (
                (self._to_hash, self._hash_one, "rehead-hash"),
                (self._to_write, self._write_one, "rehead-write"),
            )
        ]
        for thread in self._threads:
            thread.start()

    # ---- the two workers

    def _run(self, inbox: queue.SimpleQueue[_Chunk | None], step: Callable[[_Chunk], None]) -> None:
        while (chunk := inbox.get()) is not None:
            try:
                if self._error is None:
                    step(chunk)
            except BaseException as err:  # handed to the caller by the next call
                self._error = err
            finally:
                if chunk.done():
                    self._pool.put(chunk.buffer)

    def _hash_one(self, chunk: _Chunk) -> None:
        self._sha.update(chunk.view)

    def _write_one(self, chunk: _Chunk) -> None:
        done = 0
        if self._direct >= 0 and len(chunk.view) == CHUNK:
            try:
                done = os.pwrite(self._direct, chunk.view, chunk.offset)
            except OSError as err:
                if err.errno != errno.EINVAL:  # the file system allows opening with O_DIRECT but not writing
                    raise
            if done < CHUNK:
                os.close(self._direct)
                self._direct = -1
        while done < len(chunk.view):
            done += os.pwrite(self.fd, chunk.view[done:], chunk.offset + done)
        end = chunk.offset + done
        if self._direct < 0 and end % _WRITEBACK < CHUNK:
            # Makes the system write dirty pages to the disk now, so that the final fsync has little left to do.
            start = max(0, end - 4 * _WRITEBACK)
            drop_cache(self.fd, start, end - start)

    # ---- the caller's side

    def space(self) -> memoryview:
        """A buffer to fill with the next bytes, at least one; then call :meth:`advance`. Waits for a free one."""
        self._check()
        if self._buffer is None:
            self._buffer = self._pool.get()
        return memoryview(self._buffer)[self._filled :]

    def advance(self, length: int) -> None:
        """Append the first ``length`` bytes of the buffer from :meth:`space`."""
        self._filled += length
        if self._filled == CHUNK:
            self._flush()

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data`` of any length; it is copied, so it may change afterwards."""
        view = memoryview(data)
        if view.nbytes == 0:
            return
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        at = 0
        while at < len(view):
            space = self.space()
            length = min(len(space), len(view) - at)
            space[:length] = view[at : at + length]
            self.advance(length)
            at += length

    def _flush(self) -> None:
        if self._buffer is None:
            return
        chunk = _Chunk(self._buffer, self._filled, self.size)
        self.size += self._filled
        self._buffer, self._filled = None, 0
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
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def finish(self) -> tuple[int, str]:
        """Wait until all is written (not yet synced) and return (size in bytes, SHA-256 in hex). ``fd`` stays open."""
        self._flush()
        self._stop()
        self._check()
        self.sha256 = self._sha.hexdigest()
        return self.size, self.sha256

    def abort(self) -> None:
        """Stop the threads and close the unfinished file."""
        self._error = self._error or RuntimeError("aborted")
        self._stop()
        os.close(self.fd)


def new_pool(buffers: int = POOL) -> Pool:
    """Free buffers, shared by the files of one run; page-aligned, as direct writes require."""
    pool: Pool = queue.SimpleQueue()
    for _ in range(buffers):
        pool.put(mmap.mmap(-1, CHUNK))
    return pool


def sync_close(fd: int, what: str) -> None:
    """fsync and close.

    Raises:
        ResourceError: the disk is full or fails.
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
        pass  # some network file systems refuse it; nothing more can be done there
    finally:
        os.close(fd)


def hash_file(path: Path, *, buffer: bytearray | None = None) -> tuple[int, str]:
    """(size in bytes, SHA-256 in hex) of a file, read once and not kept in the page cache."""
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
