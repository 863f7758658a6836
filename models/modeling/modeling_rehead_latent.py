"""Latent attention beside layers that have heads: a token's keys and values are read out of one small latent.

The file travels beside a checkpoint, with ``modeling_rehead_window.py``, whose models have such layers where
``config.layer_latents`` says so. A token caches its latent and one rotated key that all heads share (multi-head latent
attention, DeepSeek-AI 2024, arXiv 2405.04434), without norms in between.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from .modeling_rehead_cache import NAMES, passed_cache


class LatentAttention(nn.Module):
    """One layer's attention over latents.

    Shapes: H query heads, D numbers of a head, R of the latent, P rotary pairs, n input width.

    Args:
        like: the attention that it stands in for, as transformers' class has it.
        layer: the layer's index, which is its index in the cache.
        sizes: ``rank`` R, ``pairs``, the indices of the rotary pairs that the shared key keeps, and ``biases``, the
            names of those that are there.

    Attributes:
        down: [R, n], makes the latent. rope: [2P, n], makes the shared key, the real parts first.
        q_nope: [H, D, n], queries to the latent. q_rope: [H, 2P, n], queries to the shared key.
        key_up, value_up: [H, D, R], keys and values of the latent.
        o_proj: the output projection.
    """

    def __init__(self, like: Any, layer: int, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = like.config, layer, like.head_dim
        self.scaling, self.is_causal, self.num_key_value_groups = like.scaling, True, 1
        weight = like.o_proj.weight
        width, heads, rank = weight.shape[0], weight.shape[1] // like.head_dim, sizes["rank"]
        turning, biases = 2 * len(sizes["pairs"]), sizes.get("biases") or []
        shapes = {
            "down": (rank, width), "rope": (turning, width), "q_nope": (heads, like.head_dim, width),
            "q_rope": (heads, turning, width), "key_up": (heads, like.head_dim, rank),
            "value_up": (heads, like.head_dim, rank),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(weight.new_empty(shape)))
            if f"{name}_bias" in biases:
                self.register_parameter(f"{name}_bias", nn.Parameter(weight.new_zeros(shape[:-1])))
        self.o_proj = nn.Linear(weight.shape[1], width, "o_bias" in biases, weight.device, weight.dtype)
        self.pairs: list[int] = list(sizes["pairs"])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the attention's output ``[B, S, n]``, its probabilities where the implementation gives any)."""
        cache = passed_cache(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*NAMES, "cache_position")}
        cos, sin = (angles[..., self.pairs] for angles in position_embeddings)
        latent = self._linear(hidden_states, "down")
        shared = _rotated(self._linear(hidden_states, "rope"), cos, sin)
        still = self._linear(hidden_states, "q_nope").transpose(1, 2)
        turning = _rotated(self._linear(hidden_states, "q_rope").transpose(1, 2), cos[:, None], sin[:, None])
        latent, shared = latent[:, None], shared[:, None]
        if cache is not None:
            latent, shared = cache.update(latent, shared, self.layer_idx)
        implementation = self.config._attn_implementation
        absorbed = hidden_states.shape[1] == 1 and implementation == "rehead_window"
        if absorbed:  # one token: the latents are read as they are cached
            still = torch.einsum("bhsd,hdr->bhsr", still, self.key_up)
            keys, values = latent, latent
        else:
            keys = torch.einsum("bzsr,hdr->bhsd", latent, self.key_up)
            values = torch.einsum("bzsr,hdr->bhsd", latent, self.value_up)
        query = torch.cat([still, turning], -1)
        key = torch.cat([keys, shared.expand(-1, keys.shape[1], -1, -1)], -1)
        # Kernels that know one width for all three need zeros, which change nothing.
        padded = F.pad(values, (0, key.shape[-1] - values.shape[-1]))
        self.num_key_value_groups = query.shape[1] // key.shape[1]
        attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[implementation]
        mixed, weights = attend(self, query, key, padded, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        mixed = mixed[..., : values.shape[-1]]
        if absorbed:
            mixed = torch.einsum("bshr,hdr->bshd", mixed, self.value_up)
        return self.o_proj(mixed.flatten(2)), weights

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Inputs ``[B, S, n]`` times one of the weights: ``[B, S, R]`` or ``[B, S, H, D]``."""
        weight, bias = self._parameters[name], self._parameters.get(f"{name}_bias")
        assert weight is not None
        flat = F.linear(x, weight.flatten(0, -2), None if bias is None else bias.flatten())
        return flat.unflatten(-1, weight.shape[:-1])


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """States ``[..., S, 2P]``, real parts first, turned by angles whose cosines and sines are ``[..., S, P]``."""
    real, imaginary = states.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
