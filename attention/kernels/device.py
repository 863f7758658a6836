"""What launches of kernels ask about a GPU, and about integers that may stay on it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def device_number(item: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """(a pointer to per-batch integers, the step between them: 0 if all batch rows share one)."""
    if item is None:
        return unused, 0
    return item, 0 if item.numel() == 1 else item.reshape(-1).stride(0)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
