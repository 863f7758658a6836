"""The input of recovery on calibration text: a model, the changed model, and how each layer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rehead.healing.moments import Moments
from rehead.lazy import late
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, RecoverySettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = late("torch")


@dataclass(frozen=True)
class LayerJob:
    """How to change one layer.

    Attributes:
        closed_form: (the original's heads, float32; the moments that it needs, or None) -> the changed layer; None
            where its attention stays.
        needs: names of the moments that ``closed_form`` uses (:data:`rehead.healing.moments.MOMENTS`).
        groups: number of groups of neighbouring query heads to gather them for.
        refit: refit logits and output projection to the original attention.
        writers: matrices, below the layer's prefix, to refit together to the original block's output at the end.
        fit: optimiser steps of the layer-wise fit.
        trains: attention module -> the parameters that the fit trains.
        settings: settings of the recovery, where they differ from the usual.
        module: makes, as shapes, the attention module that replaces the class's own in the changed model; None keeps
            the class's own.
    """

    closed_form: Callable[[Heads, Moments | None], Changed] | None
    needs: tuple[str, ...] = ()
    groups: int = 1
    refit: bool = False
    writers: tuple[str, ...] = ()
    fit: int = 0
    trains: Callable[[nn.Module], Iterable[nn.Parameter]] = lambda attention: attention.parameters()
    settings: RecoverySettings = field(default_factory=RecoverySettings)
    module: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Job:
    """A model to change layer by layer.

    Attributes:
        original: the model that layers are calibrated against.
        changed: the source of the changed model's tensors, except those of changed layers.
        config: config of the changed model's class.
        layers: the layers to change; the others are run unchanged.
        tensors: (layer, heads) -> that layer's tensors by the checkpoint's names.
        store: (name, tensor) -> the tensor in the form that is written.
        seed: seed for all random numbers.
        start: the model whose heads closed forms start from.
        own_calls: the changed model's layers are called in another way than the original's (with other masks).
    """

    original: Model
    changed: Model
    config: Any
    layers: Mapping[int, LayerJob]
    tensors: Callable[[int, Heads], dict[str, Tensor]]
    start: Model
    store: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    seed: int = 0
    own_calls: bool = False

    @property
    def modules(self) -> dict[int, Callable[[], nn.Module]]:
        """The attention modules that replace the class's own, by layer."""
        return {layer: job.module for layer, job in self.layers.items() if job.module is not None}


def query_order(groups: Iterable[Iterable[int]], group_size: int) -> Tensor:
    """Old indices of the query heads, int64 [H], after their KV heads are regrouped.

    Args:
        groups: old KV heads in each new group.
        group_size: query heads per old KV head.
    """
    return torch.tensor([kv * group_size + i for group in groups for kv in group for i in range(group_size)])
