"""The learning rate over the steps, as a factor of its peak."""

from __future__ import annotations

import math

from rehead.recipes.training.options import UptrainOptions


def rate_factor(step: int, options: UptrainOptions) -> float:
    """Linear warm-up, then cosine (Loshchilov and Hutter 2017, arXiv 1608.03983), warmup-stable-decay (Hu et al. 2024,
    arXiv 2404.06395; linear decay) or constant.

    Args:
        step: from 0; the last step ends one step above the final rate, so that no step is wasted.
        options: ``steps``, ``schedule``, ``warmup``, ``decay`` and ``final_learning_rate`` are read.
    """
    steps, end = options.steps, options.final_learning_rate
    warmup = int(options.warmup) if options.warmup >= 1 else round(options.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "wsd":
        length = max(round(options.decay * steps), 1)
        return end + (1 - end) * min(1.0, (steps - step) / length)
    progress = (step - warmup) / max(steps - warmup, 1)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2
