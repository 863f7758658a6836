"""Squared distance of hidden states, relative to the teacher's size."""

from __future__ import annotations

from torch import Tensor

from rehead.recipes.training.losses.registry import loss

_SMALL = 1e-12


@loss("mse", "squared distance of hidden states over the teacher's squared norm, mean over layers", kind="hidden")
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 of every token, [N], from two [N, hidden].

    Dividing by each token's own norm keeps the few tokens with enormous hidden states from being all that counts.
    """
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(_SMALL)
