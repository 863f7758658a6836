"""Tiny random models of every architecture in the table, made from transformers' own classes.

Every weight is random, norm weights and biases too, so that nothing hides behind ones and zeros.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rehead.models.families.spec import Family
from rehead.models.families.table import FAMILIES
from rehead.models.tiny import randomize

LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB = 2, 64, 8, 4, 96

# What every config is given, of those keys that it knows.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "attention_bias": True,
    "use_bias": True,
    "qkv_bias": True,
    "attention_out_bias": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # state-space and linear-attention layers of hybrids
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

HYBRID = ["linear_attention", "full_attention"]
WINDOWS = ["sliding_attention", "full_attention"]

GPT = {"n_positions": 128, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": 48}

# What a model type needs beside it, or instead of it.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": WINDOWS, "num_dense_layers": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"layer_types": WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"layer_types": WINDOWS},
    "cohere2_moe": {"layer_types": WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    "cwm": {"layer_types": WINDOWS},
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 1e3, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"layer_types": WINDOWS},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone4": {"layer_types": WINDOWS},
    "exaone_moe": {"layer_types": WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    "falcon": {"num_kv_heads": KV_HEADS, "new_decoder_architecture": True, "bias": True, "ffn_hidden_size": 48},
    "flint": {"layer_types": WINDOWS},
    "gemma2": {"layer_types": WINDOWS, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": WINDOWS, "query_pre_attn_scalar": 16},
    "glm4_moe": {"use_qk_norm": True},
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "multi_query": False},
    "gpt_neo": {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global"], LAYERS]]},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt_oss": {"layer_types": WINDOWS},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite_swa": {"layer_types": WINDOWS, "layer_rope_theta": [1e4, 0]},
    "granitemoe_swa": {"layer_types": WINDOWS, "layer_rope_theta": [1e4, 0]},
    "granitemoehybrid": {"layer_types": HYBRID, "position_embedding_type": "rope"},
    "helium": {"head_dim": HIDDEN // HEADS},
    "hunyuan_v1_moe": {"moe_topk": 2, "num_shared_expert": 1},
    "hy_v3": {"mlp_layer_types": ["dense", "sparse"]},
    "internlm3": {"bias": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "kolibri1": {"layer_types": WINDOWS},
    "laguna": {"layer_types": WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"], "use_attention_gate": True},
    "llama4_text": {"no_rope_layers": [1, 0], "intermediate_size_mlp": 48, "moe_layers": [1]},
    "mellum": {"layer_types": WINDOWS, "mlp_layer_types": ["dense", "sparse"]},
    "minimax": {"layer_types": HYBRID, "block_size": 16, "rotary_dim": 8},
    "minimax_m2": {"rotary_dim": 8},
    "ministral": {"layer_types": WINDOWS},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
    },
    "olmo": {"clip_qkv": 1e3},
    "olmo3": {"layer_types": WINDOWS},
    "olmo_hybrid": {"layer_types": HYBRID},
    "olmoe": {"clip_qkv": 1e3},
    "opt": {"ffn_dim": 48},
    "phi": {"qk_layernorm": True},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": HIDDEN},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xglm": {"d_model": HIDDEN, "attention_heads": HEADS, "num_layers": LAYERS, "ffn_dim": 48},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
}

# Further configs of a type that its one tiny model does not reach, by a name of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-mha": ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": HEADS}),
    "falcon-mqa": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-rw": (
        "falcon",
        {
            "new_decoder_architecture": False,
            "multi_query": False,
            "num_kv_heads": HEADS,
            "alibi": True,
            "parallel_attn": False,
        },
    ),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-full": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt_bigcode-mqa": ("gpt_bigcode", {"multi_query": True}),
    "llama-mha": ("llama", {"num_key_value_heads": HEADS, "attention_bias": False}),
    "phi-plain": ("phi", {"qk_layernorm": False}),
    "stablelm-plain": ("stablelm", {"qk_layernorm": False, "use_parallel_residual": True}),
    "cohere-plain": ("cohere", {"use_qk_norm": False}),
    "laguna-channels": ("laguna", {"gating": "per-element"}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
}

# Variants whose queries, keys and values are really clamped: no change of basis commutes with that, so nothing planted
# in one comes out exact.
CLAMPED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo-clamped": ("olmo", {"clip_qkv": 0.5}),
    "olmoe-clamped": ("olmoe", {"clip_qkv": 0.5}),
    "dbrx-clamped": ("dbrx", {"attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 0.5, "rope_theta": 1e4}}),
}


def model_type_of(name: str) -> str:
    """The model type of a model type or variant."""
    return (VARIANTS | CLAMPED).get(name, (name, {}))[0]


def available(name: str) -> bool:
    """Whether the installed transformers knows the model type."""
    return model_type_of(name) in CONFIG_MAPPING


def family_of(name: str) -> Family:
    """The family of a model type or variant; skips the test where the installed transformers lacks it."""
    if not available(name):
        pytest.skip("not in the installed transformers")
    return FAMILIES[model_type_of(name)]


def tiny_config(name: str, **overrides: Any) -> Any:
    """A config of two layers for a model type or a variant."""
    model_type, variant = (VARIANTS | CLAMPED).get(name, (name, {}))
    cls = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "attribute_map", {}))
    values = {key: value for key, value in COMMON.items() if key in known}
    values |= OVERRIDES.get(model_type, {}) | variant | overrides
    return AutoConfig.for_model(model_type, **values)


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A model of :func:`tiny_config` in float32 and eval mode, every parameter random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), attn_implementation="eager")
    return randomize(model, seed, scale=0.6, redraw=True).float().eval()


def save_tiny(name: str, folder: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Save :func:`tiny_model` as a safetensors checkpoint and return its folder."""
    tiny_model(name, seed, **overrides).save_pretrained(folder)
    return Path(folder)


#: Two sequences of twelve tokens.
IDS = torch.arange(24).view(2, 12) * 7 % VOCAB


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """A model's logits, without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def loaded(folder: Path) -> Any:
    """A model loaded as anybody would; nothing may be missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()
