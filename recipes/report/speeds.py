"""Speed beside the original's, pooled over every measurement of models of one shape.

A model's speed is decided by its shapes, not by how its weights came about: a conversion before and after uptraining,
or by another method, is the same measurement again. Headline, table and plot all take their factors from here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rehead.recipes.report.facts import Summary
from rehead.recipes.report.wording import count, times


@dataclass(frozen=True)
class SpeedFactor:
    """Throughput over the original's, at one size.

    Attributes:
        shape: of the models (:attr:`rehead.recipes.report.facts.Summary.shape`); cache: bytes of their cache.
        phase: ``prefill`` or ``decode``.
        batch, context: the size.
        factor: the median of the measurements.
        low, high: from the lowest to the highest end of their intervals; None where none has any.
        measurements: evaluations that it comes from.
    """

    shape: tuple[Any, ...]
    cache: float | None
    phase: str
    batch: int
    context: int
    factor: float
    low: float | None
    high: float | None
    measurements: int

    @property
    def differs(self) -> bool:
        """Whether the spread tells the speed from the original's."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    def phrase(self) -> str:
        """``"decoding at ×1.32 the original's speed (×1.25 to ×1.40, batch 8, 2,048 tokens of context)"``."""
        what = "decoding" if self.phase == "decode" else "prefill"
        at = f"batch {self.batch}, {count(self.context)} tokens of context"
        if self.low is None or self.high is None:
            return f"{what} at {times(self.factor)} the original's speed (one measurement without a spread; {at})"
        spread = f"{times(self.low)} to {times(self.high)}"
        if self.measurements > 1:
            spread += f" over {self.measurements} measurements"
        if not self.differs:
            return f"no difference in {what} speed that could be measured ({spread}; {at})"
        return f"{what} at {times(self.factor)} the original's speed ({spread}; {at})"


def speed_factors(summaries: Sequence[Summary]) -> list[SpeedFactor]:
    """Every size that a model and its original were both measured at; the sizes of the cache from large to small."""
    groups: dict[tuple[Any, ...], list[tuple[float, float | None, float | None]]] = {}
    for summary in summaries:
        for item in summary.speed:
            if item.factor is not None:
                place = (summary.shape, summary.kv_bytes, item.phase, item.batch, item.context)
                groups.setdefault(place, []).append((item.factor, item.factor_low, item.factor_high))
    factors = []
    for (shape, cache, phase, batch, context), found in groups.items():
        lows, highs = [low for _, low, _ in found if low is not None], [high for *_, high in found if high is not None]
        factors.append(
            SpeedFactor(
                shape, cache, phase, batch, context, statistics.median(factor for factor, *_ in found),
                min(lows, default=None), max(highs, default=None), len(found),
            )
        )  # fmt: skip
    return sorted(factors, key=lambda each: (-(each.cache or 0), each.phase, each.batch, each.context))


def headline_speed(summary: Summary, everything: Sequence[Summary]) -> SpeedFactor | None:
    """The largest size at which decoding was measured, where a small cache counts; None without one."""
    decode = [one for one in speed_factors(everything) if one.shape == summary.shape and one.phase == "decode"]
    return max(decode, key=lambda one: one.batch * one.context, default=None)
