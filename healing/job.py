"""What healing is asked to do: a model, what it becomes, and how each of its layers changes; no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rehead.healing.moments import Moments
from rehead.models.heads import Heads
from rehead.models.model import Model
from rehead.models.rewrite import Changed, Healing


@dataclass(frozen=True)
class LayerJob:
    """What becomes of one layer.

    Attributes:
        closed_form: (the original's heads, float32; the moments that it needs, or None) -> the changed layer; None
            where its attention stays.
        needs: names of the moments that ``closed_form`` reads (:data:`rehead.healing.moments.MOMENTS`).
        groups: groups of neighbouring query heads that it reads them for.
        refit: refit logits and output projection to the original attention.
        writers: matrices, below the layer's prefix, to refit together to the original block's output at the end.
        fit: optimiser steps of the layer-wise fit.
        trains: attention module -> the parameters that the fit moves.
        healing: how, where not as usual.
    """

    closed_form: Callable[[Heads, Moments | None], Changed] | None
    needs: tuple[str, ...] = ()
    groups: int = 1
    refit: bool = False
    writers: tuple[str, ...] = ()
    fit: int = 0
    trains: Callable[[nn.Module], Iterable[nn.Parameter]] = lambda attention: attention.parameters()
    healing: Healing = field(default_factory=Healing)


@dataclass(frozen=True)
class Job:
    """A model to change layer by layer.

    Attributes:
        original: the model that layers are calibrated against.
        changed: the checkpoint that the changed model's tensors come from, but for those that layers compute.
        config: of the changed model's class.
        layers: the layers that change; the others are run as they are.
        tensors: (layer, heads) -> that layer's tensors by the checkpoint's names.
        store: (name, tensor) -> the tensor as it is written.
        seed: of everything drawn.
        module: makes the attention module that takes the place of the class's own in the changed model, as shapes; its
            closed form starts from the original's heads. None where the class's own stays.
    """

    original: Model
    changed: Model
    config: Any
    layers: Mapping[int, LayerJob]
    tensors: Callable[[int, Heads], dict[str, Tensor]]
    store: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    seed: int = 0
    module: Callable[[], nn.Module] | None = None


def query_order(groups: Iterable[Iterable[int]], group_size: int) -> Tensor:
    """Old query heads in the order of regrouped KV heads, each of which ``group_size`` of them read: int64 [H]."""
    return torch.tensor([kv * group_size + i for group in groups for kv in group for i in range(group_size)])
