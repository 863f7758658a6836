"""What widening does to every tensor of a class, worked out from the class itself at both sizes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rehead.console import quiet_transformers
from rehead.errors import UnsupportedError
from rehead.models.config import causal_lm_class
from rehead.models.rewrite import layer_in

Resize = Callable[[Tensor], Tensor]
"""What becomes of one tensor when its model is widened."""


@dataclass(frozen=True)
class Slot:
    """One parameter of a class: its shape, and the module that owns it."""

    shape: tuple[int, ...]
    owner: nn.Module
    leaf: str


@dataclass(frozen=True)
class ClassNorms:
    """How a class's norms work, found by trying.

    Attributes:
        offset: what its norms add to the weight that is stored.
        queries_scaled: queries and keys are normed with the same epsilon, and so must shrink with it.
        embedding: factor on the embeddings, where the class scales them by the hidden size.
    """

    offset: float = 0.0
    queries_scaled: bool = False
    embedding: float = 1.0


def slots(config: Any) -> dict[str, Slot]:
    """Every parameter of a config's class; nothing is allocated."""
    with quiet_transformers(), torch.device("meta"):
        model = causal_lm_class(config)(config)
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        found[name] = Slot(tuple(parameter.shape), model.get_submodule(path), leaf)
    return found


def resized(before: Mapping[str, Slot], after: Mapping[str, Slot]) -> dict[str, list[int]]:
    """The axes of each parameter that differ.

    Raises:
        UnsupportedError: the two have other parameters.
    """
    if before.keys() != after.keys():
        raise UnsupportedError("its class has other parameters at another width, so it cannot be widened")
    axes = {}
    for name, slot in before.items():
        new = after[name].shape
        changed = [i for i, (a, b) in enumerate(zip(slot.shape, new)) if a != b]
        if len(slot.shape) != len(new):
            raise UnsupportedError(f"{name} has another number of axes at another width, so it cannot be widened")
        if changed:
            axes[name] = changed
    return axes


def ffn_changes(before: Mapping[str, Slot], after: Mapping[str, Slot], width: int, seed: int) -> dict[str, Resize]:
    """New FFN channels: drawn at random on the way in, zero on the way out.

    Args:
        width: FFN channels before.

    Raises:
        UnsupportedError: something other than the FFN's matrices and their biases grows.
    """
    changes: dict[str, Resize] = {}
    for name, axes in resized(before, after).items():
        slot, new = before[name], after[name].shape
        if not _is_linear(slot.owner):
            kind = type(slot.owner).__name__
            raise UnsupportedError(
                f"{name} ({kind}) runs along the FFN's channels and cannot take new ones exactly; leave --reinvest out"
            )
        if len(axes) != 1:
            raise UnsupportedError(f"{name} grows along both axes with the FFN, so it cannot be widened")
        if slot.shape[axes[0]] % width:
            raise UnsupportedError(
                f"{name} has {slot.shape[axes[0]]} channels where the config says {width}, so it cannot be widened; "
                "leave --reinvest out"
            )
        reads_ffn = slot.leaf == "weight" and axes[0] == _input_axis(slot.owner)
        fill = "zero" if reads_ffn or slot.leaf == "bias" else "random"
        changes[name] = _grown(name, axes[0], width, new[axes[0]], fill, seed)
    if not changes:
        raise UnsupportedError("its class takes no FFN width from the config; use --reinvest hidden")
    return changes


def hidden_changes(
    before: Mapping[str, Slot],
    after: Mapping[str, Slot],
    sizes: tuple[int, int],
    norms: ClassNorms,
    seed: int,
    tied: bool,
    queries: frozenset[str],
) -> dict[str, Resize]:
    """New hidden channels: zero in whatever writes the residual stream, random in whatever reads it.

    A norm over m channels of which n are not zero divides by sqrt(n / m) of what it divided by, so its weight takes
    that factor; its epsilon, which the config holds, takes the square.

    Args:
        sizes: hidden channels before and after.
        tied: the head is the embedding table.
        queries: parameters of the query and key projections.
    """
    old, new = sizes
    shrink = (old / new) ** 0.5
    changes: dict[str, Resize] = {}
    for name, axes in resized(before, after).items():
        slot = before[name]
        if any((slot.shape[axis], after[name].shape[axis]) != (old, new) for axis in axes):
            raise UnsupportedError(f"{name} grows with hidden_size but is not of that size; use --reinvest ffn")
        if isinstance(slot.owner, nn.Embedding) or (tied and name.startswith("lm_head.")):
            changes[name] = _chain(_scaled(norms.embedding), _grown(name, len(slot.shape) - 1, old, new, "zero", seed))
        elif _is_linear(slot.owner):
            reads = _input_axis(slot.owner)
            steps = [
                _grown(name, axis, old, new, "random" if slot.leaf == "weight" and axis == reads else "zero", seed)
                for axis in sorted(axes, key=lambda axis: axis != reads)
            ]
            changes[name] = _chain(*steps)
        elif slot.leaf == "weight" and len(slot.shape) == 1:
            factor = shrink / norms.embedding if tied and _is_final(name, before) else shrink
            changes[name] = _norm(factor, norms.offset, new)
        else:
            kind = type(slot.owner).__name__
            raise UnsupportedError(
                f"{name} ({kind}) runs along the hidden channels and cannot take new ones exactly; leave --reinvest out"
            )
    if norms.queries_scaled:
        for name in queries:
            changes[name] = _chain(_scaled(shrink), changes[name]) if name in changes else _scaled(shrink)
    return changes


def _is_final(name: str, before: Mapping[str, Slot]) -> bool:
    """Whether a norm stands outside the layers: the last one, whose output only the head reads."""
    return layer_in(name) is None and len(before[name].shape) == 1


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _input_axis(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else 0


def _grown(name: str, axis: int, old: int, new: int, fill: str, seed: int) -> Resize:
    """Add channels along an axis that holds ``old`` of them, or several times as many (a gate beside its FFN's input).

    Args:
        new: size of the whole axis afterwards.
        fill: "zero", or "random" with the spread of what is there.
    """

    def change(tensor: Tensor) -> Tensor:
        copies = tensor.shape[axis] // old
        parts = tensor.unflatten(axis, (copies, old))
        shape = list(parts.shape)
        shape[axis + 1] = new // copies - old
        if fill == "zero":
            extra = tensor.new_zeros(shape)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
            spread = float(tensor.float().square().mean().sqrt())
            extra = (torch.randn(shape, generator=generator) * spread).to(tensor)
        return torch.cat([parts, extra], axis + 1).flatten(axis, axis + 1)

    return change


def _norm(factor: float, offset: float, size: int) -> Resize:
    """Scale a norm's weight; new channels get the mean, as they are zero until something trains them."""

    def change(tensor: Tensor) -> Tensor:
        weight = (tensor.float() + offset) * factor - offset
        extra = weight.mean().expand(size - len(weight))
        return torch.cat([weight, extra]).to(tensor.dtype)

    return change


def _scaled(factor: float) -> Resize:
    return (lambda tensor: tensor) if factor == 1.0 else (lambda tensor: (tensor.float() * factor).to(tensor.dtype))


def _chain(*changes: Resize) -> Resize:
    def change(tensor: Tensor) -> Tensor:
        for step in changes:
            tensor = step(tensor)
        return tensor

    return change
