"""What a CUDA graph wants of whoever captures it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def warm_up(step: Callable[[], object], times: int = 3) -> None:
    """Run a step on a stream of its own, so that what it allocates and compiles at first is there before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)
