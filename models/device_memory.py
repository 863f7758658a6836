"""How much of a GPU's memory may be used, and tensors that wait in the host's while others have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rehead.errors import UsageError


@contextmanager
def memory_limited(device: torch.device, size: int | None) -> Iterator[None]:
    """Let this process take no more than ``size`` bytes of a GPU's memory; None: all that is free.

    What runs inside sizes itself to :func:`free_memory`; a step that needs more fails as on a GPU of that size.

    Raises:
        UsageError: the device is no GPU, or has less.
    """
    if size is None:
        yield
        return
    if device.type != "cuda":
        raise UsageError(f"--device-memory: {device} is no GPU, and the host's memory is not limited; leave it out")
    total = torch.cuda.get_device_properties(device).total_memory
    if size > total:
        raise UsageError(f"--device-memory {size:,}: the GPU has {total:,} bytes; ask for no more")
    place = _index(device)
    before = torch.cuda.get_per_process_memory_fraction(place)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / total, place)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, place)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that new tensors may take: what is free there, within this process's limit."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    kept_for_reuse = torch.cuda.memory_reserved(device) - allocated
    limit = int(torch.cuda.get_per_process_memory_fraction(_index(device)) * total)
    return max(0, min(free + kept_for_reuse, limit - allocated))


def empty_beside(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A new tensor of the same dtype in the same memory, pinned if ``tensor`` is, and of another shape if given."""
    shape = tensor.shape if shape is None else shape
    return torch.empty(*shape, dtype=tensor.dtype, device=tensor.device, pin_memory=_is_pinned(tensor))


def in_host_memory(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where possible: a GPU reads and writes it several times as fast."""
    try:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    except RuntimeError:  # the host allows less pinned memory than that
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


def _index(device: torch.device) -> int:
    """A GPU's number, which torch's limits ask for."""
    return torch.cuda.current_device() if device.index is None else device.index


def _is_pinned(tensor: Tensor) -> bool:
    return torch.cuda.is_available() and tensor.device.type == "cpu" and tensor.is_pinned()
