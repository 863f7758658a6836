"""From the source's bytes and a step's tensors to the bytes of an output file."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rehead.convert.safetensors_io import DTYPE_BITS, TensorInfo
from rehead.convert.shards import OutputTensor
from rehead.convert.source import Source, drop_cache, torch_dtype
from rehead.convert.stream import HashingWriter
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
        space = writer.space()
        stop = min(start + len(space), end)
        source.read_range(file, start, space[: stop - start])
        while check:
            _check_piece(run[at], space, start, stop, source)
            if run[at].end >= stop:
                break
            at += 1
        writer.advance(stop - start)
        drop_cache(fd, start, stop - start)
        tick(stop - start)
        start = stop


def _check_piece(info: TensorInfo, space: memoryview, start: int, stop: int, source: Source) -> None:
    """Check the part of one tensor that lies in a buffer which holds the file's bytes [start, stop).

    A number that the end of the piece cuts in two is read by itself.
    """
    low, high = max(info.start, start), min(info.end, stop)
    if info.dtype not in _CHECKED or low >= high:
        return
    size = DTYPE_BITS[info.dtype] // 8
    low += -(low - info.start) % size
    cut = (high - info.start) % size
    if low < high - cut:
        _refuse_nonfinite(info, space[low - start : high - cut - start], (low - info.start) // size)
    if cut:
        number = bytearray(size)
        source.read_range(info.file, high - cut, memoryview(number))
        _refuse_nonfinite(info, memoryview(number), (high - cut - info.start) // size)


def _refuse_nonfinite(info: TensorInfo, data: memoryview, first: int) -> None:
    """Raise if ``data``, the tensor's numbers from the ``first`` on, hold a NaN or an infinity."""
    import torch

    from rehead.convert.finite import first_nonfinite

    at = first_nonfinite(torch.frombuffer(data, dtype=torch_dtype(info.dtype)))
    if at is None:
        return
    index, flat = [], first + at[0]
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
