"""Layer-wise fit: a few hundred steps of Adam on one attention module, towards the original's output.

It needs no end-to-end pass, no loss but the layer's own, and the memory of one layer. It recovers what closed forms
cannot, since queries, keys, values and output move together, through the softmax and norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Adam's step relative to each weight's own root mean square, so that one rate serves every matrix.
RELATIVE_RATE = 1e-2
WARM_UP = 20
#: Share of the error of the layers before that a layer is fitted to correct; all of it fits noise, half worked best.
DRIFT = 0.5


def fit_attention(
    parameters: dict[str, nn.Parameter],
    forward: Callable[[int, Tensor], Tensor],
    targets: Callable[[int, Tensor], Tensor],
    steps: int,
    batches: Sequence[tuple[int, int]],
    seed: int,
    relative_rate: float = RELATIVE_RATE,
) -> float:
    """Fit an attention module in place.

    Args:
        parameters: the parameters to train.
        forward: (index of a length, rows of its sequences) -> the module's output on them [b, S, m], differentiable.
        targets: (index of a length, rows of its sequences) -> the wanted output.
        steps: optimiser steps.
        batches: (number of sequences, sequences per step) for each length.
        seed: seed of the order of the sequences.
        relative_rate: Adam's step relative to each weight's own root mean square.

    Returns:
        The mean squared error over the last ten steps.
    """
    groups = [
        {"params": [weight], "lr": relative_rate * max(float(weight.detach().square().mean().sqrt()), 1e-4)}
        for weight in parameters.values()
    ]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    order = _shuffled(batches, generator)
    recent: list[Tensor] = []
    with torch.enable_grad(), _fast_matmul():
        for step, (index, rows) in zip(range(steps), order):
            pace = 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / WARM_UP)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * pace
            loss = (forward(index, rows) - targets(index, rows)).square().sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            recent = [*recent[-9:], loss.detach()]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return float(torch.stack(recent).mean()) if recent else 0.0


def _shuffled(batches: Sequence[tuple[int, int]], generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(index of a length, rows of its sequences) without end: the whole text again and again, in new orders."""
    while True:
        epoch = [
            (index, rows)
            for index, (count, size) in enumerate(batches)
            for rows in torch.randperm(count, generator=generator).split(size)
            if len(rows) == size
        ]
        yield from (epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist())


@contextmanager
def _fast_matmul() -> Iterator[None]:
    """TF32 on CUDA: the fit's gradients are far noisier than its rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
