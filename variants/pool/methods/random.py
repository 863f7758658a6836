"""Random: key and value heads start from scratch (Ainslie et al. 2023, arXiv 2305.13245), as a control."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rehead.lazy import late
from rehead.models.heads import Heads
from rehead.variants.pool.methods.mean import averaged, kv_fields
from rehead.variants.pool.methods.registry import MethodContext, register

if TYPE_CHECKING:
    import torch
else:
    torch = late("torch")


@register("random", "draw new key and value heads from scratch, as a control (Ainslie et al. 2023)", any_dtype=True)
def random(heads: Heads, kv: int, context: MethodContext) -> Heads:
    """Draw key and value weights from N(0, initializer_range), biases zero; the same seed gives the same heads.

    Norm weights are averaged, since a fresh model would have them at one and the norm's scale is no head's own.
    """
    generator = torch.Generator().manual_seed(context.seed * 1_000_003 + context.layer)
    fresh: dict[str, Any] = {}
    for name, tensor in kv_fields(heads).items():
        shape = (kv, *tensor.shape[1:])
        if name in ("k", "v"):
            noise = torch.randn(shape, generator=generator, dtype=torch.float32)
            fresh[name] = noise.mul_(context.initializer_range).to(tensor.device)
        elif name.endswith("_bias"):
            fresh[name] = torch.zeros(shape, device=tensor.device)
        else:
            fresh[name] = averaged(tensor, kv)
    return replace(heads, **fresh)
