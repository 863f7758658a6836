"""Functions for the table entries of architectures with their own way to count KV heads, rotate, gate or scale."""

from __future__ import annotations

from typing import Any

from rehead.models.families.readers import windowed
from rehead.models.families.spec import Config, KeyNorm, head_dim

# ---- Falcon: three fused layouts, told apart by two switches.


def falcon_kv_heads(config: Config) -> int:
    """One under ``multi_query``, ``num_kv_heads`` under the new decoder, one for each query head otherwise."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def falcon_refusal(config: Config, kv: int) -> str | None:
    """Between 1 and all heads only the new decoder will do, and its block is parallel."""
    old = not config.new_decoder_architecture
    if old and kv not in (1, falcon_kv_heads(config)) and not config.parallel_attn:
        return (
            f"Falcon's class holds {kv} KV heads only in its new decoder, whose block is parallel, and this model's is "
            "serial; use --kv-heads 1"
        )
    return None


def set_falcon_kv(raw: dict[str, Any], kv: int) -> None:
    """Old decoders: ``multi_query`` for one head, the new decoder with a single shared norm for a number between."""
    heads = raw.get("num_attention_heads", raw.get("n_head"))
    if raw.get("new_decoder_architecture", False):
        raw["num_kv_heads"] = kv
    elif kv == 1:
        raw["multi_query"] = True
        if "num_kv_heads" in raw:
            raw["num_kv_heads"] = 1
    elif kv != heads:
        raw.update(new_decoder_architecture=True, num_kv_heads=kv, num_ln_in_parallel_attn=1)


def falcon_rotary(config: Config, layer: int) -> int:
    """RoPE unless the model uses ALiBi."""
    return 0 if config.alibi else head_dim(config)


def falcon_block(config: Config) -> str:
    """The new decoder is parallel; the old one by ``parallel_attn``."""
    return "parallel" if config.new_decoder_architecture or config.parallel_attn else "serial"


# ---- GPT-BigCode: one KV head or all of them.


def bigcode_kv_heads(config: Config) -> int:
    """One under ``multi_query``, one for each query head otherwise."""
    return 1 if config.multi_query else int(config.num_attention_heads)


def bigcode_refusal(config: Config, kv: int) -> str | None:
    """The class has a switch, not a count."""
    if kv in (1, int(config.num_attention_heads)):
        return None
    return f"GPT-BigCode's class holds one KV head or one for each query head, not {kv}; use --kv-heads 1"


def set_bigcode_kv(raw: dict[str, Any], kv: int) -> None:
    """``multi_query`` for one head, off for all of them."""
    raw["multi_query"] = kv == 1
    # Newer configs write the count beside the switch; transformers ignores it, vLLM reads it.
    if "num_key_value_heads" in raw:
        raw["num_key_value_heads"] = kv


# ---- Classes without a number of KV heads; another class, the host, replaces them.


def set_no_kv(raw: dict[str, Any], kv: int) -> None:
    """There is nothing to set: the class has no count, and its host's family sets its own."""


def one_head_refusal(config: Config, kv: int) -> str | None:
    """GPT-BigCode, which stands in for the model, has a switch for one KV head, not a count."""
    if kv in (1, int(config.num_attention_heads)):
        return None
    return f"its class holds no {kv} KV heads, and GPT-BigCode, which can stand in for it, one only; use --kv-heads 1"


# ---- DBRX: the count lies in attn_config.


def dbrx_kv_heads(config: Config) -> int:
    """``attn_config.kv_n_heads``."""
    return int(config.attn_config.kv_n_heads)


def set_dbrx_kv(raw: dict[str, Any], kv: int) -> None:
    """``attn_config.kv_n_heads = kv``."""
    raw["attn_config"] = {**(raw.get("attn_config") or {}), "kv_n_heads": kv}


# ---- Llama 4: keys are normed where they rotate, after the rotation.


def llama4_norm(config: Config, layer: int) -> KeyNorm:
    """An RMS norm without weight in the layers that rotate."""
    return "l2" if config.use_qk_norm and config.no_rope_layers[layer] else "none"


# ---- Laguna: the number of query heads may differ from layer to layer.


def laguna_refusal(config: Config, kv: int) -> str | None:
    """Only models whose layers have equally many query heads."""
    counts = set(getattr(config, "num_attention_heads_per_layer", None) or [config.num_attention_heads])
    if counts != {config.num_attention_heads}:
        return (
            "its layers differ in their number of query heads, which no single --kv-heads fits; nothing can be done yet"
        )
    return None


def laguna_fixed_values(config: Config) -> bool:
    """A gate for each head leaves V's basis free, one for each channel does not."""
    return not (config.gating is True or config.gating == "per-head")


# ---- Cohere 2 MoE: dense first layers may rotate with or without a window.


def cohere2_moe_rotary(config: Config, layer: int) -> int:
    """Sliding layers rotate, and dense prefix layers where the prefix's window pattern is 1."""
    forced = config.mlp_layer_types[layer] == "dense" and config.prefix_dense_sliding_window_pattern == 1
    return head_dim(config) if forced or windowed(config, layer) else 0


# ---- MiniMax-01, Beam: the residual stream is scaled in the layer's own way.


def minimax_scale(config: Config, layer: int) -> float:
    """``full_attn_beta_factor``; linear attention layers have their own."""
    return float(config.full_attn_beta_factor)


def beam_scale(config: Config, layer: int) -> float:
    """Depth-scaled residual additions: 1 / sqrt(2 (layer + 1))."""
    return (2.0 * (layer + 1)) ** -0.5
