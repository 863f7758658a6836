"""From the source's bytes and a step's tensors to the bytes of an output file."""

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

#: The bits of the exponent, by dtype, and numpy's name of an unsigned integer as wide.
_EXPONENTS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
_LOOK = 1 << 17  # numbers looked at together, so that the intermediate result stays in the cache
_AHEAD = 16 << 20
_DROP = 64 << 20


def runs(tensors: Sequence[OutputTensor], source: Source) -> Iterator[OutputTensor | list[TensorInfo]]:
    """Computed tensors, and lists of unchanged ones that follow each other in the source as they do in the output."""
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
    dropped = start
    at = 0  # index of the tensor that the piece starts in
    while start < end:
        space = writer.space()
        stop = min(start + len(space), end)
        fetch_ahead(fd, stop, min(_AHEAD, end - stop))
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
    """Raise if the part of a tensor in a buffer that holds the file's bytes [start, stop) has a NaN or an infinity.

    A number is never cut in two: the output's layout puts each at a multiple of its size, as the buffers' ends are. A
    float is infinite or NaN exactly when all bits of its exponent are set; numpy tests that in one thread, where torch
    would wake its pool for every piece, to the cost of the threads that hash and write.
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
