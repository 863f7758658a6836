"""Tiny random models of any causal type that transformers knows, for coverage and tests."""

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
from rehead.models.tiny import LAYERS, LISTS, SIZES, randomize

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
