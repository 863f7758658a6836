"""AdamW whose moments have 8 bits in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861), from torchao.

Where one card holds all of a model's weights, gradients and moments, the moments are the largest part. In 8 bits they
take a quarter of the room; what trains keeps its float32 masters.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rehead.errors import UsageError


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> torch.optim.Optimizer:
    """The optimiser, its moments there and zero.

    Args:
        groups: as an optimiser takes them.
        betas, epsilon: AdamW's.

    Raises:
        UsageError: torchao is not installed.
    """
    logging.disable(logging.WARNING)  # torchao names every kernel that it does without
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UsageError('--optimizer adamw-8bit: needs torchao; run pip install "rehead[8bit]"') from None
    finally:
        logging.disable(logging.NOTSET)
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=betas, eps=epsilon)
    # Moments are made in a first step; one without gradients and rate makes them and moves nothing.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"].zero_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
        optimizer.state[parameter]["step"].zero_()
    return optimizer


def tensors_of(moment: Any) -> Mapping[str, Tensor]:
    """What a moment consists of, by the ending of its name: itself, or its codes and scales where it has 8 bits."""
    return {".codes": moment.codes, ".scale": moment.scale} if hasattr(moment, "codes") else {"": moment}
