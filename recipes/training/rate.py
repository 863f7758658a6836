"""The peak learning rate of a run that names none: the nearer a student is to its teacher, the less it can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rehead.data.store import IGNORED, Rows, TokenStore
from rehead.models.live import evaluating
from rehead.recipes.training.options import UptrainOptions
from rehead.recipes.training.processes import Processes
from rehead.recipes.training.texts import first_micro_batch, forward_inputs, rows_to_train

HIGHEST, LOWEST = 5e-4, 2e-5
_FAR = 0.4  # KL from which on a student can take the highest rate
_TOKENS = 4096  # that the distance is measured on


@dataclass(frozen=True)
class Rate:
    """The peak learning rate of a run, and what it was chosen by.

    Attributes:
        learning_rate: of the run.
        kl_at_start: the student's mean KL to its teacher before the first step, in nats per token; None where the rate
            does not depend on it.
    """

    learning_rate: float
    kl_at_start: float | None = None


def default_rate(divergence: float | None) -> float:
    """The peak learning rate of a student so far from its teacher.

    5e-4 from a KL of 0.4 on, in proportion below, never less than 2e-5; to two digits, so that two runs whose sums
    differ in the last bits take the same. The line through what was measured (SmolLM2-135M, ``kd``, 8M tokens, one
    H200): a student with one KV head that starts at 0.37 ends near 0.20 at 5e-4. Latents that start at 0.141 and 0.165
    (speeches and kernel documentation) end at 0.132 and 0.124 at 5e-5, 0.115 and 0.106 at 1e-4, 0.1155 and 0.109 at
    2e-4, and at 5e-4 further away than they began: 0.250 and 0.294.

    Args:
        divergence: mean KL(teacher, student) before training, in nats per token; None without a teacher.
    """
    if divergence is None:
        return HIGHEST
    return float(f"{max(HIGHEST * min(1.0, divergence / _FAR), LOWEST):.2g}")


def peak_rate(options: UptrainOptions, divergence: float | None = None) -> float:
    """The rate that was asked for, else :func:`default_rate`."""
    return options.learning_rate or default_rate(divergence)


def is_measured(options: UptrainOptions) -> bool:
    """Whether the rate depends on how far the student is from its teacher: none is given and the loss needs one."""
    return options.learning_rate is None and options.objective().needs_teacher


def rate_at_start(module: Any, store: TokenStore, options: UptrainOptions, run: Processes) -> Rate:
    """The rate that was asked for; else the default, by the distance to the teacher where the loss needs one.

    Args:
        module: the student with its loss, whole (not sharded) and untrained.
        store: the tokens.
        options: of the run.
        run: the processes; each gets the same rate.
    """
    kl = _divergence(module, store, options, run) if is_measured(options) else None
    return Rate(peak_rate(options, kl), kl)


def _divergence(module: Any, store: TokenStore, options: UptrainOptions, run: Processes) -> float:
    """Mean KL to the teacher on the first rows to train, in nats per token; the same rows in every process."""
    count = min(max(_TOKENS // options.seq_length, 1), options.rows_per_step)
    rows = rows_to_train(store, options, 0, options.seed, slice(0, count))
    size = min(first_micro_batch(options, run), count)
    total = torch.zeros((), device=run.device)
    with evaluating(module):
        for at in range(0, count, size):
            part = Rows(*(tensor[at : at + size] for tensor in rows))
            total += module(**forward_inputs(part, run.device)).metrics["kl"].float()
    # All have computed the same number; those of different devices may differ in its last bits.
    counted = int((rows.labels != IGNORED).sum())
    return float(run.sum(total)) / run.world / max(counted, 1)
