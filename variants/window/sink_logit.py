"""The sink logit of each head, in closed form: one more term of the softmax's denominator for what the window hides.

The first tokens of a text take much attention and hold little, so what a window loses of them is a factor (Xiao et al.
2023, arXiv 2309.17453). With a logit b beside kept keys of log-sum-exp L, the kept output o_in becomes
``sigmoid(L - b) o_in``; b is what brings that nearest to the whole output o over the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.healing.moments import Batch, Moment, moment
from rehead.variants.window.classes import OFF

LOW, HIGH, STEP = -30.0, 30.0, 0.25
WORTH = 0.5
"""The most error that a logit may leave of a head's without one where sink tokens are kept too. What is lost then is no
sink, and the logit shrinks all that the head gives, its mean too, which later layers count on: logits that took little
error away raised SmolLM2's divergence by a third."""
WORTHS = (1.0, WORTH, 0.25)
"""What is tried where the whole model says which is best."""


def worth(sinks: int) -> float:
    """The share of a head's error that its logit may leave beside so many sink tokens."""
    return WORTH if sinks else 1.0


def grid(like: Tensor) -> Tensor:
    """The logits that errors are added up at, [N]."""
    return torch.arange(LOW, HIGH + STEP / 2, STEP, dtype=like.dtype, device=like.device)


def errors(whole: Tensor, kept: Tensor, lse: Tensor, metric: Tensor | None = None) -> Tensor:
    """The sum of ``|whole - sigmoid(lse - b) kept|^2`` over rows, and its derivative in b, [H, N, 2] at :func:`grid`.

    Args:
        whole: attention to all keys, [b, H, R, D].
        kept: attention to the kept keys, [b, H, R, D].
        lse: log-sum-exp of the kept keys' scores, [b, H, R]; -inf where there is none.
        metric: quadratic form of errors by head, [H, D, D]; the identity when None.
    """
    flat = [part.transpose(0, 1).flatten(1, 2).double() for part in (whole, kept)]
    reading = flat if metric is None else [part @ metric.double() for part in flat]
    cross, square = (reading[0] * flat[1]).sum(-1), (reading[1] * flat[1]).sum(-1)
    constant = (reading[0] * flat[0]).sum(-1)
    level = lse.transpose(0, 1).flatten(1).double().clamp_min(LOW - 60)
    rows = []
    for b in grid(level):
        share = torch.sigmoid(level - b)
        error = (constant - 2 * share * cross + share.square() * square).sum(-1)
        slope = (2 * share * (1 - share) * (cross - share * square)).sum(-1)
        rows.append(torch.stack([error, slope], -1))
    return torch.stack(rows, 1)


def best(sums: Tensor, share: float = 1.0) -> Tensor:
    """The logit of each head with the least error, float64 [H]; :data:`OFF` where none is best or worth it.

    Args:
        sums: of :func:`errors` over batches, or their mean, [H, N, 2].
        share: of the error without a logit, which it must bring the error below; see :data:`WORTH`.
    """
    sums = sums.double().cpu()
    points, error, slope = grid(sums), sums[..., 0], sums[..., 1]
    at = error.argmin(-1)
    rows = torch.arange(len(at))
    # The least error lies where the slope changes sign, on one side of the best point.
    other = torch.where(slope[rows, at] > 0, at - 1, at + 1).clamp(0, len(points) - 1)
    first, second = slope[rows, at], slope[rows, other]
    step = torch.where(first * second < 0, first / (first - second), torch.zeros_like(first))
    logits = points[at] + step * (points[other] - points[at])
    kept = (error[rows, at] < share * error[:, 0]) & (at > 0)
    return torch.where(kept, logits, torch.full_like(logits, OFF))


@moment("sink_logit")
class SinkLogit(Moment):
    """:func:`errors` of a window's sink logit at every point of the grid, [H, N, 2].

    Named ``sink_logit:WINDOW:SINKS``; the metric is that of the output projection.
    """

    per = "head"

    def __init__(self, groups: int, *numbers: int) -> None:
        super().__init__(groups)
        self.window, self.sinks = numbers

    def add(self, batch: Batch) -> None:
        assert batch.seen is not None
        seen, values = batch.seen, batch.seen.values.float()
        p, scores = seen.probabilities, seen.masked.float()
        place = torch.arange(p.shape[-1], device=p.device)
        kept = (seen.rows[:, None] - place < self.window) | (place < self.sinks)
        inside = scores.masked_fill(~(kept & seen.visible), float("-inf"))
        heads = values.repeat_interleave(p.shape[1] // values.shape[1], 1)
        metric = torch.einsum("mhd,mhe->hde", batch.output, batch.output)
        lse = inside.logsumexp(-1)
        sums = errors(p @ heads, inside.softmax(-1).nan_to_num(0.0) @ heads, lse, metric)
        self.sums(*sums.shape, like=sums).add_(sums)
        self.count(p.shape[0] * p.shape[2])
