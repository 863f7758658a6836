"""The processes that ``accelerate launch`` or torchrun started for one run: who this is, and what they tell each other.

All of them call :class:`Ranks`' methods in the same order. Sums are the only thing that each of them adds to; besides
these, the main process tells the others what only it may do: read a folder that changes, choose, write. A process that
fails notes that where all can read it, so that one of them speaks and all end with its exit code.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rehead.errors import EXIT_INTERRUPTED, EXIT_UNSUPPORTED, ReheadError, UnsupportedError
from rehead.lazy import late
from rehead.models.live import resolve_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = late("torch")

T = TypeVar("T")

_BUCKET = 64 << 20
#: Where the processes leave notes for each other: how many have failed, with which exit code the first of them, and
#: what the main process tells.
_FAILED, _CODE, _TOLD = "rehead/failed", "rehead/code", "rehead/told/{}"
#: Seconds between two looks at the notes, at first and at last.
_SOON, _LATER = 0.001, 0.2
#: How many things the main process has told; whether this process is the one that says why the run fails, if it does.
_told = 0
_speaks: bool | None = None


class OtherFailed(ReheadError):
    """Another process of the run failed and says why; this one ends with its exit code."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that were started together, or the only one.

    Attributes:
        rank: of this process; 0 writes and speaks.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ---- shares of rows: row i belongs to process i % world

    def below(self, row: int) -> int:
        """How many of the rows before ``row`` are this process's; also where its own rows from there on begin."""
        return max(0, -(-(row - self.rank) // self.world))

    def own(self, rows: Tensor) -> Tensor:
        """Those of some rows (int64) that are this process's, as indices among its own."""
        return rows if self.world == 1 else rows[rows % self.world == self.rank] // self.world

    def places(self, rows: Tensor) -> Tensor:
        """At which places of some rows (int64) there are this process's."""
        return (rows % self.world == self.rank).nonzero().flatten()

    # ---- what every process adds to

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of any memory over all processes, in place."""
        if self.world > 1:
            there = tensor.to(self.device).contiguous()
            with _together():
                torch.distributed.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)
        return tensor

    def sum_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Sum gradients over all processes in place, in buckets.

        Once a step and in the gradients' own precision (float32), whatever the micro-batches compute in; with repeated
        parameters this takes the place of hooks that would reduce every micro-batch's gradients.
        """
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= _BUCKET or i == len(tensors) - 1:
                flat = torch.cat([part.reshape(-1) for part in bucket])
                with _together():
                    torch.distributed.all_reduce(flat)
                parts = flat.split([part.numel() for part in bucket])
                torch._foreach_copy_(bucket, [new.view_as(old) for new, old in zip(parts, bucket)])
                bucket, size = [], 0

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            with _together():
                torch.distributed.barrier()

    # ---- what the main process tells the others

    def agreed(self, number: int) -> int:
        """The main process's number, in every process."""
        if self.world == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.int64, device=self.device)
        with _together():
            torch.distributed.broadcast(tensor, 0)
        return int(tensor)

    def from_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, in every process; something that JSON can say.

        The others wait without a limit. Its errors end them too: see :meth:`announced`.
        """
        if self.world == 1:
            return compute()
        global _told
        key, _told = _TOLD.format(_told), _told + 1
        store = _store()
        if self.main:
            result = compute()
            store.set(key, json.dumps(result))
            return result
        pause = _SOON
        while not store.check([key]):
            _raise_if_failed(store)
            time.sleep(pause)
            pause = min(2 * pause, _LATER)
        told: T = json.loads(store.get(key))
        return told

    def same(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The main process's tensors, in every process and on its device; or None where it has none."""
        if self.world == 1:
            return tensors
        mine = None if tensors is None else {name: [list(t.shape), str(t.dtype)] for name, t in tensors.items()}
        shapes: dict[str, Any] | None = self.from_main(lambda: mine)
        if shapes is None:
            return None
        result = {}
        for name, (shape, dtype) in shapes.items():
            if self.main and tensors is not None:
                tensor = tensors[name].to(self.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype.split(".")[1]), device=self.device)
            with _together():
                torch.distributed.broadcast(tensor.reshape(-1).view(torch.uint8), 0)  # as bytes: any dtype
            result[name] = tensor
        return result

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Let the other processes know where this one fails inside the block, so that none waits for it."""
        try:
            yield
        except BaseException as error:
            if self.world > 1 and not isinstance(error, OtherFailed):
                interrupted = isinstance(error, KeyboardInterrupt)
                speaks(EXIT_INTERRUPTED if interrupted else getattr(error, "exit_code", EXIT_UNSUPPORTED))
            raise


def join_ranks(device: str) -> Ranks:
    """Find out which process this is, joining the others where ``accelerate launch`` (or torchrun) started several.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...; of several processes each takes its own GPU.

    Raises:
        UsageError: no such device.
    """
    if launched() == 1:
        return Ranks(0, 1, resolve_device(device))
    from accelerate import PartialState

    cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if device.startswith("cuda"):
        resolve_device(device)
    # The others wait while the main one tokenises, and while it writes.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(hours=12))
    return Ranks(state.process_index, state.num_processes, state.device)


def launched() -> int:
    """How many processes were launched together, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined() -> bool:
    """Whether this process has joined others."""
    return launched() > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()


def speaks(code: int) -> bool:
    """Whether this process is the one to say why the run fails: the first that failed.

    Args:
        code: its exit code, which the others take over.
    """
    global _speaks
    if not joined():
        return os.environ.get("RANK", "0") == "0"  # before they join, all fail alike
    if _speaks is None:
        store = _store()
        _speaks = store.add(_FAILED, 1) == 1
        if _speaks:
            store.set(_CODE, str(code))
    return _speaks


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def _raise_if_failed(store: Any) -> None:
    global _speaks
    if store.check([_FAILED]):
        error, _speaks = OtherFailed("another process of this run failed"), False
        error.exit_code = int(store.get(_CODE))
        raise error


@contextmanager
def _together() -> Iterator[None]:
    """Say in one line that another process is gone where an exchange breaks off."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _raise_if_failed(_store())
        raise UnsupportedError(
            "another process of this run ended without a word (killed, or out of memory); run the same again to go on "
            "from what is kept (convert: with --resume)"
        ) from None
