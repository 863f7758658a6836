"""How far two models' predictions are from each other: the one place where logits are compared.

Softmax and sums are in float64, whatever the models compute in. They cost little beside a forward pass, and divergences
of 1e-6 nats, as a careful conversion or another attention kernel leaves, are then measurements rather than rounding.
Logits are taken a few rows at a time (see :mod:`rehead.models.predictions`), so memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from rehead.models.predictions import Predictions

#: Bytes of the float64 numbers in one step of a sum: cache-sized on a CPU, large enough to fill a GPU.
_STEP_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Distances:
    """How two models differ on N tokens; each field [N], on the CPU.

    Attributes:
        kl: float64, KL(reference || other) in nats, the direction in which a student learns from a teacher.
        agree: bool, whether both predict the same most likely token.
        difference: float64, the largest difference of two logits; infinite where one is NaN.
        reference_nll, nll: float64, negative log-likelihood of the target token under each in nats; empty without
            targets.
    """

    kl: Tensor
    agree: Tensor
    difference: Tensor
    reference_nll: Tensor
    nll: Tensor

    @classmethod
    def cat(cls, parts: list[Distances]) -> Distances:
        """Several texts' tokens, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, kept: Tensor) -> Distances:
        """Some of the tokens, by a bool mask [N] or an index."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Distances(*(part[kept] if len(part) else part for part in parts))

    @property
    def mean_kl(self) -> float:
        """Mean divergence, nats per token."""
        return float(self.kl.mean())

    @property
    def top1_agreement(self) -> float:
        """Share of tokens at which both predict the same most likely token."""
        return float(self.agree.double().mean())

    @property
    def largest(self) -> float:
        """The largest difference of two logits; 0 for no tokens."""
        return float(self.difference.max()) if len(self.difference) else 0.0


Judgement = Literal["usable", "uptrain first", "broken"]
#: Most nats per token and least agreement of a model that is usable as it is, and of one that uptraining recovers.
USABLE, RECOVERABLE = (0.1, 0.85), (2.0, 0.3)


RULE = (
    f"usable: KL of at most {USABLE[0]:g} nats per token, and the same most likely token at {USABLE[1]:.0%} of "
    f"positions or more; uptrain first: at most {RECOVERABLE[0]:g} nats, and at {RECOVERABLE[1]:.0%} or more; "
    "broken: beyond that"
)
"""The rule of :func:`judged` as a sentence, to be printed beside its word."""


def judged(kl: float, agreement: float | None = None) -> Judgement:
    """What a model is good for, from how far it is from the original on running text: the one rule for it.

    ``usable``: at most 0.1 nats per token, about a tenth more perplexity, and the same most likely token at 85% of
    positions or more. ``broken``: more than 2 nats, or the same at less than 30%: little is left to recover, and a
    better conversion costs less than training. ``uptrain first``: what lies between.

    Args:
        kl: mean divergence from the original, nats per token.
        agreement: share of positions with the same most likely token, where it is known.
    """

    def within(limits: tuple[float, float]) -> bool:
        return kl <= limits[0] and (agreement is None or agreement >= limits[1])

    return "usable" if within(USABLE) else "uptrain first" if within(RECOVERABLE) else "broken"


def distances(reference: Predictions | Tensor, other: Predictions | Tensor, targets: Tensor | None = None) -> Distances:
    """Compare two models' next-token distributions; equal logits give a divergence of exactly 0.

    Args:
        reference: the original model's logits, N tokens with V each, in any dtype and any leading dimensions.
        other: the changed model's logits, of the same shape.
        targets: the N true next tokens, int64 in any dimensions.
    """
    kl, agree, difference, first, second = [], [], [], [], []
    right = None if targets is None else targets.flatten()
    at = 0
    for a, b in _steps(reference, other):
        a, b = _wide(a), _wide(b)
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        agree.append(a.argmax(-1) == b.argmax(-1))
        difference.append(_gap(a, b))
        if right is not None:
            index = right[at : at + len(a), None].to(a.device)
            first.append(-log_p.gather(-1, index)[:, 0])
            second.append(-log_q.gather(-1, index)[:, 0])
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p)
        # Tokens that both rule out (logits of minus infinity) count as 0, and rounding must not make a sum negative.
        kl.append(torch.where(p == 0, 0.0, terms).sum(-1).clamp_min(0))
        at += len(a)
    wide = [_joined(part).double() for part in (kl, difference, first, second)]
    return Distances(wide[0], _joined(agree).bool(), *wide[1:])


def difference(a: Predictions | Tensor, b: Predictions | Tensor) -> float:
    """The largest difference of two tensors or predictions of the same shape; infinite where one is NaN."""
    gaps = [_gap(_wide(x), _wide(y)).max() for x, y in _steps(a, b) if x.numel()]
    # Python's max() would ignore NaN.
    return float(torch.stack(gaps).max()) if gaps else 0.0


def largest(predictions: Predictions | Tensor) -> float:
    """The largest finite magnitude of any logit."""
    tops = [piece.abs().nan_to_num(0, 0, 0).max() for (piece,) in _steps(predictions) if piece.numel()]
    return float(torch.stack(tops).max()) if tops else 0.0


def token_nll(predictions: Predictions | Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods of the target tokens in nats, float64 [N] on the CPU.

    Args:
        predictions: N tokens with V logits each.
        targets: the N true next tokens, int64 in any dimensions.
    """
    right, losses, at = targets.flatten(), [], 0
    for (piece,) in _steps(predictions):
        index = right[at : at + len(piece), None].to(piece.device)
        losses.append(-_wide(piece).log_softmax(-1).gather(-1, index)[:, 0])
        at += len(piece)
    return _joined(losses).double()


def _steps(*sides: Predictions | Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching rows of several predictions, ``[n, V]`` each, on the device of the first."""
    parts = [Predictions.of(side if isinstance(side, Predictions) else torch.atleast_2d(side)) for side in sides]
    if len({(part.rows, part.vocabulary) for part in parts}) > 1:
        raise ValueError(f"predictions of different shapes: {[(part.rows, part.vocabulary) for part in parts]}")
    # One side's pieces may be larger than another's.
    rows = min(part.rows_at_once() for part in parts)
    for start in range(0, parts[0].rows, rows):
        pieces = [part.piece(start, start + rows) for part in parts]
        device = pieces[0].device
        size = _STEP_BYTES.get(device.type, _STEP_BYTES["cuda"])
        step = max(1, size // (8 * max(1, pieces[0].shape[-1])))
        yield from zip(*(piece.to(device).split(step) for piece in pieces))


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference in each row, [n]."""
    # Models with capped vocabularies give minus infinity on both sides.
    return torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=math.inf).amax(-1)


def _wide(logits: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).cpu() if parts else torch.empty(0)
