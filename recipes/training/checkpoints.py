"""Checkpoints of a run that goes on: a folder beside OUT with a folder for each step.

``.OUT.rehead-training/`` holds ``run.json`` (what decides the result), ``tokens/`` (the tokenised data), the log, and
``step-00000100/`` with the float32 weights that train, the optimiser's state and ``state.json``, which names the hash
of every file. A step is written beside, hashed, synced and renamed; older ones go after that. What is drawn in a step
depends on the seed and the step alone, so no state of a random generator is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rehead.checkpoints.files import remove as remove_all
from rehead.checkpoints.files import whole, write_file
from rehead.checkpoints.safetensors_io import header_bytes
from rehead.checkpoints.source import DTYPE_NAMES
from rehead.checkpoints.stream import HashingWriter, ResourceError, hash_file, new_pool, sync_close, write_error
from rehead.errors import UnsupportedError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WEIGHTS, OPTIMIZER, STATE, RUN = "weights.safetensors", "optimizer.safetensors", "state.json", "run.json"
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        folder: of the step.
        step: optimiser steps done.
        state: what the loop keeps besides tensors.
    """

    folder: Path
    step: int
    state: dict[str, Any]


def work_path(out: Path) -> Path:
    """The folder of a run's checkpoints: beside OUT, and always the same."""
    return out.parent / f".{out.name}.rehead-training"


class WorkFolder:
    """The locked folder of one run; the main process's alone.

    Args:
        out: the folder that the run will write.

    Raises:
        UsageError: another run is working for the same OUT.
        ResourceError: the folder cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, work_path(out)
        self._fd = -1
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if fcntl is not None:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise UsageError(f"{out}: another run is training it; wait for that to end or choose another OUT") from None
        except OSError as error:
            raise write_error(error, str(out)) from None

    # ---- what decides the result

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Note what decides the result, before anything is computed."""
        write_file(self.path / RUN, json.dumps(identity, indent=1, sort_keys=True) + "\n")

    def noted(self) -> dict[str, Any] | None:
        """What an earlier run noted, or None."""
        try:
            found = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    # ---- steps

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, newest first; whether it is whole is not looked at."""
        found = [_STEP.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir()]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.path / f"step-{step:08d}"

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose files have the hashes that it names, and what is wrong with newer ones."""
        broken: list[str] = []
        for step in self.steps():
            found = self.folder(step)
            try:
                return Checkpoint(found, step, _verified(found)), broken
            except (OSError, ValueError) as error:
                broken.append(f"{found.name}: {error}")
        return None, broken

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` checkpoints, and what killed runs left unfinished."""
        for step in self.steps()[keep:]:
            remove_all(self.folder(step))
        for part in self.path.glob("*step-*.part"):
            remove_all(part)

    def drop(self, step: int) -> None:
        """Remove the checkpoint of a step."""
        remove_all(self.folder(step))

    def clear(self) -> None:
        """Forget an earlier run."""
        for entry in self.path.iterdir():
            if entry.name != "tokens":
                remove_all(entry)

    def close(self, *, remove: bool = False) -> None:
        """Unlock the folder, and remove it with all checkpoints once OUT is there."""
        if remove:
            remove_all(self.path)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def save(
    work: WorkFolder | None,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> int:
    """Write the checkpoint of a step; every process takes part, the main one (with ``work``) writes.

    Args:
        work: the folder; None in the other processes.
        step: optimiser steps done.
        weights: what trains, by name.
        optimizer: its state, by name.
        state: JSON.

    Returns:
        Bytes written.

    Raises:
        ResourceError: the disk is full or fails; the checkpoints before are as they were.
    """
    if work is None:
        write_tensors(None, weights)
        write_tensors(None, optimizer)
        return 0
    try:
        with whole(work.folder(step)) as part:
            part.mkdir()
            files = {
                WEIGHTS: write_tensors(part / WEIGHTS, weights),
                OPTIMIZER: write_tensors(part / OPTIMIZER, optimizer),
            }
            table = {
                "step": step,
                **state,
                "files": {name: {"size": size, "sha256": sha} for name, (size, sha) in files.items()},
            }
            write_file(part / STATE, json.dumps({**table, "checksum": _checksum(table)}, indent=1) + "\n")
    except ResourceError as error:
        kept = f"; the one of step {work.steps()[0]} is whole" if work.steps() else ""
        raise ResourceError(f"checkpoint of step {step}: {error}{kept}") from None
    return sum(size for size, _ in files.values())


def restore(found: Checkpoint, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
    """Fill weights and optimiser state from a checkpoint; every process calls this.

    Raises:
        UnsupportedError: the checkpoint holds other tensors.
    """
    read_tensors(found.folder / WEIGHTS, weights)
    read_tensors(found.folder / OPTIMIZER, optimizer)


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint that another process has verified.

    Raises:
        UnsupportedError: it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{folder}: cannot be read here ({error}); give all processes the same disk") from None


def _verified(folder: Path) -> dict[str, Any]:
    try:
        table = json.loads((folder / STATE).read_text(encoding="utf-8"))
        whole = table.pop("checksum") == _checksum(table)
    except (OSError, ValueError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{STATE} is not what was written")
    for name, entry in table["files"].items():
        if hash_file(folder / name) != (entry["size"], entry["sha256"]):
            raise ValueError(f"{name} does not have the SHA-256 that was noted")
    return dict(table)


def _checksum(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


def gathered(tensor: Tensor) -> Tensor:
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
            gathered(tensor)
        return 0, ""
    writer = HashingWriter(path, new_pool(3))
    try:
        writer.write(header_bytes([(name, dtype_code(t.dtype), tuple(t.shape)) for name, t in tensors.items()], {}))
        for tensor in tensors.values():
            data = gathered(tensor)
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
