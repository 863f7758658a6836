"""The registry of training losses: one file, one function, one name each; and what a ``--loss`` means."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rehead.errors import UsageError
from rehead.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Term:
    """A registered loss.

    Attributes:
        name: as in ``--loss``.
        function: of a :class:`~.tokens.TokenBatch`. Gives one number per token, [N], and need only be differentiable:
            gradients are taken a chunk of tokens at a time.
        summary: one line for the help.
        needs_teacher: whether there must be a teacher.
        fused: the coefficient of the GPU kernel that computes this loss, where there is one.
    """

    name: str
    function: Callable[..., Tensor]
    summary: str
    needs_teacher: bool = True
    fused: str | None = None


# The modules that register a loss when imported; importing them needs torch, naming them does not.
TERM_MODULES: dict[str, str] = {name: f"rehead.recipes.training.losses.{name}" for name in ("kd", "ce", "js")}
TERMS: Registry[Term] = Registry("loss", TERM_MODULES)


def loss(
    name: str, summary: str, *, needs_teacher: bool = True, fused: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a loss; the arguments are :class:`Term`'s.

    Raises:
        ValueError: the name is taken, or could not be written in a ``--loss``.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"{name!r} cannot name a loss; use a letter first, then letters, digits and underscores")
        TERMS.add(name, Term(name, function, summary, needs_teacher, fused))
        return function

    return add


_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_PART = re.compile(rf"(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*\*\s*)?({_NAME})")


@dataclass(frozen=True)
class Objective:
    """What training minimises: a weighted sum of registered losses.

    Attributes:
        terms: pairs of weight and name, e.g. ``((1.0, "kd"), (0.1, "ce"))``.
        temperature: of the losses that compare two distributions; their values are multiplied by its square, so that
            the size of the gradient does not depend on it (Hinton et al. 2015, arXiv 1503.02531).
        mix: the teacher's share of the mixture in ``js``, between 0 and 1.
    """

    terms: tuple[tuple[float, str], ...] = ((1.0, "kd"),)
    temperature: float = 1.0
    mix: float = 0.5

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(TERMS.get(name).needs_teacher for _, name in self.terms)

    def weighted(self) -> tuple[tuple[float, Term], ...]:
        """The registered losses with their weights."""
        return tuple((weight, TERMS.get(name)) for weight, name in self.terms)

    def __str__(self) -> str:
        return "+".join(name if weight == 1 else f"{weight:g}*{name}" for weight, name in self.terms)


def parse_objective(text: str, *, temperature: float = 1.0, mix: float = 0.5) -> Objective:
    """Read a ``--loss``: a name, or a sum of names with weights such as ``kd+0.1*ce``.

    Raises:
        UsageError: the text is no such sum, a name is unknown or comes twice, a number is out of range.
    """
    terms: list[tuple[float, str]] = []
    for part in text.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"--loss {text!r}: cannot read {part.strip()!r}; write a sum such as kd+0.1*ce")
        weight, name = float(match[1]) if match[1] else 1.0, TERMS.get(match[2]).name
        if weight == 0:
            raise UsageError(f"--loss {text!r}: the weight of {name} is 0; leave {name} out")
        if any(name == other for _, other in terms):
            raise UsageError(f"--loss {text!r}: {name} comes twice; give it one weight")
        terms.append((weight, name))
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature {temperature:g}: must be positive and finite; 1 is the usual one")
    if not 0 < mix < 1:
        raise UsageError(f"mix {mix:g}: must lie between 0 and 1; 0.5 is the usual one")
    return Objective(tuple(terms), temperature, mix)
