"""Latent attention of the DeepSeek kind, which goes through transformers' interface but expands all heads before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rehead.attention.adapters.registry import register_adapter
from rehead.attention.interface import NAME
from rehead.attention.latent import LATENT


@register_adapter("deepseek_v3.DeepseekV3Attention", "youtu.YoutuAttention")
def deepseek(module: nn.Module) -> dict[str, Any]:
    """DeepSeek V3 and Youtu: the latents reach the attention function as they are cached."""

    def expand_kv(self: Any, latents: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        if self.config._attn_implementation != NAME:  # another attention for a while
            return type(self).expand_kv(self, latents, shared)
        return latents, shared

    return {"expand_kv": expand_kv, LATENT: True}
