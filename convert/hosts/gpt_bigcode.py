"""GPT-BigCode as host: a serial block with LayerNorm, biases and learned positions, for one KV head or all of them.

GPT-2 is the same block with its matrices the other way round. OPT and BioGPT number their positions from two, XGLM
computes its own, and all three (with GPT-Neo) keep queries, keys and values apart; where embeddings are scaled, the
scale goes into the table, and a head tied to it gets a table of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rehead.models.equivalent_heads import with_biases, with_queries_scaled
from rehead.models.heads import Heads
from rehead.models.rewrite import Builder, Read, Rewrite

_OFFSET = 2  # rows before the first position in OPT's and BioGPT's tables


@dataclass(frozen=True)
class _Layout:
    """Where a source keeps what GPT-BigCode has, below the root or the layer, and under which config keys."""

    table: str = "embed_tokens"
    positions: str | None = "embed_positions"
    final_norm: str = "final_layer_norm"
    first_norm: str = "self_attn_layer_norm"
    second_norm: str = "final_layer_norm"
    up: str = "fc1"
    down: str = "fc2"
    transposed: bool = False
    offset: int = _OFFSET
    head: str = "lm_head"
    act: str = "activation_function"
    dropouts: tuple[str, str, str] = ("dropout", "dropout", "attention_dropout")  # residual, embedding, attention
    spread: str = "init_std"
    epsilon: str | None = None  # None: LayerNorm's own default
    inner: str = "ffn_dim"


_GPT = _Layout(
    table="wte",
    positions="wpe",
    final_norm="ln_f",
    first_norm="ln_1",
    second_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    offset=0,
    spread="initializer_range",
    epsilon="layer_norm_epsilon",
)
_LAYOUTS = {
    "gpt2": replace(_GPT, transposed=True, dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"), inner="n_inner"),
    "gpt_neo": replace(
        _GPT, dropouts=("resid_dropout", "embed_dropout", "attention_dropout"), inner="intermediate_size"
    ),
    "opt": _Layout(),
    "biogpt": _Layout(
        final_norm="layer_norm",
        head="output_projection",
        act="hidden_act",
        dropouts=("hidden_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        spread="initializer_range",
        inner="intermediate_size",
    ),
    "xglm": _Layout(positions=None, final_norm="layer_norm"),
}
#: OPT alone counts positions by the attention mask; ``generate`` hands them over, a bare forward pass does not.
_PADDED = "rows padded on the left need position_ids, which OPT works out of the mask itself"
# Switches of a source that GPT-BigCode lacks, and what they would change.
_SWITCHES = {
    "scale_attn_by_inverse_layer_idx": "scales each layer's attention by its index",
    "reorder_and_upcast_attn": "computes attention scores in another order and precision",
    "add_cross_attention": "adds cross-attention",
    "_remove_final_layer_norm": "leaves the final norm out",
}


def host(build: Builder) -> Rewrite:
    """A GPT-2, GPT-Neo, OPT, BioGPT or XGLM as GPT-BigCode.

    Raises:
        UnsupportedError: a switch that GPT-BigCode lacks, an activation that transformers lacks, norms behind the
            sublayers, local attention, or a tensor that has no place in the result.
    """
    _refuse(build)
    config, kind = build.config, build.source.model_type
    layout = _LAYOUTS[kind]
    root = build.root + ("decoder." if kind == "opt" else "")
    scale = math.sqrt(config.hidden_size) if getattr(config, "scale_embedding", False) else 1.0
    table = f"{root}{layout.table}.weight"
    if scale == 1.0:
        build.copy("transformer.wte.weight", table)
    else:
        build.make("transformer.wte.weight", (table,), lambda rows: rows * scale, rounds=True)
    if layout.positions is None:
        build.make("transformer.wpe.weight", (table,), lambda rows: _sinusoids(config, rows), rounds=True)
    elif layout.offset:
        old = f"{root}{layout.positions}.weight"
        build.make("transformer.wpe.weight", (old,), lambda rows: rows[layout.offset :].contiguous())
    else:
        build.copy("transformer.wpe.weight", f"{root}{layout.positions}.weight")
    step = _layers(build, layout)
    build.pair("transformer.ln_f", root + layout.final_norm)
    own_head = build.has(f"{layout.head}.weight")
    if own_head:
        build.copy("lm_head.weight", f"{layout.head}.weight")
    elif scale != 1.0:
        build.copy("lm_head.weight", table)
    result = _config(build, layout)
    if scale != 1.0:
        result["tie_word_embeddings"] = False
    rewrite = build.finish(result, step, r"attn\.(attention\.)?(masked_)?bias$|embed_positions\.weights$")
    return replace(rewrite, facts={"note": _PADDED}) if kind == "opt" else rewrite


def _refuse(build: Builder) -> None:
    from transformers.activations import ACT2FN

    config, kind = build.config, build.source.model_type
    for switch, effect in _SWITCHES.items():
        if getattr(config, switch, False):
            raise build.refuse(f"{switch} {effect}, which GPT-BigCode, its host, cannot; give a {kind} without it")
    act = getattr(config, _LAYOUTS[kind].act)
    if act not in ACT2FN:
        raise build.refuse(f"transformers has no activation {act!r}; fix {_LAYOUTS[kind].act}")
    if not getattr(config, "do_layer_norm_before", True):
        raise build.refuse("it norms behind its sublayers and GPT-BigCode before them; give an OPT other than 350m")
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise build.refuse("it projects its embeddings, which GPT-BigCode does not; give an OPT other than 350m")
    if not getattr(config, "layer_norm_elementwise_affine", True):
        raise build.refuse("its norms have no weights and GPT-BigCode's do; give a model whose norms have some")
    if "local" in getattr(config, "attention_layers", ()):
        raise build.refuse(
            f"some of its layers attend to {config.window_size} positions only and all of GPT-BigCode's to every one; "
            "give a model whose attention_types are all global"
        )


def _config(build: Builder, layout: _Layout) -> dict[str, object]:
    config = build.config
    residual, embedding, attention = (getattr(config, key) for key in layout.dropouts)
    return build.base_config("GPTBigCodeForCausalLM") | {
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": getattr(config, layout.inner),
        "activation_function": getattr(config, layout.act),
        "resid_pdrop": residual,
        "embd_pdrop": embedding,
        "attn_pdrop": attention,
        "layer_norm_epsilon": 1e-5 if layout.epsilon is None else getattr(config, layout.epsilon),
        "initializer_range": getattr(config, layout.spread),
        "scale_attn_weights": getattr(config, "scale_attn_weights", True),
        "multi_query": False,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    }


def _layers(build: Builder, layout: _Layout):
    # GPT-Neo does not scale its logits. Engines scale GPT-BigCode's whatever its config says: queries make up for it.
    unscaled = build.source.model_type == "gpt_neo"
    factor = math.sqrt(build.source.head_dim(build.config)) if unscaled else 1.0
    build.rounds |= unscaled and math.frexp(factor)[0] != 0.5

    def change(heads: Heads, layer: int, read: Read) -> Heads:
        heads = with_biases(heads)
        return with_queries_scaled(heads, factor) if unscaled else heads

    step = build.attention(change, lambda layer: ())
    for layer in range(build.config.num_hidden_layers):
        old, new = build.source.layer.format(i=layer), build.target.layer.format(i=layer)
        build.pair(f"{new}ln_1", old + layout.first_norm)
        build.pair(f"{new}ln_2", old + layout.second_norm)
        build.pair(f"{new}mlp.c_fc", old + layout.up, layout.transposed, bias=True)
        build.pair(f"{new}mlp.c_proj", old + layout.down, layout.transposed, bias=True)
    return step


def _sinusoids(config: object, like: Tensor) -> Tensor:
    """XGLM's positions [max_position_embeddings, n]: sines, then cosines, of frequencies from 1 down to 1/10000.

    Its table zeroes the row numbered as the padding token, which is a real position unless that token is below two.
    """
    count, width = int(config.max_position_embeddings), like.shape[1]  # type: ignore[attr-defined]
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
    angles = torch.arange(_OFFSET, _OFFSET + count).float()[:, None] * frequencies
    rows = torch.cat([angles.sin(), angles.cos(), torch.zeros(count, width - 2 * half)], 1)
    padding = config.pad_token_id  # type: ignore[attr-defined]
    if padding is not None and _OFFSET <= padding < _OFFSET + count:
        rows[padding - _OFFSET] = 0
    return rows.to(like.device, like.dtype)
