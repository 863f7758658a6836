"""Reverse KL: the student is held to what it says itself, so it may drop what the teacher deems unlikely.

Gu et al. 2023 (MiniLLM, arXiv 2306.08543) argue for it where a small student cannot cover the teacher's distribution.
"""

from __future__ import annotations

from torch import Tensor

from rehead.recipes.training.losses.registry import loss
from rehead.recipes.training.losses.tokens import TokenBatch


@loss("reverse", "KL from the student's distribution to the teacher's (MiniLLM)", fused="reverse")
def reverse(batch: TokenBatch) -> Tensor:
    """Temperature squared times KL(student || teacher) of every token, [N]."""
    student, teacher = batch.student_log_probs(batch.temperature), batch.teacher_log_probs(batch.temperature)
    return batch.temperature**2 * (student.exp() * (student - teacher)).sum(-1)
