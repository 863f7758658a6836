"""Bootstrap intervals over windows.

Tokens of one window share their context and so depend on one another: resampling tokens would make intervals far too
narrow. Whole windows are drawn with replacement instead (a block bootstrap, Künsch 1989), and figures of two models are
taken from the same draws, so that what makes a text hard for both cancels in their ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Fewer windows than this say nothing about how much windows differ.
MIN_WINDOWS = 8
LEVEL = 0.95


def interval(
    statistic: Callable[..., Array], *sums: Array, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """A percentile interval of a function of sums over windows.

    Args:
        statistic: takes one float64 [R] for each of ``sums`` and gives [R].
        sums: float64 [W] each: what each window contributes (summed losses, counts, ...).
        resamples: R, draws.
        seed: of the draws.

    Returns:
        (low, high) at 95%, or None for fewer windows than :data:`MIN_WINDOWS`.
    """
    count = len(sums[0])
    if count < MIN_WINDOWS:
        return None
    draw = np.random.default_rng(seed)
    # How often each window is drawn, a block of resamples at a time to bound memory.
    block = max(1, min(resamples, (32 << 20) // (8 * count)))
    totals: list[list[Array]] = [[] for _ in sums]
    for at in range(0, resamples, block):
        weights = draw.multinomial(count, np.full(count, 1 / count), size=min(block, resamples - at)).astype(np.float64)
        for total, values in zip(totals, sums):
            total.append(weights @ values)
    found = statistic(*(np.concatenate(total) for total in totals))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
