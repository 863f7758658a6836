"""What launches of kernels ask about a GPU, and about integers that may stay on it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import time

import torch
from torch import Tensor

logger = logging.getLogger("rehead.attention")

ALONE = "REHEAD_GPU_ALONE"
"""Set to 1, this process is taken to be alone on its GPUs."""
_LOOK_AGAIN = 5.0
_last: dict[torch.device, tuple[float, bool]] = {}


def device_number(item: Tensor | None, unused: Tensor) -> tuple[Tensor, int]:
    """(a pointer to per-batch integers, the step between them: 0 if all batch rows share one)."""
    if item is None:
        return unused, 0
    return item, 0 if item.numel() == 1 else item.reshape(-1).stride(0)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def alone(device: torch.device) -> bool:
    """Whether this process is the only one that computes on a GPU, as far as the driver says; looks every 5 seconds.

    Where the driver cannot be asked, or lists no processes (as in some containers), the answer is yes.
    """
    if os.environ.get(ALONE) == "1":
        return True
    now, (looked, answer) = time.monotonic(), _last.get(device, (-_LOOK_AGAIN, True))
    if now - looked < _LOOK_AGAIN:
        return answer
    found = _processes(device) < 2
    if answer and not found:
        logger.warning(
            "%s: another process computes on it too, so attention takes the general kernels; the Hopper kernels have "
            "given wrong results there (%s=1 takes them all the same)", device, ALONE
        )  # fmt: skip
    _last[device] = (now, found)
    return found


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """NVIDIA's management library, which comes with every driver; None without one."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def _processes(device: torch.device) -> int:
    """How many processes compute on a GPU; 0 where nobody says."""
    driver, handle, count = _driver(), ctypes.c_void_p(), ctypes.c_uint(0)
    if driver is None:
        return 0
    try:
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if driver.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) != 0:
            return 0
        # Without room for their list, the call fails and says how long the list is.
        driver.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), None)
    except AttributeError:  # a driver that is older than the call
        return 0
    return count.value
