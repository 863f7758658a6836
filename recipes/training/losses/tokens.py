"""What a loss on logits sees of a chunk of tokens: logits, labels, and log-probabilities, computed once for all."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TokenBatch:
    """A chunk of counted tokens.

    Attributes:
        student: logits [N, vocabulary], float32 or float64, with soft cap, scale and bias applied.
        teacher: the teacher's, or None.
        labels: the token that follows each, int64 [N].
        temperature: of the losses that compare distributions.
        mix: the teacher's share of the mixture in ``js``.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    temperature: float = 1.0
    mix: float = 0.5
    _cache: dict[tuple[str, float], Tensor] = field(default_factory=dict, repr=False)

    def student_log_probs(self, temperature: float = 1.0) -> Tensor:
        """Log-softmax of the student's logits over ``temperature``, [N, vocabulary]."""
        return self._log_probs("student", self.student, temperature)

    def teacher_log_probs(self, temperature: float = 1.0) -> Tensor:
        """Log-softmax of the teacher's logits over ``temperature``, [N, vocabulary]."""
        assert self.teacher is not None, "a loss that reads the teacher is registered with needs_teacher=True"
        return self._log_probs("teacher", self.teacher, temperature)

    def _log_probs(self, who: str, logits: Tensor, temperature: float) -> Tensor:
        key = (who, temperature)
        if key not in self._cache:
            self._cache[key] = torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
        return self._cache[key]
