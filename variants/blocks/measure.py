"""How far off a changed block is: layer by layer, and for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rehead.errors import UsageError
from rehead.models import probing
from rehead.models.predictions import predict
from rehead.patches import measure
from rehead.patches.patch import LayerRecord
from rehead.variants.blocks.anatomy import Block, first_tensor

ROWS = 2
"""Sequences in one forward pass."""


@dataclass
class BlockMeasure(measure.Measure):
    """How far a model with changed blocks is from the original.

    Attributes:
        layers: layer index -> relative error of the block's output, on the inputs that the original gives it:
            ``|changed - original| / |original|`` over all tokens.
        updates: the same as a share of what the block adds to its input, which the stream does not hide.
        tokens: how many were measured on.
    """

    layers: dict[int, float] = field(default_factory=dict)
    updates: dict[int, float] = field(default_factory=dict)
    tokens: int = 0


def batches(input_ids: Tensor, model: nn.Module | None = None, rows: int = ROWS) -> list[Tensor]:
    """``[B, S]`` in pieces of at most ``rows`` sequences; otherwise as :func:`probing.checked_tokens`."""
    return list(probing.checked_tokens(input_ids, model).split(rows))


def calibration_tokens(tokenizer: Any, tokens: int = 4096, length: int = 512) -> Tensor:
    """Token ids ``[tokens // length, length]`` of the text that ships with Rehead, spread evenly over it.

    Args:
        tokenizer: the model's own.
        tokens: how many in all; at least one sequence.
        length: of a sequence.
    """
    from rehead.data.calibration import built_in_text

    text = built_in_text()
    count = max(1, tokens // length)
    stride, size, rows = len(text) // count, 10 * length, []
    for start in range(0, count * stride, stride):
        ids = tokenizer(text[start : start + min(size, len(text))]).input_ids[:length]
        if len(ids) == length:
            rows.append(ids)
    if not rows:
        raise UsageError(f"the built-in text gives no sequence of {length} tokens; ask for shorter ones")
    return torch.tensor(rows)


@torch.no_grad()
def block_errors(
    model: nn.Module, pairs: Sequence[tuple[Block, LayerRecord]], input_ids: Tensor
) -> tuple[dict[int, float], dict[int, float]]:
    """Relative errors of redirected blocks' outputs on the inputs that the *original* model gives them.

    Args:
        model: a model whose blocks are redirected, not fused.
        pairs: each changed block with the record that switches it.
        input_ids: int ``[B, S]``.

    Returns:
        (layer -> share of the output, layer -> share of what the block adds).
    """
    sums = {block.index: torch.zeros(3, dtype=torch.float64) for block, _ in pairs}
    now = [(record, record.now) for _, record in pairs]
    handles = []

    def compare(block: Block, record: LayerRecord, changed: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            original, given = first_tensor(output), kwargs.get("hidden_states", args[0] if args else None)
            record.now, calls = changed, record.calls
            try:
                # The layer's own forward, past this hook.
                other = first_tensor(module.forward(*args, **kwargs))
            finally:
                record.now, record.calls = record.was, calls
            assert original is not None
            assert other is not None
            assert isinstance(given, Tensor)
            first, second, x = original.double(), other.double(), given.double()
            values = [(second - first).square().sum(), first.square().sum(), (first - x).square().sum()]
            sums[block.index] += torch.stack(values).cpu()

        return hook

    try:
        for record, _ in now:
            record.now = record.was
        for (block, record), (_, changed) in zip(pairs, now):
            handles.append(block.layer.register_forward_hook(compare(block, record, changed), with_kwargs=True))
        for part in batches(input_ids):
            predict(model, {"input_ids": part})
    finally:
        for handle in handles:
            handle.remove()
        for record, changed in now:
            record.now = changed
    share = {index: float((s[0] / s[1].clamp_min(1e-30)).sqrt()) for index, s in sums.items()}
    update = {index: float((s[0] / s[2].clamp_min(1e-30)).sqrt()) for index, s in sums.items()}
    return share, update
