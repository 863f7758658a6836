"""The processes of an uptraining, and how they share a model's parameters."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rehead.errors import UsageError
from rehead.models.live import decoder_layers
from rehead.models.ranks import Ranks, join_ranks


@dataclass(frozen=True)
class Processes(Ranks):
    """One process of an uptraining.

    Attributes:
        sharded: whether parameters are sharded over the processes (FSDP2) rather than repeated in each (DDP).
        reshard: with FSDP2, whether a layer's parameters are let go of between forward and backward.
    """

    sharded: bool = False
    reshard: bool = True


def join_processes(device: str) -> Processes:
    """As :func:`~rehead.models.ranks.join_ranks`, with what the launch configuration says of sharding.

    Raises:
        UsageError: no such device, or a launch configuration of FSDP's first version.
    """
    ranks = join_ranks(device)
    processes = Processes(ranks.rank, ranks.world, ranks.device)
    if ranks.world == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return processes
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError("the launch configuration asks for FSDP 1; set fsdp_version: 2 in its fsdp_config")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UsageError(
            "the launch configuration offloads parameters to the host, which uptrain does not; turn it off"
        )
    return replace(processes, sharded=True, reshard=bool(plugin.reshard_after_forward))


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
