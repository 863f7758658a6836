"""Tiny random models of any causal type in transformers, to test every architecture."""

from __future__ import annotations

import contextlib
import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rehead.errors import UnsupportedError, UsageError, unknown_name
from rehead.models.probing import config_value

LAYERS = 2

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "d_model": 64, "n_embd": 64, "n_embed": 64, "emb_dim": 64, "dim": 64,
    "embedding_size": 64, "cross_attention_hidden_size": 64, "word_embed_proj_dim": 64, "lm_hidden_dim": 64,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "num_blocks": LAYERS,
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "attention_head_dim": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "kv_channels": 16, "attention_hidden_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "ffn_hidden_size": 96, "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96, "dense_intermediate_size": 96, "intermediate_size_mlp": 96, "mlp_hidden_size": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32, "prefix_dense_intermediate_size": 96, "shared_intermediate_size": 32,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "num_experts_per_token": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_shared_experts": 1,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "max_sequence_length": 256, "n_ctx": 256,
    "original_max_position_embeddings": 256, "max_target_positions": 256, "max_source_positions": 256,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 12, "rotary_dim": 8, "sliding_window": 16, "attention_chunk_size": 16, "window_size": 16,
    "attention_window_size": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "mamba_n_heads": 4,
    "mamba_num_heads": 4, "mamba_d_head": 32, "mamba_head_dim": 32, "mamba_d_state": 8, "mamba_d_ssm": 128,
    "mamba_n_groups": 1, "state_size": 8, "ssm_state_size": 8, "mamba_dt_rank": 4, "n_groups": 1, "mamba_ngroups": 1,
    "n_mamba_heads": 2, "mamba_expand": 2, "mamba_chunk_size": 8, "chunk_size": 8, "lru_width": 64,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "num_kv_shared_layers": 0,
    "dim_model": 64, "dim_head": 16, "dim_ff": 96, "d_kv": 16, "d_ff": 96, "num_codebooks": 2, "block_size": 8,
    "adapter_rank": 4, "encoder_hash_byte_group_vocab": 64, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8, "hc_count": 2,
    "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1,
    "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "is_decoder": True, "image_size": 32, "patch_size": 8,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "resid_dropout": 0.0, "embed_dropout": 0.0,
}  # fmt: skip
"""Sizes by config name; a config takes those it has."""

INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
"""An indexer for models whose default config has none."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "topk_group": 1, "n_group": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need besides, by model type."""

WANTED = frozenset({"pad_token_id", "bos_token_id", "eos_token_id", "is_decoder", "head_dim", "num_key_value_heads"})
"""Sizes that are set although the default is None."""

DEPTHS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
"""Names of the layer count, which grows with the kinds of layers."""

LISTS = ("layer_types", "attention_layers", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types")
"""Per-layer lists: one layer of every kind is kept, so that no kind goes untried."""


def causal_types() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` can build."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _accepted(cls: type[PreTrainedConfig], config: PreTrainedConfig) -> set[str]:
    names = set(inspect.signature(cls.__init__).parameters) | set(config.to_dict()) | set(cls.attribute_map)
    computed = {name for name in names if isinstance(getattr(cls, cls.attribute_map.get(name, name), None), property)}
    return names - computed - {"self", "kwargs", "args"}


def _kinds(values: list[Any]) -> list[Any]:
    kept = list(dict.fromkeys(values))
    return kept if len(kept) >= LAYERS else (kept * LAYERS)[:LAYERS]


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of the type's own class with every size cut down.

    Args:
        model_type: as in ``config.model_type``.
        **overrides: further fields to set.

    Raises:
        UsageError: transformers has no such causal type.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(unknown_name("causal model type", model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return _shrink(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **overrides})


def _shrink(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    default = cls()
    accepted = _accepted(cls, default)
    fields: dict[str, Any] = {}
    for name in getattr(default, "sub_configs", None) or {}:
        current = config_value(default, name)
        if isinstance(current, PreTrainedConfig):
            own = overrides.pop(name, {}) if isinstance(overrides.get(name), dict) else {}
            fields[name] = _shrink(type(current), own).to_dict()
    depth = LAYERS
    for name in LISTS:
        values = config_value(default, name)
        if name in accepted and name not in cls.attribute_map and isinstance(values, (list, tuple)) and values:
            fields[name] = _kinds(list(values))
            depth = max(depth, len(fields[name]))
    for name in LISTS:
        if name in fields:
            fields[name] = (fields[name] * depth)[:depth]
    for name, size in SIZES.items():
        value = config_value(default, name)
        if name not in accepted or isinstance(value, (list, tuple, dict, PreTrainedConfig)):
            continue
        if value is None and name not in WANTED:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(size, float):
            size = int(size)
        fields[name] = depth if name in DEPTHS else size
    if "qk_rope_head_dim" in fields:
        # Latent attention calls the rotary part its head_dim, and has no grouped heads left once it is unfolded.
        fields |= {n: v for n, v in (("head_dim", 8), ("num_key_value_heads", 4)) if n in fields}
    fields.update(overrides)
    return cls(**fields)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that attention scores differ and a lost mask shows; in place."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=gen, dtype=torch.float32)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (1.5 * parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(0.1 * noise)
    return model


@contextlib.contextmanager
def _quiet() -> Any:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _build(config: PreTrainedConfig, extra: dict[str, Any]) -> nn.Module:
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(cls, tuple):
        cls = cls[0]
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        # The mapping names the decoder of a larger model; it takes the decoder's part of the config.
        config = config.get_text_config(decoder=True)
        return cls._from_config(config, dtype=torch.float32, **extra)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **extra)


def tiny_model(model_type: str, attn_implementation: str | None = None, **overrides: Any) -> nn.Module:
    """A two-layer random model of a causal type, in float32 and evaluation mode.

    Args:
        model_type: as in ``config.model_type``.
        attn_implementation: passed on to transformers.
        **overrides: config fields.

    Raises:
        UsageError: no such type.
        UnsupportedError: transformers cannot build it that small, with its reason.
    """
    with _quiet():
        try:
            config = tiny_config(model_type, **overrides)
            torch.manual_seed(0)
            extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            model = _build(config, extra)
        except UsageError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UnsupportedError(f"{model_type} cannot be built tiny ({reason})") from error
    return randomize(model).eval()
