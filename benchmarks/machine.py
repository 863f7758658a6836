"""What a benchmark ran on, for the head of its report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """Name of the GPU, its clock and power as found, or of the CPU; and versions.

    Args:
        device: where the benchmark runs; by default the current GPU, if there is one.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts: dict[str, Any] = {"device": _cpu(), "torch": torch.__version__}
    if device.type == "cuda":
        facts |= _gpu(device)
    for package in ("triton", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "device": properties.name,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl: Any = torch.cuda.nccl.version()
        facts["nccl"] = ".".join(map(str, nccl))
    try:
        facts["sm_clock_mhz"] = torch.cuda.clock_rate(device)
        facts["power_w"] = round(torch.cuda.power_draw(device) / 1000)
    except Exception:  # clocks need the management library, which is optional
        facts["sm_clock_mhz"] = None
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if "model name" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"


def headline(facts: dict[str, Any]) -> str:
    """Facts in one line."""
    return "  ".join(f"{name} {value}" for name, value in facts.items())
