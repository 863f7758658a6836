"""Layer-wise fit: a few hundred steps of Adam on one attention module, towards the original's output.

It needs no end-to-end pass, no loss but the layer's own, and the memory of one layer. It recovers what closed forms
cannot, since queries, keys, values and output move together, through the softmax and norms.

One step on one layer is a hundred small kernels, which a GPU does faster than Python can launch them. So on a GPU a
step is recorded once and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rehead.models.linalg import fast_products
from rehead.models.ranks import Ranks
from rehead.models.recording import record as recording_of

#: Adam's step relative to each weight's own root mean square, so that one rate serves every matrix.
RELATIVE_RATE = 1e-2
WARM_UP = 20
#: Share of the error of the layers before that a layer is fitted to correct; all of it fits noise, half worked best.
DRIFT = 0.5
#: Steps of each length of sequence that run as they are before one is recorded: libraries choose their kernels.
_UNRECORDED = 3


def fit_attention(
    parameters: dict[str, nn.Parameter],
    forward: Callable[[int, Tensor], Tensor],
    targets: Callable[[int, Tensor], Tensor],
    steps: int,
    batches: Sequence[tuple[int, int]],
    seed: int,
    relative_rate: float = RELATIVE_RATE,
    record: bool = False,
    half: bool = False,
    at_once: Sequence[int] | None = None,
    ranks: Ranks | None = None,
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
        record: replay a recorded step on a GPU; ``forward`` and ``targets`` must then read nothing but its memory.
        half: ``forward`` computes in bfloat16 on a GPU, with float32 parameters.
        at_once: sequences of each length that go forward and back together, of those of a step; None: all. Gradients
            are the same.
        ranks: the processes that share the sequences of every step; ``forward`` and ``targets`` then take indices among
            this one's own. None: it has all of them.

    Returns:
        The mean squared error over the last ten steps.
    """
    if not steps:
        return 0.0
    device = next(iter(parameters.values())).device
    ranks = ranks or Ranks(0, 1, device)
    recorded = record and device.type == "cuda" and ranks.world == 1  # shares differ in size from step to step
    rates = [relative_rate * max(float(weight.detach().square().mean().sqrt()), 1e-4) for weight in parameters.values()]
    # A recorded step reads its rates from the GPU's memory.
    groups: list[dict[str, Any]] = [
        {"params": [weight], "lr": torch.tensor(rate, device=device) if recorded else rate}
        for weight, rate in zip(parameters.values(), rates)
    ]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=recorded or None, capturable=recorded)

    def step(index: int, rows: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total, own = torch.zeros((), device=device), ranks.own(rows)
        for part in own.split(max(1, len(own)) if at_once is None else at_once[index]) if len(own) else ():
            with torch.autocast(device.type, torch.bfloat16, enabled=half and device.type == "cuda"):
                output = forward(index, part)
            loss = (output - targets(index, part)).square().sum(-1).mean() * (len(part) / len(rows))
            loss.backward()
            total += loss.detach()
        if ranks.world > 1:
            for parameter in parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            ranks.sum_gradients([parameter.grad for parameter in parameters.values() if parameter.grad is not None])
        optimizer.step()
        return total

    order = list(islice(_shuffled(batches, torch.Generator().manual_seed(seed)), steps))
    advance: Callable[[int, Tensor], Tensor] = step
    if recorded:
        rows_on_device = torch.cat([rows for _, rows in order]).to(device).split([len(rows) for _, rows in order])
        order = [(index, rows) for (index, _), rows in zip(order, rows_on_device)]
        advance = _Recorded(step, device)
    recent: list[Tensor] = []
    with torch.enable_grad(), fast_products():
        for number, (index, rows) in enumerate(order):
            pace = 0.5 * (1 + math.cos(math.pi * number / steps)) * min(1.0, (number + 1) / WARM_UP)
            for group, rate in zip(optimizer.param_groups, rates):
                if recorded:
                    group["lr"].fill_(rate * pace)
                else:
                    group["lr"] = rate * pace
            recent = [*recent[-9:], advance(index, rows)]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    loss = float(ranks.sum(torch.stack(recent).mean()))
    if recorded:  # a recording's memory is of no use to anything else until it is given back
        del advance, recent
        torch.cuda.empty_cache()
    return loss


class _Recorded:
    """A step that is recorded once for each length of sequence and replayed from then on.

    Args:
        step: (index of a length, rows of its sequences) -> the loss; nothing in it may wait for the GPU.
        device: the GPU.
    """

    def __init__(self, step: Callable[[int, Tensor], Tensor], device: torch.device) -> None:
        self.step, self.device = step, device
        self.taken: dict[int, int] = {}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.stream = _side_stream(device)

    def __call__(self, index: int, rows: Tensor) -> Tensor:
        if index not in self.graphs:
            taken = self.taken[index] = self.taken.get(index, 0) + 1
            if taken != _UNRECORDED + 1 or not self._record(index, rows):
                return self._unrecorded(index, rows)
        graph, static, loss = self.graphs[index]
        static.copy_(rows)
        graph.replay()
        return loss.clone()

    def _unrecorded(self, index: int, rows: Tensor) -> Tensor:
        # On the stream that records later, since gradients remember the stream they were first added on.
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.step(index, rows)
        current.wait_stream(self.stream)
        return loss

    def _record(self, index: int, rows: Tensor) -> bool:
        """Record a step without taking it; False where the module waits for the GPU and so cannot be recorded."""
        static = rows.clone()
        recording = recording_of(lambda: self.step(index, static), self.stream)
        if recording is None:
            return False
        graph, loss = recording
        self.graphs[index] = graph, static, loss
        return True


@cache
def _side_stream(device: torch.device) -> Any:
    """One stream for all recordings, since libraries keep work space for each."""
    return torch.cuda.Stream(device)


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
