"""A pytest plugin: tiled attention under the name ``sdpa``, so that tests of transformers run with it."""

from __future__ import annotations

from typing import Any


def pytest_configure(config: Any) -> None:
    """Register tiled attention and its masks as ``sdpa``; pytest calls this before it collects."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from rehead.attention.interface import tiled_attention
    from rehead.attention.mask_function import tiled_mask

    AttentionInterface.register("sdpa", tiled_attention)
    AttentionMaskInterface.register("sdpa", tiled_mask)
