"""Fill an output file: copy unchanged tensors from the source, and add the bytes of computed ones."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rehead.checkpoints.safetensors_io import TensorInfo
from rehead.checkpoints.shards import OutputTensor
from rehead.checkpoints.source import Source, drop_cache, fetch_ahead, torch_dtype
from rehead.checkpoints.stream import HashingWriter
from rehead.errors import UnsupportedError, VerificationError

if TYPE_CHECKING:
    import torch

#: By dtype: numpy's unsigned integer of the same width, and the mask of the exponent's bits.
_EXPONENTS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
_LOOK = 1 << 17  # numbers checked together, so that the intermediate result stays in the cache
_AHEAD = 16 << 20
_DROP = 64 << 20


def runs(tensors: Sequence[OutputTensor], source: Source) -> Iterator[OutputTensor | list[TensorInfo]]:
    """Group the output: each computed tensor alone, and lists of copied tensors that are adjacent in the source."""
    run: list[TensorInfo] = []
    for t in tensors:
        info = source.info(t.origin) if t.origin is not None else None
        if run and (info is None or (info.file, info.start) != (run[-1].file, run[-1].end)):
            yield run
            run = []
        if info is None:
            yield t
        else:
            run.append(info)
    if run:
        yield run


def copy_run(
    run: Sequence[TensorInfo], source: Source, writer: HashingWriter, tick: Callable[[int], None], check: bool = True
) -> None:
    """Stream adjacent tensors from the source to a file.

    Args:
        run: tensors that are adjacent in one file.
        source: the checkpoint that holds them.
        writer: the output file.
        tick: called with the number of bytes of each piece copied.
        check: refuse NaN and infinity.

    Raises:
        UnsupportedError: a tensor holds a NaN or an infinity, or the source ends early.
        ResourceError: the disk is full or fails.
    """
    file, start, end = run[0].file, run[0].start, run[-1].end
    fd = source.weight_fd(file)
    dropped = fetched = start
    at = 0  # index of the tensor that the piece starts in
    while start < end:
        space = writer.space()
        stop = min(start + len(space), end)
        if (ahead := min(stop + _AHEAD, end)) > fetched:  # each byte once: asking again costs time even if it is there
            fetch_ahead(fd, fetched, ahead - fetched)
            fetched = ahead
        source.read_range(file, start, space[: stop - start])
        while check:
            _check_piece(run[at], space, start, stop)
            if run[at].end >= stop:
                break
            at += 1
        writer.advance(stop - start)
        if stop // _DROP != start // _DROP or stop == end:
            drop_cache(fd, dropped, stop - dropped)
            dropped = stop
        tick(stop - start)
        start = stop


def _check_piece(info: TensorInfo, space: memoryview, start: int, stop: int) -> None:
    """Raise if a tensor has a NaN or an infinity in ``space``, which holds the file's bytes [start, stop).

    No number is split between two buffers: the output's layout aligns each to its size, and so are the buffers' ends.
    A float is infinite or NaN exactly when all bits of its exponent are set. numpy tests that in one thread; torch
    would start its thread pool for every piece and slow down the threads that hash and write.
    """
    low, high = max(info.start, start), min(info.end, stop)
    if info.dtype not in _EXPONENTS or low >= high:
        return
    import numpy as np

    bits, mask = _EXPONENTS[info.dtype]
    numbers = np.frombuffer(space[low - start : high - start], dtype=bits)
    for first in range(0, len(numbers), _LOOK):
        exponents = numbers[first : first + _LOOK] & np.array(mask, dtype=bits)
        if exponents.max() == mask:
            flat = (low - info.start) // numbers.itemsize + first + int(np.argmax(exponents))
            break
    else:
        return
    index = []
    for n in reversed(info.shape):
        index.append(flat % n)
        flat //= n
    layer = re.search(r"\.(\d+)\.", info.name)
    where = f" (layer {layer[1]})" if layer else ""
    raise UnsupportedError(
        f"{info.name}{where}: element {index[::-1]} is not finite; fetch the checkpoint again or fix the weight"
    )


def raw_bytes(tensor: torch.Tensor, planned: OutputTensor) -> memoryview:
    """A computed tensor's bytes.

    Raises:
        VerificationError: its dtype or shape is not the planned one.
    """
    import torch

    if tensor.dtype != torch_dtype(planned.dtype) or tuple(tensor.shape) != planned.shape:
        raise VerificationError(
            f"{planned.name}: computed as {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} but "
            f"planned as {planned.dtype} {list(planned.shape)}; please report this"
        )
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def _find_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


_TRIM = _find_trim()


def give_back_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed blocks of up to 32 MB for itself, and a layer's tensors are of that size: without this the process
    grows by some tens of megabytes over a long conversion. Does nothing where there is no glibc.
    """
    if _TRIM is not None:
        _TRIM(0)
