"""Read a checkpoint from a local folder or a Hub repository, one tensor at a time.

A source knows names, shapes and dtypes from the safetensors headers alone. A weight is read only on request, into
memory of its own, so no more than one tensor is ever held.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rehead.checkpoints.contents import INDEX_FILE, MAX_CONFIG_BYTES, gather, parse_config, pick_layout
from rehead.checkpoints.safetensors_io import TensorInfo, read_header, shown
from rehead.checkpoints.smallfiles import CARD_NAME, CONFIG_NAME, travels
from rehead.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

#: Bytes of a model card that are read; longer ones are cut.
MAX_CARD_BYTES = 1_000_000

__all__ = ["DTYPE_NAMES", "LocalSource", "Source", "TensorInfo", "torch_dtype"]

#: torch dtype names by the format's code; the sub-byte formats have none.
DTYPE_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype code.

    Raises:
        UnsupportedError: torch has no such dtype.
    """
    import torch

    name = DTYPE_NAMES.get(code)
    dtype = getattr(torch, name, None) if name else None
    if dtype is None:
        raise UnsupportedError(f"torch has no dtype for {code}; dequantise the checkpoint to BF16 first")
    return dtype


class Source:
    """A checkpoint that can be read a tensor at a time.

    Attributes:
        id: the folder or Hub id as the user wrote it.
        revision: the commit hash of a Hub source; None for a folder.
        config: the raw ``config.json``.
        tensors: every tensor by name, in the order of the shards and of the bytes in each, without ``ignored``.
        ignored: tensors that no class reads (see :meth:`ignore`): they can be copied but are not part of the model.
        metadata: the safetensors ``__metadata__`` of the first shard.
        shards: the weight files, in order.
    """

    id: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    ignored: dict[str, TensorInfo]
    metadata: dict[str, str]
    shards: list[str]

    def weight_path(self, shard: str) -> Path:
        """The local path of a shard, downloaded first if it is remote."""
        raise NotImplementedError

    def list_files(self) -> list[str]:
        """Every file of the checkpoint, POSIX paths relative to it, sorted."""
        raise NotImplementedError

    def small_path(self, name: str) -> Path:
        """The local path of a file without weights, downloaded first if it is remote."""
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """A value per file that changes with its content (size and time, or the commit); weights are not read."""
        raise NotImplementedError

    def materialise(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Download every weight file now; otherwise each is downloaded when one of its tensors is first read."""

    def close(self) -> None:
        """Release open files; the source can still be used and opens them again."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self.ignored = {}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        fds = getattr(self, "_fds", None)
        if fds:
            self.close()

    # ---- weights

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """Every tensor in the files by name, ignored ones last."""
        return self.tensors | self.ignored

    def ignore(self, names: Iterable[str]) -> None:
        """Move tensors from ``tensors`` to ``ignored``: from now on they are not part of the model."""
        for name in names:
            self.ignored[name] = self.tensors.pop(name)

    def info(self, name: str) -> TensorInfo:
        """The entry of one tensor, ignored or not.

        Raises:
            UnsupportedError: the checkpoint has no tensor of that name.
        """
        info = self.tensors.get(name) or self.ignored.get(name)
        if info is None:
            raise UnsupportedError(f"{self.id}: there is no tensor {shown(name)}; see `rehead inspect`")
        return info

    def weight_fd(self, shard: str) -> int:
        """A file descriptor of a shard, open for reading and kept until :meth:`close`."""
        fd = self._fds.get(shard)
        if fd is None:
            path = self.weight_path(shard)
            try:
                fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
            except OSError as err:
                raise UnsupportedError(f"{shard}: cannot be read ({err.strerror}); check the file") from None
            self._fds[shard] = fd
        return fd

    def read_into(self, name: str, out: memoryview) -> None:
        """Read a tensor's bytes into ``out``, which must be exactly as long.

        Raises:
            UnsupportedError: the file has become shorter than its header says, or the disk fails.
        """
        info = self.info(name)
        if out.nbytes != info.nbytes:
            raise ValueError(f"{name!r} has {info.nbytes} bytes, the buffer {out.nbytes}")
        self.read_range(info.file, info.start, out.cast("B") if out.format != "B" or out.ndim != 1 else out)
        drop_cache(self.weight_fd(info.file), info.start, info.nbytes)

    def read_range(self, shard: str, offset: int, out: memoryview) -> None:
        """Fill ``out`` from ``offset`` of a shard; raises as :meth:`read_into`."""
        fd = self.weight_fd(shard)
        done = 0
        while done < len(out):
            try:
                n = _pread_into(fd, out[done:], offset + done)
            except OSError as err:
                raise UnsupportedError(f"{shard}: reading failed ({err.strerror}); check the disk") from None
            if n == 0:
                raise UnsupportedError(f"{shard}: ended early at byte {offset + done}; fetch the file again")
            done += n

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the checkpoint's dtype and in memory of its own.

        Raises:
            UnsupportedError: no such tensor, a dtype that torch lacks, or a file that ends early.
        """
        import torch

        info = self.info(name)
        dtype = torch_dtype(info.dtype)
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
        if info.nbytes:
            self.read_into(name, memoryview(flat.numpy()))
        return flat.view(dtype).view(info.shape) if info.nbytes else torch.empty(info.shape, dtype=dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor's first dimension; as :meth:`read`, but it may be read again soon."""
        import torch

        info = self.info(name)
        size = info.nbytes // info.shape[0]
        flat = torch.empty((stop - start) * size, dtype=torch.uint8)
        self.read_range(info.file, info.start + start * size, memoryview(flat.numpy()))
        return flat.view(torch_dtype(info.dtype)).view(stop - start, *info.shape[1:])

    # ---- small files

    def small_files(self) -> list[str]:
        """The files to copy unchanged (see :func:`~rehead.checkpoints.smallfiles.travels`), sorted."""
        return [name for name in self.list_files() if travels(name)]

    def code_left_out(self) -> list[str]:
        """Python files, which are never copied: a tokenizer that needs one must get it from the source."""
        return [name for name in self.list_files() if name.endswith(".py") and not name.startswith("modeling_rehead_")]

    def open_small(self, name: str) -> BinaryIO:
        """Open one of :meth:`small_files`, or the model card, for reading."""
        try:
            return open(self.small_path(name), "rb")
        except OSError as err:
            raise UnsupportedError(f"{name}: cannot be read ({err.strerror}); check the file") from None

    def model_card(self) -> str | None:
        """The text of the source's README.md, or None. It is not copied: the output gets a card of its own."""
        if CARD_NAME not in self.list_files():
            return None
        with self.open_small(CARD_NAME) as f:
            return f.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """SHA-256 over :meth:`identity`: changes when any file of the checkpoint does."""
        digest = hashlib.sha256()
        for name, value in sorted(self.identity().items()):
            digest.update(f"{name}\0{value}\n".encode())
        return digest.hexdigest()


def _pread_into(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    data = os.pread(fd, len(out), offset)
    out[: len(data)] = data
    return len(data)


def drop_cache(fd: int, offset: int, length: int) -> None:
    """Tell the system that a range will not be read again, so that it need not evict other files from the cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def fetch_ahead(fd: int, offset: int, length: int) -> None:
    """Tell the system that a range will be read next, so that the disk works while this process does."""
    if length > 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


class LocalSource(Source):
    """A checkpoint in a local folder.

    Raises:
        UsageError: the folder is missing or holds no ``config.json``.
        UnsupportedError: it holds no safetensors weights, or its config, headers or index are broken.
    """

    def __init__(self, folder: str | os.PathLike[str], id: str | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.id = str(folder) if id is None else id
        self.revision = None
        if not self.folder.is_dir():
            raise UsageError(f"{self.id}: no such folder; give a checkpoint's folder or a Hub id")
        config = self.folder / CONFIG_NAME
        if not config.is_file():
            raise UsageError(f"{self.id}: no config.json in it; give a transformers checkpoint folder or a Hub id")
        try:
            with open(config, "rb") as f:
                raw = f.read(MAX_CONFIG_BYTES + 1)
        except OSError as err:
            raise UnsupportedError(f"{self.id}/config.json: cannot be read ({err.strerror}); check the file") from None
        self.config = parse_config(raw, f"{self.id}/config.json")
        names = {p.name for p in self.folder.iterdir()}
        index = self._index_bytes() if pick_layout(names, self.id) == INDEX_FILE else None
        self.shards, self.tensors, self.metadata = gather(
            index, self.id, lambda shard: read_header(self._shard(shard), shard)
        )

    def _index_bytes(self) -> bytes:
        try:
            return (self.folder / INDEX_FILE).read_bytes()
        except OSError as err:
            raise UnsupportedError(f"{INDEX_FILE}: cannot be read ({err.strerror}); check the file") from None

    def _shard(self, shard: str) -> Path:
        path = self.folder / shard
        if not path.is_file():
            raise UnsupportedError(f"{self.id}: shard {shown(shard)} is missing; fetch the checkpoint again")
        return path

    def weight_path(self, shard: str) -> Path:
        return self._shard(shard)

    def list_files(self) -> list[str]:
        names = []
        for base, folders, files in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
            here = Path(base).relative_to(self.folder)
            names += [(here / name).as_posix() for name in files if (Path(base) / name).is_file()]
        return sorted(names)

    def small_path(self, name: str) -> Path:
        path = self.folder / name
        real = path.resolve()
        if path.is_symlink() or not real.is_relative_to(self.folder.resolve()):
            homes = [self.folder.resolve()]
            if homes[0].parent.name == "snapshots":  # a snapshot in the Hub's cache links to its blobs
                homes.append((homes[0].parent.parent / "blobs").resolve())
            if not any(real.is_relative_to(home) for home in homes):
                raise UnsupportedError(f"{name}: is a link out of {self.id}; put the file itself in its place")
        return path

    def identity(self) -> dict[str, str]:
        out = {}
        names = {CONFIG_NAME, CARD_NAME, INDEX_FILE, *self.shards, *self.small_files()}
        for name in sorted(names & set(self.list_files())):
            stat = (self.folder / name).stat()
            out[name] = f"{stat.st_size}:{stat.st_mtime_ns}"
        return out
