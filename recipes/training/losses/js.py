"""Generalised Jensen-Shannon divergence, between both KLs (Agarwal et al. 2023, GKD, arXiv 2306.13649)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rehead.recipes.training.losses.registry import loss
from rehead.recipes.training.losses.tokens import TokenBatch


@loss("js", "generalised Jensen-Shannon divergence, between both KLs (GKD)", fused="js")
def js(batch: TokenBatch) -> Tensor:
    """Temperature squared times mix KL(teacher || m) + (1 - mix) KL(student || m) of every token, [N].

    m is mix times the teacher's distribution plus (1 - mix) times the student's.
    """
    student, teacher = batch.student_log_probs(batch.temperature), batch.teacher_log_probs(batch.temperature)
    both = torch.logaddexp(teacher + math.log(batch.mix), student + math.log1p(-batch.mix))
    from_teacher = (teacher.exp() * (teacher - both)).sum(-1)
    from_student = (student.exp() * (student - both)).sum(-1)
    return batch.temperature**2 * (batch.mix * from_teacher + (1 - batch.mix) * from_student)
