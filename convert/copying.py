"""From the source's bytes and a step's tensors to the bytes of an output file."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rehead.convert.safetensors_io import DTYPE_BITS, TensorInfo
from rehead.convert.shards import OutputTensor
from rehead.convert.source import Source, drop_cache, torch_dtype
from rehead.convert.stream import CHUNK, HashingWriter
from rehead.errors import UnsupportedError, VerificationError

if TYPE_CHECKING:
    import torch

_CHECKED = ("BF16", "F16", "F32", "F64")


def runs(tensors: Sequence[OutputTensor], source: Source) -> Iterator[OutputTensor | list[TensorInfo]]:
    """Computed tensors, and lists of unchanged ones that follow each other in the source as they do in the output."""
    run: list[TensorInfo] = []
    for t in tensors:
        info = source.tensors[t.origin] if t.origin is not None else None
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
    """Stream neighbouring tensors from the source to a file.

    Args:
        run: tensors that follow each other in one file.
        check: look at every number on the way.

    Raises:
        UnsupportedError: a tensor holds a NaN or an infinity, or the source ends early.
        ResourceError: the disk does not take the data.
    """
    file, start, end = run[0].file, run[0].start, run[-1].end
    fd = source.weight_fd(file)
    at = 0  # index of the tensor that the piece starts in
    while start < end:
        stop = min(start + CHUNK, end)
        last = at
        while run[last].end < stop:
            last += 1
        if stop < run[last].end:  # no number is cut in two
            stop -= (stop - run[last].start) % max(1, DTYPE_BITS[run[last].dtype] // 8)
        buffer = writer.buffer()
        source.read_range(file, start, memoryview(buffer)[: stop - start])
        if check:
            for info in run[at : last + 1]:
                _check_piece(info, buffer, start, stop)
        writer.put(buffer, stop - start)
        drop_cache(fd, start, stop - start)
        tick(stop - start)
        start, at = stop, last


def _check_piece(info: TensorInfo, buffer: bytearray, start: int, stop: int) -> None:
    """Check the part of one tensor that lies in a buffer which holds the file's bytes [start, stop)."""
    low, high = max(info.start, start), min(info.end, stop)
    if info.dtype not in _CHECKED or low >= high:
        return
    import torch

    from rehead.convert.finite import first_nonfinite

    size = DTYPE_BITS[info.dtype] // 8
    part = torch.frombuffer(buffer, dtype=torch_dtype(info.dtype), count=(high - low) // size, offset=low - start)
    at = first_nonfinite(part)
    if at is not None:
        index, flat = [], (low - info.start) // size + at[0]
        for n in reversed(info.shape):
            index.append(flat % n)
            flat //= n
        layer = re.search(r"\.(\d+)\.", info.name)
        where = f" (layer {layer[1]})" if layer else ""
        raise UnsupportedError(
            f"{info.name}{where}: element {index[::-1]} is not finite; fetch the checkpoint again or mend the weight"
        )


def raw_bytes(tensor: torch.Tensor, planned: OutputTensor) -> memoryview:
    """A computed tensor's bytes.

    Raises:
        VerificationError: it is not of the planned dtype and shape.
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
