"""Safetensors headers and indexes, read strictly and written deterministically, with the standard library alone.

A header is untrusted input: every offset is checked against the file's size before it is used, and any mistake raises
an :class:`~rehead.errors.UnsupportedError` that names the file. Nothing here imports torch, so inspecting a checkpoint
costs no more than reading its headers.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rehead.errors import UnsupportedError, first_line

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_INDEX_BYTES = 500_000_000
_MAX_COUNT = 2**63 - 1
_LENGTH = struct.Struct("<Q")

#: Bits of one element, by the format's dtype code.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_REFETCH = "fetch the file again or save the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: its dtype and shape, and where its bytes are.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the format's code, e.g. ``"BF16"``.
        shape: number of elements in each dimension.
        file: the weight file that holds it, relative to the checkpoint.
        start: absolute offset in ``file`` of its first byte.
        end: absolute offset in ``file`` one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """One safetensors header: ``tensors`` in the order of their bytes, ``metadata``, and the data's offset."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int


def shown(name: str, limit: int = 120) -> str:
    """A name read from a file, quoted, escaped and shortened for an error message of one line."""
    text = ascii(name) if any(not c.isprintable() for c in name[:limit]) else repr(name)
    return text if len(text) <= limit else text[: limit - 4] + "...'"


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of this dtype code and shape.

    Raises:
        UnsupportedError: unknown dtype, or a sub-byte dtype whose elements do not fill whole bytes.
    """
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedError(f"unknown dtype {shown(str(dtype))}; convert the checkpoint to BF16, F16 or F32 first")
    total = bits
    for n in shape:
        total *= n
    if total % 8:
        raise UnsupportedError(f"dtype {dtype} with shape {list(shape)} does not fill whole bytes; {_REFETCH}")
    return total // 8


def loads_strict(raw: bytes, file: str) -> Any:
    """The value of a JSON text.

    Raises:
        UnsupportedError: it is not UTF-8 or not JSON, has a key twice, or is nested too deep.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise UnsupportedError(f"{file}: {shown(twice)} is named twice; {_REFETCH}")
        return out

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnsupportedError:
        raise
    except UnicodeDecodeError as err:
        raise UnsupportedError(f"{file}: not valid UTF-8 at byte {err.start}; {_REFETCH}") from None
    except RecursionError:
        raise UnsupportedError(f"{file}: JSON nested too deep; {_REFETCH}") from None
    except ValueError as err:
        raise UnsupportedError(f"{file}: not valid JSON ({first_line(err, 120)}); {_REFETCH}") from None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def header_length(first8: bytes, file_size: int, file: str) -> int:
    """The header's length in bytes from the first eight bytes of a file of ``file_size`` bytes.

    Raises:
        UnsupportedError: the file is too short, or the length passes the file's end or the format's limit.
    """
    if file_size < 8 or len(first8) < 8:
        raise UnsupportedError(f"{file}: truncated, {file_size} bytes are too few for a safetensors file; {_REFETCH}")
    (length,) = _LENGTH.unpack(first8[:8])
    if length > MAX_HEADER_BYTES:
        raise UnsupportedError(f"{file}: header of {length} bytes is over the format's 100 MB; {_REFETCH}")
    if 8 + length > file_size:
        raise UnsupportedError(
            f"{file}: header of {length} bytes runs past the file's end ({file_size} bytes); {_REFETCH}"
        )
    return length


def parse_header(raw: bytes, file_size: int, file: str) -> Header:
    """Parse and check one header.

    Args:
        raw: the header's JSON, without the eight length bytes.
        file_size: size in bytes of the whole file, which every offset is checked against.
        file: the file's name, for messages and :attr:`TensorInfo.file`.

    Raises:
        UnsupportedError: the header is not a JSON object, a tensor's dtype, shape and offsets disagree, or the tensors
            overlap, leave holes, or do not end where the file does.
    """
    table = loads_strict(raw, file)
    if not isinstance(table, dict):
        raise UnsupportedError(f"{file}: the header is no JSON object; {_REFETCH}")
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(
        isinstance(v, str) and _encodable(v) and _encodable(k) for k, v in metadata.items()
    ):
        raise UnsupportedError(f"{file}: __metadata__ must map text to text; {_REFETCH}")
    data_start = 8 + len(raw)
    tensors = [_tensor(name, entry, data_start, file) for name, entry in table.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    at = data_start
    for t in tensors:
        if t.start != at:
            what = "overlaps the tensor before it" if t.start < at else "leaves a hole before it"
            raise UnsupportedError(f"{file}: tensor {shown(t.name)} {what}; {_REFETCH}")
        at = t.end
    if at != file_size:
        what = f"truncated: tensors need {at} bytes" if at > file_size else f"tensors end at byte {at}"
        raise UnsupportedError(f"{file}: {what}, the file has {file_size}; {_REFETCH}")
    return Header(tuple(tensors), metadata, data_start)


def _tensor(name: str, entry: Any, data_start: int, file: str) -> TensorInfo:
    where = f"{file}: tensor {shown(name)}"
    if not _encodable(name) or not name:
        raise UnsupportedError(f"{where} has no valid name; {_REFETCH}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnsupportedError(f"{where} must have exactly dtype, shape and data_offsets; {_REFETCH}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UnsupportedError(f"{where} has unknown dtype {shown(str(dtype))}; save it as BF16, F16 or F32")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise UnsupportedError(f"{where} has no valid shape; {_REFETCH}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise UnsupportedError(f"{where} has no valid data_offsets; {_REFETCH}")
    bits = span = DTYPE_BITS[dtype]
    for n in shape:
        span *= max(n, 1)
        if span > 8 * _MAX_COUNT:  # strides overflow even where another dimension is zero
            raise UnsupportedError(f"{where} has a shape that overflows; {_REFETCH}")
        bits *= n
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise UnsupportedError(
            f"{where} has {end - begin} bytes where {dtype} {shape if len(shape) < 9 else '...'} needs {bits / 8:g}; "
            f"{_REFETCH}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def read_header(path: Path, file: str | None = None) -> Header:
    """The checked header of a local file; no tensor is read.

    Args:
        path: the file.
        file: the name to use in messages and :attr:`TensorInfo.file`; its base name when not given.

    Raises:
        UnsupportedError: the file cannot be read, is truncated, or its header is wrong.
    """
    file = path.name if file is None else file
    try:
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            length = header_length(f.read(8), size, file)
            raw = f.read(length)
    except OSError as err:
        raise UnsupportedError(f"{file}: cannot be read ({err.strerror or err}); check the file") from None
    if len(raw) != length:
        raise UnsupportedError(f"{file}: truncated while it was being read; {_REFETCH}")
    return parse_header(raw, size, file)


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file that holds ``tensors`` one after the other.

    The header is padded with spaces so that the data begin at a multiple of eight bytes. Equal input gives equal bytes.

    Args:
        tensors: (name, dtype code, shape) in the order of their bytes.
        metadata: text to text; left out of the header when empty.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + nbytes_of(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise UnsupportedError("one shard has too many tensors for a safetensors header; lower --max-shard-size")
    return _LENGTH.pack(len(raw)) + raw


def parse_index(raw: bytes, file: str) -> dict[str, str]:
    """The tensor-to-shard map of an index file (``model.safetensors.index.json``), in the index's order.

    Raises:
        UnsupportedError: no JSON object with a ``weight_map`` of text to text, or a shard name that is absolute, climbs
            out of the checkpoint or is no ``.safetensors`` file.
    """
    if len(raw) > MAX_INDEX_BYTES:
        raise UnsupportedError(f"{file}: an index of {len(raw)} bytes is not believable; {_REFETCH}")
    table = loads_strict(raw, file)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedError(f"{file}: no weight_map in it; {_REFETCH}")
    checked: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise UnsupportedError(f"{file}: tensor {shown(name)} is mapped to no file name; {_REFETCH}")
        if shard not in checked:
            check_shard_name(shard, file)
            checked.add(shard)
    return weight_map


def check_shard_name(shard: str, file: str) -> None:
    """Refuse the name of a shard that could be outside the checkpoint's folder.

    Raises:
        UnsupportedError: it is absolute, has ``..``, a backslash, a colon or a control character, or another ending.
    """
    pure = PurePosixPath(shard)
    bad = (
        not shard.isprintable()
        or pure.is_absolute()
        or any(part in ("..", ".") for part in shard.split("/"))
        or "\\" in shard
        or ":" in shard
        or "//" in shard
    )
    if bad:
        raise UnsupportedError(
            f"{file}: shard {shown(shard)} would be read outside the checkpoint; put it beside the index and rename it"
        )
    if pure.suffix != ".safetensors" or len(shard) > 255:
        raise UnsupportedError(
            f"{file}: shard {shown(shard)} is not a .safetensors file; save the checkpoint as safetensors"
        )
