"""A warning when a student's attention factors are badly scaled.

Keys may be any multiple of what they are if queries are divided by it, values if the output projection is: the function
is the same, but an optimiser with one learning rate moves the small factor far and the large one hardly. A closed-form
start in the wrong gauge diverges for that reason, so what a conversion gives is compared with the model that it came
from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rehead.errors import ReheadError
from rehead.models.heads import Heads
from rehead.models.model import Model, open_model
from rehead.recipes.training.models import Opened

#: Factors that are off by more than this train badly: AdamW moves every element by about the learning rate, whatever
#: its size. Closed-form starts in the balanced gauge are off by 25 at most.
LIMIT = 50.0
_LAYERS = 8


@dataclass(frozen=True)
class Imbalance:
    """The worst of the layers that were looked at.

    Attributes:
        layer: which.
        factors: ``"k/q"`` or ``"v/o"``.
        ratio: by how much the ratio of their norms is off, a typical factor; 1 is balanced.
    """

    layer: int
    factors: str
    ratio: float


def warn_if_unbalanced(student: Opened, teacher: Opened | None, tell: Callable[[str], None]) -> Imbalance | None:
    """Say in one line when a student's factors are badly scaled; refuses nothing.

    Args:
        student, teacher: open checkpoints; without a teacher only the spread inside each layer is looked at.
        tell: called with the line.

    Returns:
        What was found, None where all is well or the layout is not known.
    """
    try:
        mine = open_model(student.source)
        theirs = None if teacher is None else open_model(teacher.source)
        found = measure(mine, theirs)
    except ReheadError:
        return None
    if found is None or found.ratio < LIMIT:
        return None
    line = (
        f"{student.name}: layer {found.layer} has badly scaled factors (norms of {found.factors} are off by a factor "
        f"of {found.ratio:.0f}), so training may diverge; convert it again, or lower --lr"
    )
    tell(line)
    return found


def measure(student: Model, teacher: Model | None) -> Imbalance | None:
    """The worst imbalance over a few layers, spread evenly; None where there are none to look at.

    Raises:
        UnsupportedError: weights cannot be read.
    """
    layers = student.layers if teacher is None else [i for i in student.layers if i in teacher.layers]
    step = max(len(layers) // _LAYERS, 1)
    worst: Imbalance | None = None
    for layer in layers[::step]:
        mine = student.heads(layer).to(torch.float32)
        other = None if teacher is None else teacher.heads(layer).to(torch.float32)
        for factors, ratios in (("k/q", _key_query), ("v/o", _value_output)):
            if factors == "k/q" and mine.key_norm != "none":
                continue  # a norm stands between, so the size of neither counts
            off = _off(ratios(mine), None if other is None else ratios(other))
            if worst is None or off > worst.ratio:
                worst = Imbalance(layer, factors, off)
    return worst


def _key_query(heads: Heads) -> tuple[Tensor, Tensor]:
    """Norms of key rows and of query rows for each dimension of a head, over all heads, [D] each."""
    return _paired(heads, _norms(heads.k, (0, 2))), _paired(heads, _norms(heads.q, (0, 2)))


def _value_output(heads: Heads) -> tuple[Tensor, Tensor]:
    """The same for value rows and for the columns of the output projection that read them."""
    return _norms(heads.v, (0, 2)), _norms(heads.o, (0, 1))


def _norms(tensor: Tensor, dims: tuple[int, int]) -> Tensor:
    """Root mean square over heads of a dimension's norm."""
    heads = tensor.shape[0] if dims == (0, 2) else tensor.shape[1]
    return (tensor.square().sum(dims) / heads).sqrt().clamp_min(1e-20)


def _paired(heads: Heads, norms: Tensor) -> Tensor:
    """Both halves of a rotary pair share a scale."""
    if heads.pairs is None or not len(heads.pairs):
        return norms
    norms = norms.clone()
    norms[heads.pairs] = norms[heads.pairs].square().mean(1, keepdim=True).sqrt()
    return norms


def _off(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None) -> float:
    """How far the ratios of two factors' norms are from where they should be: a typical factor, 1 or more.

    Dimensions are weighed by the product of the norms, which no gauge changes: one that carries little may have any
    scale. They need not be the teacher's dimensions, so all are compared with the teacher's typical ratio, less what
    varies in the teacher itself.
    """
    usual, spread = _typical(*(mine if other is None else other))
    weight = mine[0] * mine[1]
    logs = (mine[0] / mine[1]).log()
    if other is None:
        return math.exp(spread)
    far = float(((logs - usual).abs() * weight).sum() / weight.sum())
    return math.exp(max(far - spread, 0.0))


def _typical(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Weighted mean of the log ratios, and their mean distance from it."""
    weight, logs = first * second, (first / second).log()
    mean = float((logs * weight).sum() / weight.sum())
    return mean, float(((logs - mean).abs() * weight).sum() / weight.sum())
