"""Find the attention modules of a live model, and how each of them can be patched."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_ATTENTION = re.compile(r"Attention|Attn")
_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|attention_interface\(")
_READS_MASK = re.compile(r"attention_mask\.dtype|isinstance\(attention_mask, torch\.Tensor\)")
_SOFTMAX = re.compile(r"softmax\(|Softmax\(|scaled_dot_product_attention\(")


@functools.cache
def _source(cls: type) -> str:
    """Source code of a class and of its bases, up to ``nn.Module``."""
    parts = []
    for base in cls.__mro__:
        if base is nn.Module or base is object:
            break
        try:
            parts.append(inspect.getsource(base))
        except (OSError, TypeError):
            continue
    return "\n".join(parts)


@functools.cache
def uses_interface(cls: type) -> bool:
    """Whether the class takes its attention function from transformers' ``AttentionInterface``."""
    return bool(_INTERFACE.search(_source(cls)))


@functools.cache
def is_softmax_attention(cls: type) -> bool:
    """Whether the class looks like attention over tokens that computes its own softmax.

    Attention over something else (the outputs of earlier blocks, say) takes no mask and is not patched.
    """
    source = _source(cls)
    return bool(_ATTENTION.search(cls.__name__)) and bool(_SOFTMAX.search(source)) and "mask" in source


class MaskStyle(enum.Enum):
    """What a model does with its mask before it reaches attention."""

    PASSED = "passed on untouched"
    READ = "computed with by its attention layers (learned sparse attention)"
    TAKEN_APART = "rebuilt by the model where it has four dimensions"


@functools.cache
def mask_style(config_class: type) -> MaskStyle:
    """How the models of a config class treat their mask, from the source of the modeling file beside the config's."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    module = sys.modules.get(name)
    if module is None or name == config_class.__module__:
        return MaskStyle.PASSED
    if config_class.__name__ == "FalconConfig":
        return MaskStyle.TAKEN_APART
    members: dict[str, Any] = vars(module)
    for attribute, cls in members.items():
        own = isinstance(cls, type) and cls.__module__ == name and _ATTENTION.search(attribute)
        if own and uses_interface(cls) and _READS_MASK.search(_source(cls)):
            return MaskStyle.READ
    return MaskStyle.PASSED


@dataclass
class AttentionModules:
    """A model's attention modules by how they can be patched.

    Attributes:
        interface: (name, module) of those that use transformers' ``AttentionInterface``.
        own: (name, module) of those that compute attention themselves, which need an adapter.
        towers: names of those outside the decoder (vision, audio), which are left alone.
    """

    interface: list[tuple[str, nn.Module]] = field(default_factory=list)
    own: list[tuple[str, nn.Module]] = field(default_factory=list)
    towers: list[str] = field(default_factory=list)


def text_configs(model: nn.Module) -> set[int]:
    """Ids of the configs that belong to the causal decoder, for a model that also has vision or audio towers."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return set()
    text = config.get_text_config(decoder=True)
    return {id(text), id(config)}


def find_attention(model: nn.Module) -> AttentionModules:
    """The attention modules of ``model``, sorted by how they can be patched."""
    modules = AttentionModules()
    wanted = text_configs(model)
    for name, module in model.named_modules():
        cls = type(module)
        if isinstance(module, PreTrainedModel) or cls.__module__.startswith("torch.") or not _has_state(module):
            continue
        interface = uses_interface(cls)  # type: ignore[arg-type]
        if not interface and not is_softmax_attention(cls):  # type: ignore[arg-type]
            continue
        config = _nearest_config(model, name)
        if wanted and config is not None and id(config) not in wanted and not _same_kind(model, config):
            modules.towers.append(name)
        elif interface:
            modules.interface.append((name, module))
        else:
            modules.own.append((name, module))
    return modules


def _has_state(module: nn.Module) -> bool:
    """Whether a module has weights.

    Quantised linear layers have them outside ``parameters()``, and parts of a fused block use those of the block.
    """
    own = next(module.parameters(recurse=True), None) is not None or bool(module.state_dict())
    return own or any(getattr(part, "elsewhere", False) for part in module.modules())


def _nearest_config(model: nn.Module, name: str) -> Any:
    """The config of a module, or of the nearest enclosing module that has one."""
    while name:
        config = model.get_submodule(name).__dict__.get("config")
        if config is not None:
            return config
        name = name.rpartition(".")[0]
    return model.__dict__.get("config")


def _same_kind(model: nn.Module, config: Any) -> bool:
    """Whether a config is of the decoder's class; a decoder's layers may have copies of its config."""
    text = getattr(model, "config", None)
    return type(config) is type(text.get_text_config(decoder=True)) if text is not None else False
