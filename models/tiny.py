"""Small sizes of every config field, and random weights, for proofs on tiny models of any class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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

LISTS = ("layer_types", "attention_layers", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types")
"""Per-layer lists: one layer of every kind is kept, so that no kind goes untried."""


def randomize(model: nn.Module, seed: int | None = 0, scale: float = 1.5, redraw: bool = False) -> nn.Module:
    """Random weights for a model, in place; by default large enough that attention differs and a lost mask shows.

    Args:
        model: of any class.
        seed: of the numbers; torch's own generator when None.
        scale: of matrices, relative to what keeps the size of their input.
        redraw: draw norms and biases too, norms around one; otherwise they are moved a little from what they are.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (scale * parameter.shape[-1] ** -0.5))
            elif not redraw:
                parameter.add_(0.1 * noise)
            elif "norm" in name or "ln_" in name:
                parameter.copy_(0.2 * noise + (0.1 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(0.3 * noise)
    return model
