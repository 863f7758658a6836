"""Classes like Llama's whose config gives single layers a window: every tensor is copied.

``granite_swa`` also has a sink logit for each head, which ``-1e4`` switches off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rehead.models.cache_layouts import layer_window
from rehead.models.rewrite import Builder, Rewrite
from rehead.variants.window.classes import OFF

if TYPE_CHECKING:
    from torch import Tensor

#: Host -> (its class, projections that always have a bias, whether its config switches biases of attention and FFN).
_HOSTS: dict[str, tuple[str, tuple[str, ...], bool, bool]] = {
    "ministral": ("MinistralForCausalLM", (), False, False),
    "qwen2": ("Qwen2ForCausalLM", ("q_proj", "k_proj", "v_proj"), False, False),
    "cwm": ("CwmForCausalLM", (), False, True),
    "smollm3": ("SmolLM3ForCausalLM", (), True, True),
    "granite_swa": ("GraniteSWAForCausalLM", (), True, True),
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def host(build: Builder) -> Rewrite:
    """A Llama, Mistral, Ministral or Qwen2 model under a class with a window for each layer.

    Raises:
        UnsupportedError: biases that the host has no place for, or several windows.
    """
    config, kind = build.config, build.target.model_type
    architecture, always, switches, ffn_switches = _HOSTS[kind]
    count = int(config.num_hidden_layers)
    prefix = build.source.prefix(0)
    biased = {name for name in _PROJECTIONS if build.has(f"{prefix}{name}.bias")}
    if biased and not switches and biased - set(always):
        raise build.refuse(f"{kind} has no bias on {', '.join(sorted(biased - set(always)))}; use --host granite_swa")
    ffn_biased = build.has(build.source.layer.format(i=0) + "mlp.down_proj.bias")
    if ffn_biased and not ffn_switches:
        raise build.refuse(f"{kind} has no bias in its FFN; use --host granite_swa")
    size = build.source.head_dim(config)
    windows = [layer_window(config, layer) for layer in range(count)]
    if len(sizes := {window for window in windows if window is not None}) > 1:
        raise build.refuse(f"its layers have {len(sizes)} windows and {kind}'s one")
    result = build.base_config(architecture) | {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": count,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": size,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "attention_dropout": config.attention_dropout,
        "rope_parameters": dict(config.rope_parameters),
        "sliding_window": sizes.pop() if sizes else None,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
    if kind in ("qwen2", "smollm3"):
        result["use_sliding_window"] = any(window is not None for window in windows)
    elif result["sliding_window"] is None:  # these classes make the mask of a window whether a layer has one or not
        result["sliding_window"] = int(config.max_position_embeddings)
    if kind == "smollm3":
        result["no_rope_layers"] = [1] * count
    if kind == "granite_swa":
        result |= {
            "attention_multiplier": size**-0.5, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
            "logits_scaling": 1.0, "layer_rope_theta": [config.rope_parameters["rope_theta"]] * count,
        }  # fmt: skip
    wanted = {*always, *(_PROJECTIONS if biased and switches else ())}
    if switches:
        result["attention_bias"] = bool(biased)
    if ffn_switches:
        result["mlp_bias"] = ffn_biased
    # A base model saved alone keeps its names: the classes are laid out alike.
    for name in build.infos:
        if not name.endswith("rotary_emb.inv_freq"):
            build.copy(name, name)
    heads = int(config.num_attention_heads)
    for layer in range(count):
        stem = build.source.prefix(layer)
        for projection in sorted(wanted - biased):
            build.make(f"{stem}{projection}.bias", (f"{stem}{projection}.weight",), _no_bias)
        if kind == "granite_swa":
            build.make(f"{stem}sinks", (f"{stem}q_proj.weight",), lambda weight: weight.new_full((heads,), OFF))
    return build.finish(result, None, r"rotary_emb\.inv_freq$")


def _no_bias(weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0])
