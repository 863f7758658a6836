"""Attention computed from canonical :class:`~rehead.models.heads.Heads` alone: the reference for the table's claims.

Written from the definitions, with nothing taken from the model's classes but what is not the table's business: the
rotation's angles, the mask, the softmax's scale and the formula of an output gate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rehead.models.families.spec import Family
from rehead.models.heads import Heads

# Classes that rotate the other way round, which frees and pins the same things.
BACKWARDS = ("nanochat",)


def attention(
    family: Family, model: nn.Module, layer: int, heads: Heads, tensors: dict[str, Tensor], call: Any
) -> Tensor:
    """One layer's attention output [B, T, m] by the definitions.

    Args:
        heads: the layer's heads.
        tensors: the model's state, for the biases of norms that all heads share.
        call: what the real module was called with: ``hidden_states`` [B, T, n] and its keyword arguments.
    """
    config, module = model.config, model.get_submodule(family.prefix(layer)[:-1])
    x, kwargs = call
    q = _project(x, heads.q, heads.q_bias)
    k = _project(x, heads.k, heads.k_bias)
    v = _project(x, heads.v, heads.v_bias)
    bound = family.clip(config)
    if not family.norm_after_rotation:
        q, k = _normed(family, config, layer, heads, tensors, q, k)
    if bound is not None:
        q, k, v = (t.clamp(-bound, bound) for t in (q, k, v))
    assert heads.pairs is not None
    if len(heads.pairs):
        frequencies, stretch = rotation(family, model, layer)
        assert len(frequencies) == len(heads.pairs), "as many frequencies as rotary pairs"
        angles = torch.arange(x.shape[1])[:, None] * frequencies
        angles = -angles if family.model_type in BACKWARDS else angles
        q, k = (_rotate(t, heads.pairs, angles, stretch) for t in (q, k))
    if family.norm_after_rotation:
        q, k = _normed(family, config, layer, heads, tensors, q, k)
    k = k * getattr(config, "key_multiplier", 1.0) if family.model_type == "falcon_h1" else k
    if kwargs.get("attention_scaling") is not None:
        q = q * kwargs["attention_scaling"]
    k, v = (t.repeat_interleave(heads.group_size, dim=1) for t in (k, v))
    scores = q @ k.mT
    if kwargs.get("alibi") is not None:
        scores = scores + kwargs["alibi"].view(x.shape[0], heads.num_heads, 1, -1)
    scores = scores * scale(module, heads.head_dim)
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.full(scores.shape[-2:], -math.inf).triu(1)
    scores = scores + mask[..., : scores.shape[-1]]
    sinks = heads.extras.get("sinks", heads.extras.get("softmax_offset"))
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    mixed = gated(family, config, heads, x, weights @ v)
    out = torch.einsum("bhtd,mhd->btm", mixed, heads.o)
    return out if heads.o_bias is None else out + heads.o_bias


def scale(module: nn.Module, size: int) -> float:
    """The softmax's scale as the module keeps it."""
    if type(module).__name__ == "GPTNeoSelfAttention":
        return 1.0
    for key in ("scaling", "inv_norm_factor"):
        if hasattr(module, key):
            return float(getattr(module, key))
    return size**-0.5


def gated(family: Family, config: Any, heads: Heads, x: Tensor, mixed: Tensor) -> Tensor:
    """What a family does to the heads' outputs [B, H, T, D] before o_proj."""
    kind, extras = family.model_type, heads.extras
    if kind == "bitnet":
        flat = mixed.transpose(1, 2).flatten(2)
        flat = flat * (flat.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return flat.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2) * extras["attn_sub_norm.weight"][:, None]
    if "gate" in extras:
        return mixed * _project(x, extras["gate"], extras.get("gate_bias")).sigmoid()
    for name, function in (("gate_proj.weight", torch.sigmoid), ("g_proj.weight", torch.sigmoid)):
        if name in extras:
            gate = _project(x, extras[name], extras.get("gate_bias"))
            return mixed * (F.softplus(gate) if kind == "laguna" else function(gate))
    return mixed


def rotation(family: Family, model: nn.Module, layer: int) -> tuple[Tensor, float]:
    """RoPE's inverse frequencies of one layer and the factor on its cosines, from whatever module holds them."""
    kinds = getattr(model.config, "layer_types", None) or ["default"] * model.config.num_hidden_layers
    inside = list(model.get_submodule(family.prefix(layer)[:-1]).modules())
    for module in [*inside, *model.modules()]:
        for key in (f"{kinds[layer]}_", ""):
            if isinstance(getattr(module, key + "inv_freq", None), Tensor):
                return getattr(module, key + "inv_freq"), float(getattr(module, key + "attention_scaling", 1.0))
    for module in [*inside, *model.modules()]:  # GPT-J and CodeGen keep a table of sines and cosines
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor):
            sines, cosines = table[1].chunk(2)
            return torch.atan2(sines, cosines), 1.0
    raise AssertionError("the model has no rotary module")


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, T, n] through [H, D, n] to [B, H, T, D]."""
    out = torch.einsum("btn,hdn->bhtd", x, weight)
    return out if bias is None else out + bias[:, None]


def _rotate(t: Tensor, pairs: Tensor, angles: Tensor, stretch: float) -> Tensor:
    """Rotate each pair of dimensions of [B, H, T, D] by its angle [T, P] and stretch it."""
    real, imag = pairs.unbind(1)
    turned = torch.complex(t[..., real], t[..., imag]) * torch.polar(torch.full_like(angles, stretch), angles)
    out = t.clone()
    out[..., real], out[..., imag] = turned.real, turned.imag
    return out


def _normed(family: Family, config: Any, layer: int, heads: Heads, tensors: dict[str, Tensor], q: Tensor, k: Tensor):
    """Queries and keys after their norm, where there is one."""
    if heads.key_norm == "none":
        return q, k
    stems = [family.prefix(layer) + stem for stem in (family.names.query_norm, family.names.key_norm)]
    return (
        _norm(family, config, heads.key_norm, q, heads.q_norm, tensors.get(f"{stems[0]}.bias")),
        _norm(family, config, heads.key_norm, k, heads.k_norm, tensors.get(f"{stems[1]}.bias")),
    )


def _norm(family: Family, config: Any, kind: str, t: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Norm queries or keys [B, H, T, D]."""
    keys = ("layer_norm_eps", "rms_norm_eps", "norm_eps") if "layer" in kind else ("rms_norm_eps", "norm_eps")
    eps = next(float(getattr(config, key)) for key in keys if hasattr(config, key))
    if kind == "l2":
        return t * (t.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    assert weight is not None
    weight = weight + family.norm_offset
    if kind == "rms_span":
        size = t.pow(2).mean((1, 3), keepdim=True)
        return t * (size + eps).rsqrt() * weight[:, None]
    if kind == "rms":
        return t * (t.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight
    t = t - t.mean(-1, keepdim=True)
    t = t * (t.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    t = t * (weight[:, None] if kind == "layer_own" else weight)
    return t if bias is None else t + bias
