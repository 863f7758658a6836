"""A GPU's work, recorded once and replayed (CUDA graphs), where kernels are too small for Python to launch in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def record(step: Callable[[], T], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, T] | None:
    """What a step launches, recorded without being run.

    Args:
        step: has run on ``stream`` before, since what libraries choose or compile at first cannot be recorded.
        stream: the one that records. ``torch.cuda.graph`` would empty the caches first, which takes half a second.

    Returns:
        The recording and the step's result, whose memory each replay fills; None where the step waits for the GPU,
        which cannot be recorded.
    """
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        try:
            graph.capture_begin()
            try:
                result = step()
            finally:
                graph.capture_end()
        except RuntimeError:
            _end_recording(stream.device)
            return None
    return graph, result


def _end_recording(device: torch.device) -> None:
    """Draw random numbers on the GPU again: after a failed recording its generator refuses to, until one succeeds."""
    torch.cuda.synchronize(device)
    number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin()
        number.add_(1)
        graph.capture_end()
