"""Phi as host: a parallel block behind one LayerNorm, partial RoPE in halves, a bias on everything, the head included.

GPT-NeoX has two norms where Phi has one; both see the same input, so their weights and biases fold into the matrices
that read them and what is left is the same. GPT-J and CodeGen rotate neighbouring dimensions, which change places.
"""

from __future__ import annotations

from torch import Tensor

from rehead.convert.hosts.rope import refuse_rope
from rehead.models.equivalent_heads import as_halves, fold_bias, fold_matrix, with_biases, with_norm_folded
from rehead.models.families.rope import rope_fields
from rehead.models.heads import Heads
from rehead.models.rewrite import Builder, Read, Rewrite


def host(build: Builder) -> Rewrite:
    """A GPT-NeoX with parallel blocks, a GPT-J or a CodeGen as Phi.

    Raises:
        UnsupportedError: serial blocks, or positions that Phi does not have.
    """
    return _gpt_neox(build) if build.source.model_type == "gpt_neox" else _gptj(build)


def _config(build: Builder) -> dict[str, object]:
    return build.base_config("PhiForCausalLM") | {
        "num_key_value_heads": build.config.num_attention_heads,
        "hidden_size": build.config.hidden_size,
        "num_hidden_layers": build.config.num_hidden_layers,
        "num_attention_heads": build.config.num_attention_heads,
        "max_position_embeddings": build.config.max_position_embeddings,
        "initializer_range": build.config.initializer_range,
        "qk_layernorm": False,
    }


def _head(build: Builder, old: str) -> None:
    if build.has(f"{old}.weight"):
        build.pair("lm_head", old, bias=True)
    elif build.has(f"{old}.bias"):
        build.copy("lm_head.bias", f"{old}.bias")
    else:  # tied: Phi's head has a bias all the same
        table = next(derived.sources[0] for name, derived in build.tensors.items() if "embed_tokens" in name)
        build.make("lm_head.bias", (table,), lambda weight: weight.new_zeros(weight.shape[0]))


def _gpt_neox(build: Builder) -> Rewrite:
    config, layers, root = build.config, build.source.layer, build.root
    if not config.use_parallel_residual:
        raise build.refuse("its blocks are serial and Phi's are parallel; use --host auto")
    refuse_rope(build, spanning=False)
    result = _config(build) | {
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        **rope_fields(config.rope_parameters, build.source.rotary_dims(config, 0), build.source.head_dim(config)),
    }
    build.copy("model.embed_tokens.weight", f"{root}embed_in.weight")

    def norm(layer: int) -> tuple[str, str]:
        stem = layers.format(i=layer) + "input_layernorm"
        return f"{stem}.weight", f"{stem}.bias"

    def change(heads: Heads, layer: int, read: Read) -> Heads:
        return with_biases(with_norm_folded(heads, *(read(name) for name in norm(layer))))

    step = build.attention(change, norm)
    build.rounds = True
    for layer in range(config.num_hidden_layers):
        old, new = layers.format(i=layer), build.target.layer.format(i=layer)
        first, second, up = f"{old}input_layernorm", f"{old}post_attention_layernorm", f"{old}mlp.dense_h_to_4h"
        build.make(f"{new}input_layernorm.weight", (f"{first}.weight",), _ones)
        build.make(f"{new}input_layernorm.bias", (f"{first}.bias",), _zeros)
        build.make(f"{new}mlp.fc1.weight", (f"{up}.weight", f"{second}.weight"), fold_matrix, rounds=True)
        build.make(f"{new}mlp.fc1.bias", (f"{up}.weight", f"{second}.bias", f"{up}.bias"), fold_bias, rounds=True)
        build.pair(f"{new}mlp.fc2", f"{old}mlp.dense_4h_to_h")
    build.pair("model.final_layernorm", f"{root}final_layer_norm")
    _head(build, "embed_out" if build.has("embed_out.weight") else "lm_head")
    return build.finish(result, step, r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$")


def _gptj(build: Builder) -> Rewrite:
    config, layers, root = build.config, build.source.layer, build.root
    size = build.source.head_dim(config)
    if not config.rotary_dim:
        raise build.refuse("its config names no rotary_dim, so it is not known which positions turn; fix config.json")
    if config.rotary_dim > size:
        raise build.refuse(f"its config turns {config.rotary_dim} dimensions of heads of {size}; fix config.json")
    result = _config(build) | {
        "intermediate_size": config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        "hidden_act": config.activation_function,
        "layer_norm_eps": config.layer_norm_epsilon,
        "resid_pdrop": config.resid_pdrop,
        "embd_pdrop": config.embd_pdrop,
        "attention_dropout": config.attn_pdrop,
        **rope_fields({"rope_theta": 10000.0}, config.rotary_dim, size),
    }
    build.copy("model.embed_tokens.weight", f"{root}wte.weight")
    step = build.attention(lambda heads, layer, read: with_biases(as_halves(heads)), lambda layer: ())
    for layer in range(config.num_hidden_layers):
        old, new = layers.format(i=layer), build.target.layer.format(i=layer)
        build.pair(f"{new}input_layernorm", f"{old}ln_1")
        build.pair(f"{new}mlp.fc1", f"{old}mlp.fc_in")
        build.pair(f"{new}mlp.fc2", f"{old}mlp.fc_out")
    build.pair("model.final_layernorm", f"{root}ln_f")
    _head(build, "lm_head")
    return build.finish(result, step, r"attn\.(masked_)?bias$|attn\.causal_mask$|embed_positions$")


def _ones(tensor: Tensor) -> Tensor:
    return tensor.new_ones(tensor.shape)


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)
