"""Evaluation while training: mean KL to the teacher, agreement and perplexity on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.data.beginning import IGNORED, NO_START, uncounted
from rehead.models.modes import evaluating
from rehead.recipes.training.processes import Processes


@dataclass(frozen=True)
class HeldOut:
    """A held-out text.

    Attributes:
        name: as the user wrote it.
        windows: int64 [n, window], disjoint; in each, all but the first token are predicted.
        start: int64 [p], how the tokenizer begins a text; these tokens are never predicted.
    """

    name: str
    windows: Tensor
    start: Tensor = NO_START


def evaluate_held_out(module: Any, text: HeldOut, run: Processes, rows: int) -> dict[str, Any]:
    """Figures of one text, over disjoint windows: what ``rehead evaluate`` calls the disjoint convention.

    Args:
        module: the student with its loss (:class:`rehead.recipes.training.losses.StudentWithLoss`).
        text: the text.
        run: the processes; each takes its share of the windows.
        rows: windows in a forward pass.

    Returns:
        ``tokens_counted``, ``perplexity``, and with a teacher ``kl`` (nats a token) and ``top1_agreement``.
    """
    sums: dict[str, float] = {}
    counted = 0
    with evaluating(module):
        # Sharded parameters are gathered by all processes together, so all run as many passes; spare ones count
        # nothing.
        size = max(min(rows, -(-len(text.windows) // run.world)), 1)
        for at in range(0, len(text.windows), size * run.world):
            mine = text.windows[at + run.rank * size : at + (run.rank + 1) * size]
            spare = not len(mine)
            mine = text.windows[:1] if spare else mine
            labels = torch.full_like(mine, IGNORED)
            labels[:, :-1] = uncounted(mine[:, 1:], text.start)
            index = (labels.flatten() != IGNORED).nonzero().squeeze(-1)
            found = module(mine.to(run.device), labels=labels.to(run.device), counted_index=index.to(run.device))
            counted += 0 if spare else len(index)
            for name, value in found.metrics.items():
                sums[name] = sums.get(name, 0.0) + (0.0 if spare else float(value))
    names = sorted(sums)  # the same in every process, as each has made as many passes
    total = run.sum(torch.tensor([counted, *(sums.get(name, 0.0) for name in names)], device=run.device))
    count, *means = total.double().tolist()
    figures = {name: mean / count for name, mean in zip(names, means)}
    facts: dict[str, Any] = {"tokens_counted": int(count)}
    if module.teacher is not None:
        facts |= {"kl": figures["kl"], "top1_agreement": figures["top1_agreement"]}
    return facts | {"perplexity": math.exp(min(figures["cross_entropy"], 700.0))}
