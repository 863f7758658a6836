"""The device that a model runs on."""

from __future__ import annotations

import torch

from rehead.errors import UsageError, first_line


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        UsageError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: cannot be used ({first_line(error)}); choose cpu or auto") from None
    return device
