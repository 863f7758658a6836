"""Latent attention as transformers' own classes store it: ``deepseek_v3`` with dense layers only, and ``youtu``.

Both take any number of latent, rotary, other and value dimensions. Their RMS norm on the latent is a constant here (see
:func:`~rehead.variants.latent.gauge.into_lane`), which holds for its hard-wired eps of 1e-6. Engines read that eps from
``rms_norm_eps``, so a model with another one is scaled to it: all that is written to the residual stream times c, and
``mean (c h)^2 + c^2 eps`` has the same effect on c h as ``mean h^2 + eps`` on h.

The classes give queries no bias. Where a source has one, it goes through their low-rank query path, whose first matrix
has: identity with a one below, whose norm is a constant in the same way. That is exact, costs n^2 parameters a layer,
and transformers alone reads it: serving engines know no bias here (see :mod:`rehead.variants.latent.bias`).

llama.cpp takes these classes only with such a path (:func:`wants_two_factors`), so without a bias it may be had too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehead.errors import UnsupportedError, unknown_name
from rehead.models.heads import rotary_pairs
from rehead.variants.latent.gauge import NORM_EPS, into_lane, lane_weight
from rehead.variants.latent.heads import LatentHeads
from rehead.variants.latent.pairs import rope_fields

#: Host model types, the one that more engines serve first, and their classes.
HOSTS = {"deepseek_v3": "DeepseekV3ForCausalLM", "youtu": "YoutuForCausalLM"}

# Config keys that mean the same in a pre-norm decoder with RMSNorm and a gated FFN, and in the hosts.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "use_cache", "tie_word_embeddings", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version"),
)
# No layer of a converted model is a mixture of experts, but the class wants to know how one would look (llama.cpp: more
# experts than groups of them).
_NO_EXPERTS = {
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class StreamScale:
    """Factors that give a model the eps of the latent's norm.

    Attributes:
        writers: of the embedding, every output projection and every FFN's output (with their biases).
        final_norm: of the last norm's weight: undoes the embedding's factor where the head is tied to it.
    """

    writers: float
    final_norm: float


def stream_scale(rms_norm_eps: float, tied: bool, eps: float = NORM_EPS) -> StreamScale:
    """Factors for a model whose norms add ``rms_norm_eps``.

    Raises:
        UnsupportedError: the model's norms add nothing.
    """
    if not rms_norm_eps > 0:
        raise UnsupportedError(f"rms_norm_eps {rms_norm_eps}: the host's norms need one above 0")
    factor = (eps / rms_norm_eps) ** 0.5
    return StreamScale(factor, 1 / factor if tied else 1.0)


def latent_config(
    source: Mapping[str, Any],
    host: str,
    latent: LatentHeads,
    interleaved: bool = True,
    rope: Mapping[str, Any] | None = None,
    two_factors: bool = False,
) -> dict[str, Any]:
    """Raw ``config.json`` of the converted model.

    Args:
        source: the source's config with every default filled in.
        host: a key of :data:`HOSTS`.
        latent: any converted layer; all have the same sizes.
        interleaved: rotary dimensions in turns of real and imaginary, which is the only order that vLLM knows.
        rope: the source's ``rope_parameters``, for frequencies that are no geometric series.
        two_factors: queries go through two matrices, as they always do with a bias.

    Raises:
        UnsupportedError: there is no such host, or it has no place for something of the source.
    """
    if host not in HOSTS:
        raise UnsupportedError(unknown_name("host", host, HOSTS))
    _refuse(source, host, latent)
    biased = _query_bias(latent) is not None
    config: dict[str, Any] = {key: source[key] for key in _SHARED if source.get(key) is not None or key.endswith("_id")}
    config |= {
        "architectures": [HOSTS[host]],
        "model_type": host,
        "num_key_value_heads": latent.num_heads,
        "rms_norm_eps": NORM_EPS,
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.down.shape[1] + biased if biased or two_factors else None,
        "qk_rope_head_dim": latent.rope_dim,
        "qk_nope_head_dim": latent.nope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": interleaved,
        "attention_bias": is_biased(latent),
        "rope_parameters": (fields := rope_fields(latent.frequencies, rope)),
        "rope_theta": fields["rope_theta"],
    }
    if host == "deepseek_v3":
        experts = {"first_k_dense_replace": source["num_hidden_layers"]}
        config |= _NO_EXPERTS | experts | {"moe_intermediate_size": source["intermediate_size"]}
    return config


def wants_two_factors(engine: str | None, layers: int, vocabulary: int) -> bool:
    """Whether an engine loads these classes only if queries go through two matrices.

    llama.cpp takes models without for DeepSeek's small ones, which it knows by their number of layers.
    """
    return engine == "llama.cpp" and layers not in (26, 27) and (layers, vocabulary) != (48, 128256)


def layer_tensors(
    latent: LatentHeads,
    prefix: str,
    dtype: torch.dtype,
    interleaved: bool = True,
    writers: float = 1.0,
    two_factors: bool = False,
) -> dict[str, Tensor]:
    """One layer's attention tensors as the hosts store them.

    Args:
        latent: float64 or float32.
        prefix: name of the attention module with a dot at its end.
        dtype: to store them in.
        interleaved: as in :func:`latent_config`.
        writers: :attr:`StreamScale.writers`.
        two_factors: as in :func:`latent_config`.
    """
    order = _rope_order(latent.rope_dim, interleaved, latent.rope.device)
    down, norm = into_lane(latent.down, lane_weight(dtype))
    tensors = _queries(latent, order, dtype, two_factors) | {
        "kv_a_proj_with_mqa.weight": torch.cat([down, latent.rope[order]]),
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": torch.cat([latent.key_up, latent.value_up], 1).flatten(0, 1),
        "o_proj.weight": latent.o.flatten(1) * writers,
    }
    if is_biased(latent):
        down_bias, rope_bias, o_bias = (
            like.new_zeros(len(like)) if bias is None else bias
            for bias, like in (
                (latent.down_bias, latent.down),
                (latent.rope_bias, latent.rope),
                (latent.o_bias, latent.o),
            )
        )
        small = into_lane(down_bias, lane_weight(dtype))[0]
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat([small, rope_bias[order]])
        tensors["o_proj.bias"] = o_bias * writers
    return {prefix + name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def is_biased(latent: LatentHeads) -> bool:
    """Whether its checkpoint has biases on attention projections, which serving engines do not read."""
    rest = (latent.down_bias, latent.rope_bias, latent.o_bias)
    return any(bias is not None for bias in rest) or _query_bias(latent) is not None


def _query_bias(latent: LatentHeads) -> tuple[Tensor, Tensor] | None:
    still, turning = latent.q_nope_bias, latent.q_rope_bias
    if still is None or turning is None:
        return None
    return still, turning


def _queries(latent: LatentHeads, order: Tensor, dtype: torch.dtype, two_factors: bool) -> dict[str, Tensor]:
    """The query path: one matrix, or two where there is a bias or they are asked for."""
    # The class divides by the root of its own head size.
    gain = latent.scaling * (latent.nope_dim + latent.rope_dim) ** 0.5
    weight = (torch.cat([latent.q_nope, latent.q_rope[:, order]], 1) * gain).flatten(0, 1)
    bias = _query_bias(latent)
    if bias is None and not two_factors:
        return {"q_proj.weight": weight}
    width, lane = weight.shape[1], lane_weight(dtype)
    small = 2.0 ** math.floor(math.log2(NORM_EPS**0.5 / lane))  # a power of two: inputs pass without rounding
    through = torch.zeros(width + (bias is not None), width, dtype=weight.dtype, device=weight.device)
    through.fill_diagonal_(small)
    tensors = {"q_a_proj.weight": through}
    if bias is not None:
        column = (torch.cat([bias[0], bias[1][:, order]], 1) * gain).flatten()
        weight = torch.cat([weight, column[:, None]], 1)
        tensors["q_a_proj.bias"] = through.new_zeros(width + 1)
        tensors["q_a_proj.bias"][-1] = small
    return tensors | {
        "q_a_layernorm.weight": torch.full_like(through[:, 0], lane),
        "q_b_proj.weight": weight * (NORM_EPS**0.5 / (small * lane)),
    }


def _rope_order(size: int, interleaved: bool, device: torch.device) -> Tensor:
    """Old index of each stored rotary row: real parts first, or in turns."""
    order = torch.arange(size, device=device)
    return order if not interleaved else rotary_pairs("half", size).flatten().to(device)


def _refuse(source: Mapping[str, Any], host: str, latent: LatentHeads) -> None:
    reason = None
    if source.get("mlp_bias"):
        reason = "its FFN has biases"
    elif (source.get("sliding_window") and source.get("use_sliding_window", True)) or any(
        source.get("layer_windows", ())
    ):
        reason = "its attention has windows"
    elif latent.rope_dim % 2 or not latent.rope_dim:
        reason = "its shared key does not rotate"
    if reason:
        raise UnsupportedError(
            f"{source.get('model_type', 'the model')}: {reason}, for which {host} has no place; keep it a live patch"
        )
