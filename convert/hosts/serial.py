"""What the two hosts of serial GPT-NeoX models share: every tensor but the norms' weights is only renamed."""

from __future__ import annotations

from typing import Any

from rehead.models.equivalent_heads import with_biases
from rehead.models.rewrite import Builder


def common_config(build: Builder, architecture: str) -> dict[str, Any]:
    """Config keys of a serial rotary decoder.

    Raises:
        UnsupportedError: the blocks are parallel.
    """
    config = build.config
    if config.use_parallel_residual:
        raise build.refuse(f"its blocks are parallel and {build.target.model_type}'s are serial; use --host phi")
    return build.base_config(architecture) | {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": config.attention_dropout,
    }


def common_tensors(build: Builder, up: str, down: str) -> Any:
    """Everything but the norms; returns the layer step."""
    root = build.root
    build.copy("model.embed_tokens.weight", f"{root}embed_in.weight")
    step = build.attention(lambda heads, layer, read: with_biases(heads), lambda layer: ())
    for layer in range(build.config.num_hidden_layers):
        old, new = build.source.layer.format(i=layer), build.target.layer.format(i=layer)
        build.pair(f"{new}mlp.{up}", f"{old}mlp.dense_h_to_4h")
        build.pair(f"{new}mlp.{down}", f"{old}mlp.dense_4h_to_h")
    head = "embed_out" if build.has("embed_out.weight") else "lm_head"
    if build.has(f"{head}.weight"):
        build.copy("lm_head.weight", f"{head}.weight")
    return step


def norms(build: Builder) -> list[tuple[str, str]]:
    """(new, old) names of every norm."""
    pairs = [("model.norm", f"{build.root}final_layer_norm")]
    for layer in range(build.config.num_hidden_layers):
        old, new = build.source.layer.format(i=layer), build.target.layer.format(i=layer)
        pairs += [(new + name, old + name) for name in ("input_layernorm", "post_attention_layernorm")]
    return pairs


BUFFERS = r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$"
