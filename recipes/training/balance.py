"""A warning when a student's attention factors are badly scaled.

Keys may be any multiple of what they are if queries are divided by it, values if the output projection is: the function
is the same, but an optimiser with one learning rate moves the small factor far and the large one hardly. A closed-form
start in the wrong gauge diverges for that reason, so what a conversion gives is compared with the model that it came
from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.convert.heads import Heads
from rehead.convert.model import Model, open_model
from rehead.errors import ReheadError
from rehead.recipes.training.models import Opened

logger = logging.getLogger("rehead.recipes.training")

#: A factor that is off by more than this, for a tenth of a layer's dimensions, trains badly: AdamW moves every element
#: by about the learning rate, whatever its size.
LIMIT = 8.0
_LAYERS = 8


@dataclass(frozen=True)
class Imbalance:
    """The worst of the layers that were looked at.

    Attributes:
        layer: which.
        factors: ``"k/q"`` or ``"v/o"``.
        ratio: by how much the ratio of their row norms is off, at the 90th percentile over dimensions; 1 is balanced.
    """

    layer: int
    factors: str
    ratio: float


def warn_if_unbalanced(
    student: Opened, teacher: Opened | None, listener: Callable[[dict[str, Any]], None] | None = None
) -> Imbalance | None:
    """Say in one line when a student's factors are badly scaled; refuses nothing.

    Args:
        student, teacher: open checkpoints; without a teacher only the spread inside each layer is looked at.
        listener: called with a ``warning`` event; the line goes to the ``rehead.recipes.training`` logger as well.

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
    logger.warning(line)
    if listener is not None:
        listener({"event": "warning", "note": line})
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


def _key_query(heads: Heads) -> Tensor:
    """Root mean square norm of key rows over that of query rows, for each dimension of a head, [D]."""
    return _pooled(heads, _rms(heads.k, (0, 2)) / _rms(heads.q, (0, 2)))


def _value_output(heads: Heads) -> Tensor:
    """The same for value rows and the columns of the output projection that read them, [D]."""
    return _rms(heads.v, (0, 2)) / _rms(heads.o, (0, 1))


def _rms(tensor: Tensor, dims: tuple[int, int]) -> Tensor:
    return tensor.square().sum(dims).sqrt().clamp_min(1e-20)


def _pooled(heads: Heads, ratio: Tensor) -> Tensor:
    """Both halves of a rotary pair share a scale."""
    if heads.pairs is None or not len(heads.pairs):
        return ratio
    ratio = ratio.clone()
    both = ratio[heads.pairs].log().mean(1).exp()
    ratio[heads.pairs[:, 0]] = ratio[heads.pairs[:, 1]] = both
    return ratio


def _off(mine: Tensor, other: Tensor | None) -> float:
    """90th percentile of how far ratios are from where they should be, as a factor.

    Dimensions of keys stay what they were only up to their basis, so each is compared with the teacher's typical ratio;
    what varies inside the teacher's own layer is no fault of the student's.
    """
    logs = mine.log()
    if other is None:
        return float((logs - logs.median()).abs().quantile(0.9).exp())
    theirs = other.log()
    usual = (theirs - theirs.median()).abs().quantile(0.9)
    far = (logs - theirs.median()).abs().quantile(0.9)
    return float((far - usual).clamp_min(0).exp())
