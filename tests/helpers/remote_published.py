"""Tiny checkpoints in layouts that came with remote code, and the reference that each is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from remote_reference import (
    HEADS,
    HIDDEN,
    INNER,
    SIZE,
    VOCAB,
    Tensors,
    baichuan,
    baichuan_shapes,
    falcon,
    falcon_shapes,
    glm,
    glm_shapes,
    internlm,
    internlm2,
    internlm2_shapes,
    internlm_shapes,
    phi,
    phi_shapes,
    qwen,
    qwen_shapes,
)
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Published:
    """One layout: its config, the shapes of its tensors, and its function from tokens [S] to logits [S, V]."""

    config: dict[str, Any]
    shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]
    logits: Callable[[dict[str, Any], Tensors, Tensor], Tensor]
    host: str


def write(folder: Path, name: str, **changes: Any) -> tuple[dict[str, Any], Tensors]:
    """Write a random checkpoint of a layout, float32, with two layers; returns its config and tensors."""
    config = {**PUBLISHED[name].config, **changes}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in PUBLISHED[name].shapes(config).items():
        norm = "norm" in key or ".ln" in key or "ln_" in key
        draw = torch.randn(shape, generator=generator)
        tensors[key] = 1 + 0.1 * draw if norm and key.endswith("weight") else 0.2 * draw
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return config, tensors


def reference(name: str, config: dict[str, Any], tensors: Tensors, tokens: Tensor) -> Tensor:
    """Logits [S, V] of tokens [S]."""
    return PUBLISHED[name].logits(config, {key: value.double() for key, value in tensors.items()}, tokens)


_CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
_GLM_CONFIG: dict[str, Any] = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": _CODE, "hidden_size": HIDDEN,
    "num_layers": 2, "num_attention_heads": HEADS, "kv_channels": SIZE, "ffn_hidden_size": INNER,
    "padded_vocab_size": VOCAB, "vocab_size": VOCAB, "seq_length": 128, "layernorm_epsilon": 1e-5,
    "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "add_bias_linear": False,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "original_rope": True, "post_layer_norm": True,
    "rmsnorm": True, "quantization_bit": 0, "pre_seq_len": None, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False, "use_cache": True, "torch_dtype": "float32",
}  # fmt: skip
_LLAMA_CONFIG: dict[str, Any] = {
    "auto_map": _CODE, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_CONFIG: dict[str, Any] = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "auto_map": _CODE, "hidden_size": HIDDEN,
    "intermediate_size": 2 * INNER, "num_hidden_layers": 2, "num_attention_heads": HEADS, "kv_channels": SIZE,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 64, "no_bias": True,
    "max_position_embeddings": 128, "use_dynamic_ntk": True, "use_logn_attn": True, "scale_attn_weights": True,
    "vocab_size": VOCAB, "tie_word_embeddings": False,
}  # fmt: skip
_PHI_CONFIG: dict[str, Any] = {
    "model_type": "phi-msft", "architectures": ["PhiForCausalLM"], "auto_map": _CODE, "n_embd": HIDDEN, "n_layer": 2,
    "n_head": HEADS, "n_head_kv": None, "n_inner": None, "rotary_dim": 4, "n_positions": 128, "vocab_size": VOCAB,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
_FALCON_CONFIG: dict[str, Any] = {
    "architectures": ["RWForCausalLM"], "auto_map": _CODE, "alibi": False, "bias": False, "hidden_size": HIDDEN,
    "n_head": HEADS, "n_layer": 2, "layer_norm_epsilon": 1e-5, "vocab_size": VOCAB, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "apply_residual_connection_post_layernorm": False, "bos_token_id": 11, "eos_token_id": 11,
}  # fmt: skip

PUBLISHED: dict[str, Published] = {
    "chatglm2": Published(_GLM_CONFIG, glm_shapes, glm, "glm"),
    "chatglm-mha": Published({**_GLM_CONFIG, "multi_query_attention": False}, glm_shapes, glm, "glm"),
    "glm4": Published({**_GLM_CONFIG, "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}, glm_shapes, glm, "glm"),
    "baichuan": Published(
        {**_LLAMA_CONFIG, "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]},
        baichuan_shapes,
        baichuan,
        "llama",
    ),
    "baichuan2": Published(
        {**_LLAMA_CONFIG, "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"]},
        baichuan_shapes,
        baichuan,
        "llama",
    ),
    "internlm": Published(
        {**_LLAMA_CONFIG, "model_type": "internlm", "bias": True}, internlm_shapes, internlm, "llama"
    ),
    "internlm2": Published(
        {
            **_LLAMA_CONFIG,
            "model_type": "internlm2",
            "bias": False,
            "num_key_value_heads": 2,
            "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        internlm2_shapes,
        internlm2,
        "llama",
    ),
    "qwen": Published(_QWEN_CONFIG, qwen_shapes, qwen, "qwen2"),
    "phi": Published(_PHI_CONFIG, phi_shapes, phi, "phi"),
    "falcon-7b": Published(
        {**_FALCON_CONFIG, "model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True},
        falcon_shapes,
        falcon,
        "falcon",
    ),
    "falcon-40b": Published(
        {**_FALCON_CONFIG, "model_type": "RefinedWeb", "n_head_kv": 2}, falcon_shapes, falcon, "falcon"
    ),
}
