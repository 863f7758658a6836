"""The processes of one run: who this is, where it computes, and what they say to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rehead.errors import UsageError
from rehead.models.live import decoder_layers, resolve_device

_BUCKET = 64 << 20


@dataclass(frozen=True)
class Processes:
    """One process among those that ``accelerate launch`` started, or the only one.

    Attributes:
        rank: of this process; 0 writes and speaks.
        world: how many there are.
        device: where this one computes.
        sharded: whether parameters are sharded over the processes (FSDP2) rather than repeated in each (DDP).
        reshard: with FSDP2, whether a layer's parameters are let go of between forward and backward.
    """

    rank: int
    world: int
    device: torch.device
    sharded: bool = False
    reshard: bool = True

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
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
                dist.all_reduce(flat)
                parts = flat.split([part.numel() for part in bucket])
                torch._foreach_copy_(bucket, [new.view_as(old) for new, old in zip(parts, bucket)])
                bucket, size = [], 0

    def agreed(self, number: int) -> int:
        """The main process's number, in every process."""
        if self.world == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            dist.barrier()


def join_processes(device: str) -> Processes:
    """Find out which process this is, joining the others where ``accelerate launch`` (or torchrun) started several.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        UsageError: no such device, or a launch configuration of FSDP's first version.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, resolve_device(device))
    from accelerate import PartialState

    cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if device.startswith("cuda"):
        resolve_device(device)
    # The others wait while the main one tokenises, and while it writes.
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(hours=12))
    processes = Processes(state.process_index, state.num_processes, state.device)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return processes
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError("the launch configuration asks for FSDP 1; set fsdp_version: 2 in its fsdp_config")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UsageError(
            "the launch configuration offloads parameters to the host, which uptrain does not; turn it off"
        )
    return Processes(
        processes.rank,
        processes.world,
        processes.device,
        sharded=True,
        reshard=bool(plugin.reshard_after_forward),
    )


def shard(module: nn.Module, student: nn.Module, teacher: nn.Module | None, dtype: torch.dtype, run: Processes) -> None:
    """Shard a student with its loss, layer by layer, in place; and the layers of its teacher.

    Masters are the float32 shards; each layer is gathered in ``dtype`` when it is needed. What is outside the layers
    (embeddings, last norm, head) is gathered around ``module``'s forward pass, inside which the loss reads the head.
    The teacher's head is read there too, without such a gathering, so its parts outside the layers stay whole.

    Args:
        module: what is called; holds ``student``.
        student: whole, on this process's device.
        teacher: frozen, whole, on this process's device.
        dtype: of the computation.
        run: the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(run.device.type, (run.world,))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in decoder_layers(student):
        _widen(layer)
        fully_shard(layer, reshard_after_forward=run.reshard, **options)
    _widen(module)
    fully_shard(module, **options)
    if teacher is not None:
        for layer in decoder_layers(teacher):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _widen(module: nn.Module) -> None:
    """Master weights are float32; one layer at a time, so that they are never all there whole."""
    for parameter in module.parameters():
        if parameter.requires_grad and not hasattr(parameter, "device_mesh"):
            parameter.data = parameter.data.float()
