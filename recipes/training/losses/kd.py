"""Distillation: KL(teacher || student) over the full vocabulary (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from rehead.recipes.training.losses.registry import loss
from rehead.recipes.training.losses.tokens import TokenBatch


@loss("kd", "KL from the teacher's distribution to the student's, full vocabulary", fused="forward")
def kd(batch: TokenBatch) -> Tensor:
    """Temperature squared times KL(teacher || student) of every token, [N]."""
    student, teacher = batch.student_log_probs(batch.temperature), batch.teacher_log_probs(batch.temperature)
    return batch.temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
