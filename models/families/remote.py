"""Layouts of models that were published with remote code, and the class of transformers that computes the same.

An entry is data: which config keys say what, which tensors hold what, and under which settings no class of transformers
computes the same function. :mod:`rehead.models.remote` applies it; the remote code itself is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rehead.models.families.rope import rope_fields
from rehead.models.families.spec import Family, Names

Raw = Mapping[str, Any]


def _nothing(raw: Raw) -> None:
    return None


def _never(raw: Raw) -> bool:
    return False


@dataclass(frozen=True)
class RemoteLayout:
    """How one kind of checkpoint becomes a checkpoint of a class in transformers.

    Attributes:
        model_types: ``model_type`` in its ``config.json``.
        host: model type of the class in transformers.
        architecture: that class.
        config: its raw ``config.json`` -> fields of the host's config, beside those that mean the same everywhere.
        family: its raw ``config.json`` -> where it keeps its heads; None where the attention's tensors fit as they are.
        outer: tensors outside the layers, its name to the host's, without ``.weight`` and ``.bias``.
        inner: the same below a layer, without the attention's.
        layer: prefix of layer ``{i}``.
        host_layer: the same in the host.
        unit_head: whether rows of the output head are scaled to length one before they are used.
        refusal: why this checkpoint has no class in transformers, with the remedy, or None.
        note: in what the result differs from the remote code, or None.
        buffers: regular expression of tensors that are not needed.
    """

    model_types: tuple[str, ...]
    host: str
    architecture: str
    config: Callable[[Raw], dict[str, Any]]
    outer: dict[str, str]
    inner: dict[str, str]
    layer: str
    host_layer: str = "model.layers.{i}."
    family: Callable[[Raw], Family] | None = None
    unit_head: Callable[[Raw], bool] = _never
    refusal: Callable[[Raw], str | None] = _nothing
    note: Callable[[Raw], str | None] = _nothing
    buffers: str = r"rotary_emb\.inv_freq$|rotary_pos_emb\.inv_freq$"


def _rope(raw: Raw) -> dict[str, Any]:
    """RoPE over the whole head from ``rope_theta`` and ``rope_scaling``, with the types that Llama has too."""
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    return {"rope_parameters": {"rope_type": kind, "rope_theta": float(raw.get("rope_theta", 10000.0)), **scaling}}


# ---- ChatGLM2, ChatGLM3, and GLM-4's first release.


def _glm_config(raw: Raw) -> dict[str, Any]:
    heads = raw["num_attention_heads"]
    size = raw.get("kv_channels") or raw["hidden_size"] // heads
    return {
        "vocab_size": raw["padded_vocab_size"],
        "intermediate_size": raw["ffn_hidden_size"],
        "num_hidden_layers": raw["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw["multi_query_group_num"] if raw.get("multi_query_attention") else heads,
        "head_dim": size,
        "hidden_act": "silu",
        "max_position_embeddings": raw["seq_length"],
        "rms_norm_eps": raw["layernorm_epsilon"],
        "attention_bias": bool(raw.get("add_qkv_bias", False)),
        "attention_dropout": raw.get("attention_dropout", 0.0),
        **rope_fields({"rope_theta": 10000.0 * raw.get("rope_ratio", 1)}, size // 2, size),
    }


def _glm_family(raw: Raw) -> Family:
    # Without shared KV heads each head's query, key and value follow one another.
    packing = "blocks" if raw.get("multi_query_attention") else "groups"
    return Family("chatglm", attention="self_attention.", packing=packing, names=_FUSED_DENSE)  # type: ignore[arg-type]


def _glm_refusal(raw: Raw) -> str | None:
    if "inner_hidden_size" in raw or raw.get("position_encoding_2d"):
        return (
            "the first ChatGLM counts positions in two dimensions and reads its prompt in both directions, which no "
            "class of transformers does; give ChatGLM2 or later"
        )
    if "vision_config" in raw:
        return "reads images; give the text-only GLM"
    wanted = {
        "apply_residual_connection_post_layernorm": (False, "residual connections start behind the norms"),
        "rmsnorm": (True, "norms are LayerNorms"),
        "post_layer_norm": (True, "there is no final norm"),
        "add_bias_linear": (False, "every product has a bias"),
        "original_rope": (True, "rotary pairs span the half of a head"),
    }
    for key, (value, meaning) in wanted.items():
        if raw.get(key, value) != value:
            return f"{key} is {raw[key]}: {meaning}, which glm in transformers lacks; give a model without it"
    if raw.get("pre_seq_len"):
        return "has a trained prefix before every layer's keys (pre_seq_len), which glm lacks; give the model alone"
    if raw.get("quantization_bit"):
        return "is quantised (quantization_bit); convert the unquantised original"
    if raw.get("rope_ratio", 1) != 1 and "chatglm2" in str(raw.get("_name_or_path", "")).lower():
        return (
            "ChatGLM2-32k divides positions by rope_ratio, where ChatGLM3 and GLM-4 multiply RoPE's base; "
            "give ChatGLM3 or GLM-4"
        )
    return None


def _glm_note(raw: Raw) -> str | None:
    ratio = raw.get("rope_ratio", 1)
    return None if ratio == 1 else f"rope_ratio {ratio} multiplies RoPE's base, as in ChatGLM3 and GLM-4"


_FUSED_DENSE = Names(query="query_key_value", output="dense")
_CHATGLM = RemoteLayout(
    ("chatglm",),
    "glm",
    "GlmForCausalLM",
    _glm_config,
    family=_glm_family,
    layer="transformer.encoder.layers.{i}.",
    outer={
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
    },
    inner={
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    refusal=_glm_refusal,
    note=_glm_note,
)

# ---- Llama under other names.

_LLAMA_OUTER = {"model.embed_tokens": "model.embed_tokens", "model.norm": "model.norm", "lm_head": "lm_head"}
_LLAMA_INNER = {
    name: name
    for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
}


def _llama_config(raw: Raw) -> dict[str, Any]:
    return {
        "intermediate_size": raw["intermediate_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "hidden_act": raw.get("hidden_act", "silu"),
        "max_position_embeddings": raw["max_position_embeddings"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "attention_bias": bool(raw.get("bias", False)),
        **_rope(raw),
    }


def _rope_refusal(raw: Raw) -> str | None:
    kind = _rope(raw)["rope_parameters"]["rope_type"]
    if kind in ("default", "linear", "dynamic"):
        return None
    return f"its rope_scaling is of type {str(kind)[:40]!r}, which this layout does not name; fix config.json"


def _internlm_config(raw: Raw) -> dict[str, Any]:
    rotary = raw.get("rotary") or {}
    scaling = {"type": "dynamic", "factor": 1.0} if rotary.get("type") == "dynamic" else None
    return _llama_config(
        {"bias": True, **raw, "rope_theta": float(rotary.get("base", 10000.0)), "rope_scaling": scaling}
    )


def _alibi(raw: Raw) -> str | None:
    if "max_position_embeddings" in raw:
        return None
    return (
        "the 13B models (those without max_position_embeddings) have ALiBi, and no class of transformers with "
        "RMSNorm and a gated FFN has; give Baichuan-7B or Baichuan2-7B"
    )


def _second_baichuan(raw: Raw) -> bool:
    """Baichuan 2 writes its class's name otherwise than the first; without one, its vocabulary tells."""
    names = raw.get("architectures") or []
    return "BaichuanForCausalLM" in names if names else raw.get("vocab_size") == 125696


_BAICHUAN = RemoteLayout(
    ("baichuan",),
    "llama",
    "LlamaForCausalLM",
    _llama_config,
    family=lambda raw: Family("baichuan", packing="blocks", names=Names(query="W_pack")),
    layer="model.layers.{i}.",
    outer=_LLAMA_OUTER,
    inner=_LLAMA_INNER,
    unit_head=_second_baichuan,
    refusal=_alibi,
    note=lambda raw: "the head's rows are stored at length one" if _second_baichuan(raw) else None,
)
_INTERNLM = RemoteLayout(
    ("internlm",),
    "llama",
    "LlamaForCausalLM",
    _internlm_config,
    layer="model.layers.{i}.",
    outer=_LLAMA_OUTER,
    inner={
        **_LLAMA_INNER,
        **{name: name for name in (f"self_attn.{part}_proj" for part in ("q", "k", "v", "o"))},
    },
)
_INTERNLM2 = RemoteLayout(
    ("internlm2",),
    "llama",
    "LlamaForCausalLM",
    _llama_config,
    family=lambda raw: Family(
        "internlm2", attention="attention.", packing="groups", names=Names(query="wqkv", output="wo")
    ),
    layer="model.layers.{i}.",
    outer={"model.tok_embeddings": "model.embed_tokens", "model.norm": "model.norm", "output": "lm_head"},
    inner={
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    },
    refusal=_rope_refusal,
)

# ---- The first Qwen.


def _qwen_config(raw: Raw) -> dict[str, Any]:
    return {
        "intermediate_size": raw["intermediate_size"] // 2,  # it counts gate and up together
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_key_value_heads": raw["num_attention_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": raw["seq_length"],
        "rms_norm_eps": raw["layer_norm_epsilon"],
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", 10000.0))},
    }


def _qwen_refusal(raw: Raw) -> str | None:
    if not raw.get("no_bias", True):
        return "every product has a bias (no_bias is false), which qwen2 lacks; give a model without"
    if raw.get("rotary_pct", 1.0) != 1.0:
        return f"rotary_pct is {raw['rotary_pct']}: a part of each head turns, where qwen2 turns all; give another"
    size = raw.get("kv_channels")
    if size and size * raw["num_attention_heads"] != raw["hidden_size"]:
        return f"its heads of {size} do not make up its hidden size, as qwen2's do; give another"
    return None


def _qwen_note(raw: Raw) -> str | None:
    switches = [key for key in ("use_dynamic_ntk", "use_logn_attn") if raw.get(key)]
    if not switches:
        return None
    return (
        f"beyond {raw['seq_length']} positions the remote code rescales ({', '.join(switches)}), which qwen2 does not; "
        "up to there both compute the same"
    )


_QWEN = RemoteLayout(
    ("qwen",),
    "qwen2",
    "Qwen2ForCausalLM",
    _qwen_config,
    family=lambda raw: Family("qwen", attention="attn.", packing="blocks", names=Names("c_attn", output="c_proj")),
    layer="transformer.h.{i}.",
    outer={"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"},
    inner={
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "mlp.w2": "mlp.gate_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    refusal=_qwen_refusal,
    note=_qwen_note,
    buffers=r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|logn_tensor$",
)

# ---- The first Phi.


def _phi_config(raw: Raw) -> dict[str, Any]:
    hidden, heads = raw["n_embd"], raw["n_head"]
    size = hidden // heads
    return {
        "hidden_size": hidden,
        "intermediate_size": raw.get("n_inner") or 4 * hidden,
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_head_kv") or heads,
        "hidden_act": raw.get("activation_function", "gelu_new"),
        "max_position_embeddings": raw["n_positions"],
        "layer_norm_eps": raw["layer_norm_epsilon"],
        "resid_pdrop": raw.get("resid_pdrop", 0.0),
        "embd_pdrop": raw.get("embd_pdrop", 0.0),
        "attention_dropout": raw.get("attn_pdrop", 0.0),
        "qk_layernorm": False,
        **rope_fields({"rope_theta": 10000.0}, raw["rotary_dim"], size),
    }


_PHI = RemoteLayout(
    ("phi-msft",),
    "phi",
    "PhiForCausalLM",
    _phi_config,
    family=lambda raw: Family("phi-msft", attention="mixer.", packing="blocks", names=Names("Wqkv", output="out_proj")),
    layer="transformer.h.{i}.",
    outer={
        "transformer.embd.wte": "model.embed_tokens",
        "lm_head.ln": "model.final_layernorm",
        "lm_head.linear": "lm_head",
    },
    inner={"ln": "input_layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
)

# ---- Falcon under its first name.


def _falcon_config(raw: Raw) -> dict[str, Any]:
    new = "n_head_kv" in raw
    keys = ("alibi", "bias", "multi_query", "parallel_attn", "hidden_dropout", "attention_dropout")
    return {
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": raw["n_head"],
        "layer_norm_epsilon": raw["layer_norm_epsilon"],
        "new_decoder_architecture": new,
        **({"num_kv_heads": raw["n_head_kv"]} if new else {}),
        **{key: raw[key] for key in keys if key in raw},
    }


def _falcon_refusal(raw: Raw) -> str | None:
    if raw.get("apply_residual_connection_post_layernorm"):
        return "its residual connections start behind the norms, which falcon in transformers lacks; give another"
    return None


_SAME = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FALCON = RemoteLayout(
    ("RefinedWeb", "RefinedWebModel"),
    "falcon",
    "FalconForCausalLM",
    _falcon_config,
    layer="transformer.h.{i}.",
    host_layer="transformer.h.{i}.",
    outer={name: name for name in ("transformer.word_embeddings", "transformer.ln_f", "lm_head")},
    inner={name: name for name in (*_SAME, "input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")},
    refusal=_falcon_refusal,
)

REMOTE: dict[str, RemoteLayout] = {
    model_type: layout
    for layout in (_CHATGLM, _BAICHUAN, _INTERNLM, _INTERNLM2, _QWEN, _PHI, _FALCON)
    for model_type in layout.model_types
}
