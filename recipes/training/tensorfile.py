"""Tensors by name in safetensors files: one tensor in memory at a time, sharded ones gathered on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.safetensors_io import header_bytes
from rehead.checkpoints.source import DTYPE_NAMES
from rehead.checkpoints.stream import HashingWriter, new_pool, sync_close
from rehead.errors import UnsupportedError

DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered first where it is sharded; every process must call this."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather is not None else tensor).cpu().contiguous()


def write_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file and sync it.

    Args:
        path: the file; None only takes part in the gathering (a process that is not the main one).
        tensors: by name; written in that order.

    Returns:
        Size in bytes and SHA-256 in hex.

    Raises:
        ResourceError: the disk is full or fails.
    """
    if path is None:
        for tensor in tensors.values():
            whole(tensor)
        return 0, ""
    writer = HashingWriter(path, new_pool(3))
    try:
        writer.write(header_bytes([(name, dtype_code(t.dtype), tuple(t.shape)) for name, t in tensors.items()], {}))
        for tensor in tensors.values():
            data = whole(tensor)
            if data.numel():
                writer.write(memoryview(data.view(-1).view(torch.uint8).numpy()))
        size, sha = writer.finish()
    except BaseException:
        writer.abort()
        raise
    sync_close(writer.fd, path.name)
    return size, sha


def read_tensors(path: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors from a safetensors file, in place; a sharded one takes its own part.

    Raises:
        UnsupportedError: the file holds other tensors, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file, torch.no_grad():
            if set(file.keys()) != set(into):
                odd = sorted(set(file.keys()) ^ set(into))[0]
                raise UnsupportedError(f"{path}: {odd} is only on one side; start again with --resume never")
            for name, tensor in into.items():
                _fill(tensor, file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise UnsupportedError(f"{path}: cannot be read ({error}); remove that checkpoint") from None


def _fill(tensor: Any, value: Tensor) -> None:
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        local = tensor.to_local()
        # Every process has read the same file, so each cuts out its own part and nothing is sent.
        part = distribute_tensor(
            value.to(tensor.device_mesh.device_type), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        local.copy_(part.to_local())
    else:
        tensor.copy_(value)
