"""FSDP2: parameters, gradients and optimiser state spread over the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rehead.models.live import decoder_layers
from rehead.recipes.training.processes import Processes


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
