"""Cross-entropy with the token that really follows."""

from __future__ import annotations

from torch import Tensor

from rehead.recipes.training.losses.registry import loss
from rehead.recipes.training.losses.tokens import TokenBatch


@loss("ce", "cross-entropy with the next token; needs no teacher", needs_teacher=False, fused="cross_entropy")
def ce(batch: TokenBatch) -> Tensor:
    """Minus the log-probability of every token's label, [N]; the temperature has no part in it."""
    return -batch.student_log_probs().gather(-1, batch.labels[:, None]).squeeze(-1)
