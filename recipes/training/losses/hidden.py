"""Losses on hidden states, a chunk of tokens at a time, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.errors import UsageError
from rehead.recipes.training.losses.registry import Objective

_CHUNK = 8192


def chosen_layers(objective: Objective, count: int) -> tuple[int, ...]:
    """The layers whose outputs are compared.

    Raises:
        UsageError: a layer that the model does not have.
    """
    layers = tuple(range(count)) if objective.layers is None else objective.layers
    for layer in layers:
        if not 0 <= layer < count:
            raise UsageError(f"hidden-state layer {layer}: the model has layers 0 to {count - 1}")
    return layers


def hidden_loss(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Sum of the objective's hidden-state terms over tokens, for one layer; the gradient is taken at once.

    Args:
        student: [N, hidden], any floating dtype.
        teacher: [N, hidden], constants.
        objective: its hidden-state terms.

    Returns:
        float32 scalar (float64 for float64 states), differentiable in ``student``.
    """
    return _HiddenLoss.apply(student, teacher, objective)


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.empty_like(student)
        loss = student.new_zeros((), dtype=wide)
        for start in range(0, len(student), _CHUNK):
            rows = slice(start, start + _CHUNK)
            with torch.enable_grad():
                leaf = student[rows].detach().to(wide).requires_grad_(True)
                other = teacher[rows].to(wide)
                total = leaf.new_zeros(())
                for weight, term in objective.of_kind("hidden"):
                    total = total + weight * term.function(leaf, other).sum()
                gradient[rows] = torch.autograd.grad(total, leaf)[0]
            loss = loss + total.detach()
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None
