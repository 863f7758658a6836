"""Plan which tensor goes into which output file: as in the source, split only where a file grows too large."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rehead.checkpoints.contents import INDEX_FILE, SINGLE_FILE
from rehead.checkpoints.safetensors_io import DTYPE_BITS, TensorInfo, header_bytes, nbytes_of
from rehead.errors import UsageError

__all__ = ["INDEX_FILE", "SINGLE_FILE", "OutputTensor", "Shard", "index_bytes", "parse_size", "plan_shards"]

DEFAULT_MAX_SHARD_SIZE = 5_000_000_000
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name: the tensor's name in the output.
        dtype: safetensors dtype code.
        shape: number of elements in each dimension.
        origin: the source tensor that it is a copy of; None if it is computed.
        after: the source tensor that it is stored next to, if the source has neither ``origin`` nor ``name`` (the
            parts of a fused tensor, say).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: str | None = None
    after: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file to be written: its name, tensors in order of their bytes, and encoded header."""

    file: str
    tensors: tuple[OutputTensor, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def parse_size(text: str | int, what: str = "max shard size") -> int:
    """Number of bytes of ``"5GB"``, ``"500 MB"``, ``"2GiB"`` or a plain number (KB is 1000 bytes, KiB 1024).

    Raises:
        UsageError: not a size, or not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
        if match is None or match.group(2).upper() not in _UNITS or len(match.group(1)) > 30:
            raise UsageError(f"{what} {str(text)[:40]!r} is not a size; write it like 5GB or 500MB")
        size = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if size <= 0:
        raise UsageError(f"{what} {str(text)[:40]!r} must be positive; write it like 5GB or 500MB")
    return size


def plan_shards(
    entries: Sequence[OutputTensor],
    source: Mapping[str, TensorInfo],
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> list[Shard]:
    """Assign the output's tensors to files.

    Tensors keep the file and the order of the source tensors they come from; a file larger than ``max_shard_size`` is
    split between tensors (a single larger tensor gets a file of its own).

    Args:
        entries: every tensor of the output.
        source: the source's tensors.
        max_shard_size: bytes of tensor data in one file.
        metadata: safetensors metadata of each file; ``{"format": "pt"}`` is always added, as transformers wants it.

    Raises:
        UsageError: two entries have one name, or there are none.
    """
    if not entries:
        raise UsageError("there are no tensors to write; the plan is empty")
    if len({e.name for e in entries}) != len(entries):
        seen: set[str] = set()
        twice = next(e.name for e in entries if e.name in seen or seen.add(e.name))  # type: ignore[func-returns-value]
        raise UsageError(f"tensor {twice!r} is planned twice; please report this plan")
    files = {info.file: i for i, info in enumerate({t.file: t for t in source.values()}.values())}
    keyed: list[tuple[int, int, int, OutputTensor]] = []
    place = (0, 0)
    for i, entry in enumerate(entries):
        beside = next(
            (source[n] for n in (entry.origin, entry.name, entry.after) if n is not None and n in source), None
        )
        if beside is not None:
            place = (files[beside.file], beside.start)
        keyed.append((*place, i, entry))
    keyed.sort(key=lambda k: k[:3])

    groups: list[list[OutputTensor]] = []
    held, last_file = 0, -1
    for file, _, _, entry in keyed:
        size = entry.nbytes
        if file != last_file or (held and held + size > max_shard_size):
            groups.append([])
            held, last_file = 0, file
        groups[-1].append(entry)
        held += size
    meta = {**(metadata or {}), "format": "pt"}
    out = []
    for i, group in enumerate(groups):
        file_name = SINGLE_FILE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        ordered = tuple(_aligned(group))
        out.append(Shard(file_name, ordered, header_bytes(((t.name, t.dtype, t.shape) for t in ordered), meta)))
    return out


def _aligned(group: list[OutputTensor]) -> list[OutputTensor]:
    """The tensors in an order that aligns each to its element size: unchanged if it does, else widest dtype first."""
    at = 0
    for t in group:
        if at % max(1, DTYPE_BITS[t.dtype] // 8):
            return sorted(group, key=lambda t: -DTYPE_BITS[t.dtype])
        at += t.nbytes
    return group


def index_bytes(shards: Sequence[Shard]) -> bytes:
    """``model.safetensors.index.json`` for these shards, as transformers writes it."""
    table = {
        "metadata": {"total_size": sum(t.nbytes for s in shards for t in s.tensors)},
        "weight_map": dict(sorted((t.name, s.file) for s in shards for t in s.tensors)),
    }
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
