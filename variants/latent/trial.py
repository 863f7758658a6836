"""How a cache is best split between rotary pairs and latent: a short fit of a few layers tells.

The split that loses least in closed form is not the one that loses least after a fit: a fit makes up for pairs that
have stopped turning, not for a latent that is too narrow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rehead.healing.fit import fit_attention
from rehead.variants.latent.heads import LatentHeads
from rehead.variants.latent.module import RECOVERY, LatentAttention

#: One in so many sequences is not fitted but judges.
_HELD_OUT = 8


@torch.no_grad()
def trial(latent: LatentHeads, inputs: Tensor, outputs: Tensor, steps: int, seed: int = 0) -> float:
    """Relative squared error of a layer on sequences that it was not fitted on.

    Args:
        latent: the layer in closed form.
        inputs: what the original's attention reads, [N, S, n]. outputs: what it adds, [N, S, m].
        steps: of the fit; 0 judges the closed form.
        seed: of the order of the sequences.
    """
    module = LatentAttention(latent)
    held = max(1, len(inputs) // _HELD_OUT)
    fitted = max(1, len(inputs) - held)
    assert RECOVERY.tokens is not None
    assert RECOVERY.rate is not None
    fit_attention(
        dict(module.named_parameters()),
        lambda index, rows: module(inputs[rows])[0],
        lambda index, rows: outputs[rows],
        steps,
        [(fitted, max(1, min(fitted, RECOVERY.tokens // inputs.shape[1])))],
        seed,
        RECOVERY.rate,
        record=inputs.is_cuda,
        half=RECOVERY.half,
    )
    gap = size = 0.0
    for x, y in zip(inputs[-held:], outputs[-held:]):
        gap += float((module(x[None])[0][0] - y).square().sum())
        size += float(y.square().sum())
    return gap / max(size, 1e-30)
