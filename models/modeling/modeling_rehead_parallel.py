"""Decoders whose blocks run attention and FFN in parallel: ``z = x + Attn(N1 x) + MLP(N2 x)``.

The file travels beside a checkpoint, with ``modeling_rehead_core.py``. Every class is its serial counterpart in
transformers with the same parameters under the same names; only the decoder layers listed in ``config.parallel_layers``
(all of them, if it is None) read the block's input in both halves. The form is that of GPT-J and PaLM
(arXiv 2204.02311), with the norms of the serial model kept apart.

``ParallelLlamaConfig``, ``ParallelLlamaModel``, ``ParallelLlamaForCausalLM`` and so on for every name in ``FAMILIES``
are made from the installed transformers on first use.
"""

import functools
import importlib
from typing import Any

import torch
import transformers
from torch import nn

from .modeling_rehead_core import DerivedClasses, named

FAMILIES = {
    "arcee": "Arcee",
    "ernie4_5": "Ernie4_5",
    "gemma": "Gemma",
    "glm": "Glm",
    "granite": "Granite",
    "helium": "Helium",
    "llama": "Llama",
    "ministral": "Ministral",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "nemotron": "Nemotron",
    "olmo": "Olmo",
    "olmoe": "Olmoe",
    "persimmon": "Persimmon",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "starcoder2": "Starcoder2",
}
"""Serial model type -> prefix of its classes. All keep the block in ``input_layernorm``, ``self_attn``,
``post_attention_layernorm`` and ``mlp``."""

TYPE_PREFIX = "rehead_parallel_"
"""Put before the serial model type. The type differs, so that no auto class takes the weights for a serial model's; a
serial class that is called by its name warns of the type and computes the serial function."""

_NO_DROPOUT = nn.Identity()


class ParallelBlock(nn.Module):
    """Mixed into a decoder layer: the parallel form of its forward pass."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``x + Attn(N1 x) + MLP(N2 x)``, as shape ``[B, S, hidden_size]``; ``kwargs`` are for attention."""
        scale = getattr(self, "residual_multiplier", 1.0)
        attention = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        attention = getattr(self, "resid_attn_dropout", _NO_DROPOUT)(attention)
        ffn = self.mlp(self.post_attention_layernorm(hidden_states))
        ffn = getattr(self, "resid_mlp_dropout", getattr(self, "dropout", _NO_DROPOUT))(ffn)
        if scale != 1.0:
            attention, ffn = attention * scale, ffn * scale
        return hidden_states + attention + ffn


def parallel_layers(config: Any) -> list[int]:
    """The layers of ``config`` that are parallel, in order.

    Raises:
        ValueError: ``config.parallel_layers`` names a layer that the model does not have.
    """
    count = config.num_hidden_layers
    if config.parallel_layers is None:
        return list(range(count))
    wrong = [layer for layer in config.parallel_layers if not isinstance(layer, int) or not 0 <= layer < count]
    if wrong:
        raise ValueError(f"config.parallel_layers has {wrong[0]!r}, but the layers are 0 to {count - 1}")
    return sorted(set(config.parallel_layers))


@functools.cache
def _parallel_layer_class(serial: Any) -> type:
    return type(f"Parallel{serial.__name__}", (ParallelBlock, serial), {"__module__": __name__})


def _make_parallel(model: nn.Module, layers: nn.ModuleList) -> None:
    """Give the layers in ``config.parallel_layers`` their parallel class; parameters, buffers and hooks stay."""
    for index in parallel_layers(model.config):
        serial: Any = type(layers[index])
        layers[index].__class__ = _parallel_layer_class(serial)
    # Placement over devices goes by class names, and must not split these layers either.
    names = {type(layer).__name__ for layer in layers}
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module._no_split_modules = {*(module._no_split_modules or ()), *names}


class ParallelModel:
    """Mixed into a model: the parallel form of the layers that its config names."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        _make_parallel(self, self.base_model.layers)  # type: ignore[arg-type, attr-defined]


def _derived(model_type: str, prefix: str) -> DerivedClasses:
    def share_weight_conversion() -> None:
        """Load mixtures of experts as the serial type does: one tensor per expert in the file, stacked in the model."""
        from transformers import conversion_mapping

        parallel = TYPE_PREFIX + model_type
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
        if mapping is not None and conversion_mapping.get_checkpoint_conversion_mapping(parallel) is None:
            conversion_mapping.register_checkpoint_conversion_mapping(parallel, mapping)

    def models(suffix: str) -> tuple[str, Any]:
        return f"Parallel{prefix}{suffix}", lambda: (ParallelModel, getattr(transformers, prefix + suffix))

    return DerivedClasses(
        module=__name__,
        model_type=TYPE_PREFIX + model_type,
        config=f"Parallel{prefix}Config",
        base=lambda: getattr(transformers, f"{prefix}Config"),
        fields={"parallel_layers": list[int] | None},
        check=parallel_layers,
        models={"AutoModel": models("Model"), "AutoModelForCausalLM": models("ForCausalLM")},
        also=share_weight_conversion,
    )


DERIVED = [_derived(model_type, prefix) for model_type, prefix in FAMILIES.items()]


def __getattr__(name: str) -> Any:
    """A config or model class, made when it is first used; a layer's, by which a pickled model finds it."""
    for model_type, prefix in FAMILIES.items():
        if name == f"Parallel{prefix}DecoderLayer":
            serial = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
            return _parallel_layer_class(getattr(serial, f"{prefix}DecoderLayer"))
    return named(DERIVED, name)


def register() -> None:
    """Register every config with ``AutoConfig``; models are registered when one of their configs is created."""
    for model_type, derived in zip(FAMILIES, DERIVED):
        if model_type in transformers.CONFIG_MAPPING:
            derived.register()
