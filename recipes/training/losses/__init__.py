"""Losses of uptraining: registered by name, summed with weights, computed without ever holding all logits.

``StudentWithLoss`` (:mod:`.module`) is what a training loop calls; everything here imports torch only when used.
"""

from typing import TYPE_CHECKING, Any

from rehead.recipes.training.losses.registry import (
    TERMS,
    Objective,
    Term,
    loss,
    parse_objective,
)

if TYPE_CHECKING:
    from rehead.recipes.training.losses.module import LossOutput, StudentWithLoss

__all__ = [
    "TERMS",
    "LossOutput",
    "Objective",
    "StudentWithLoss",
    "Term",
    "loss",
    "parse_objective",
]


def __getattr__(name: str) -> Any:
    if name in ("LossOutput", "StudentWithLoss"):
        from rehead.recipes.training.losses import module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
