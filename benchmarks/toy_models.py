"""Tiny random models of two layers, one for each architecture and for some further configs, from transformers alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rehead.models.tiny import randomize

HIDDEN, HEADS, VOCAB = 64, 8, 96

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512,
    "sliding_window": 8, "attention_bias": True, "use_bias": True, "qkv_bias": True, "attention_out_bias": True,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 128,
    "mamba_n_groups": 1, "mamba_expand": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "query_pre_attn_scalar": 16,
}  # fmt: skip
"""What a config is set to, of those keys that its class knows."""

ROPE = {"rope_type": "default", "rope_theta": 1e4}
HALF_ROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}
FULL_ROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWS_UNROTATED = {**WINDOWS, "layer_rope_theta": [1e4, 0]}
WINDOWS_SPARSE = {**WINDOWS, "mlp_layer_types": ["dense", "sparse"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
GPT = {"n_positions": 512, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_inner": 48}
EXPERTS = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
OLD_FALCON = {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": HEADS}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("cohere2", "cwm", "dots1", "exaone4", "flint", "gemma2", "gemma3_text", "gpt_oss"), WINDOWS),
    **dict.fromkeys(("kolibri1", "ministral", "olmo3"), WINDOWS),
    **dict.fromkeys(("beam", "cohere2_moe", "exaone_moe", "laguna", "mellum"), WINDOWS_SPARSE),
    **dict.fromkeys(("granite_swa", "granitemoe_swa"), WINDOWS_UNROTATED),
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), HYBRID),
    **dict.fromkeys(("gpt_neox", "phi3"), HALF_ROPE),
    "afmoe": {**WINDOWS, "num_dense_layers": 1},
    "aria_text": EXPERTS,
    "bamba": {"attn_layer_indices": [1]},
    "bloom": {"n_layer": 2, "n_head": HEADS},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {"use_qk_norm": True},
    "dbrx": {
        "d_model": HIDDEN, "n_heads": HEADS, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.5, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": True, "bias": True, "ffn_hidden_size": 48},
    "glm4_moe": {"use_qk_norm": True},
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "multi_query": False},
    "gpt_neo": {"num_layers": 2, "num_heads": HEADS, "attention_types": [[["global"], 2]]},
    "gptj": {**GPT, "rotary_dim": 4},
    "granitemoehybrid": {**HYBRID, "position_embedding_type": "rope"},
    "helium": {"head_dim": HIDDEN // HEADS},
    "hunyuan_v1_moe": {"moe_topk": 2, "num_shared_expert": 1},
    "hy_v3": {"mlp_layer_types": ["dense", "sparse"]},
    "internlm3": {"bias": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "lfm2": CONVOLUTION,
    "lfm2_moe": {**CONVOLUTION, "num_dense_layers": 1},
    "lfm3": {**CONVOLUTION, "use_attention_gate": True},
    "llama4_text": {"no_rope_layers": [1, 0], "intermediate_size_mlp": 48, "moe_layers": [1]},
    "minimax": {**HYBRID, "block_size": 16, "rotary_dim": 8},
    "minimax_m2": {"rotary_dim": 8},
    "mpt": {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": 2, "max_seq_len": 512},
    "nemotron_h": {
        "layers_block_type": HYBRID["layer_types"], "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1,
        "ssm_state_size": 8,
    },
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5},
    "opt": {"ffn_dim": 48},
    "phi": {"qk_layernorm": True},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": HIDDEN},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    },
    "xglm": {"d_model": HIDDEN, "attention_heads": HEADS, "num_layers": 2, "ffn_dim": 48},
}  # fmt: skip
"""What a model type needs beside :data:`SIZES`, or instead of it."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere-plain": ("cohere", {"use_qk_norm": False}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "falcon-mha": ("falcon", OLD_FALCON),
    "falcon-mqa": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-rw": ("falcon", {**OLD_FALCON, "alibi": True, "parallel_attn": False}),
    "gpt_neox-full": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, **FULL_ROPE}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neo-local": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "laguna-channels": ("laguna", {"gating": "per-element"}),
    "llama-mha": ("llama", {"num_key_value_heads": HEADS, "attention_bias": False}),
    "phi-plain": ("phi", {"qk_layernorm": False}),
    "stablelm-plain": ("stablelm", {"qk_layernorm": False, "use_parallel_residual": True}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
"""Further configs of a type, by a name of their own."""


def type_of(name: str) -> str:
    """The model type of a name."""
    return VARIANTS.get(name, (name, {}))[0]


def known(name: str) -> bool:
    """Whether the installed transformers has the model type."""
    return type_of(name) in CONFIG_MAPPING


def build(name: str) -> Any:
    """A model of two layers in float32, every parameter random, norms and biases too."""
    kind, variant = VARIANTS.get(name, (name, {}))
    cls = CONFIG_MAPPING[kind]
    accepted = set(inspect.signature(cls.__init__).parameters) | set(cls.attribute_map)
    sizes = {key: value for key, value in SIZES.items() if key in accepted and kind != "t5"} | {"vocab_size": VOCAB}
    config = AutoConfig.for_model(kind, **copy.deepcopy(sizes | OVERRIDES.get(kind, {}) | variant))
    torch.manual_seed(0)
    auto: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    return randomize(model, scale=0.6, redraw=True)
