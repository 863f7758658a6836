"""Install the tiled attention in every attention layer of a live model, shared by all variants that use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from rehead.attention import adapters
from rehead.attention.cpu.lanes import DTYPES
from rehead.attention.discover import AttentionModules, find_attention
from rehead.attention.interface import NAME, register
from rehead.attention.kernels.bounds import MAX_HEAD_DIM
from rehead.attention.layer import LAYER, AttentionLayer
from rehead.errors import UnsupportedError, UsageError
from rehead.models.live import enclosing_layer
from rehead.models.modeling.modeling_rehead_cache import passed_cache
from rehead.models.stale import refuse_stale_call
from rehead.models.undo import Undoing, UndoLog, own_configs

INSTALLED = "_rehead_attention"
"""Attribute of a model that holds its :class:`Installation`."""


class Installation(Undoing):
    """The tiled attention in one model: installed for its first user, removed after the last.

    Args:
        model: a live model; nothing is changed before :meth:`enter`.

    Raises:
        UsageError: the config asks for attention weights.
        UnsupportedError: a layer computes attention itself in an unknown way, or :func:`check_model` refuses the model.
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        attention = find_attention(model)
        _refuse_unknown(model, attention)
        for name, module in attention.interface + attention.own:
            if LAYER in module.__dict__:
                raise UsageError(f"a patch is already applied to {name}; call its revert() first")
        self.model = model
        self.towers = attention.towers
        self.layers: list[AttentionLayer] = []
        for how, modules in (("interface", attention.interface), ("adapter", attention.own)):
            for name, module in modules:
                place = enclosing_layer(model, name)
                was = _implementation(module, model)
                self.layers.append(AttentionLayer(name, place and place[1], type(module).__name__, was, how))
        self._attention = attention
        self._undo = UndoLog()
        self._users = 0

    @property
    def by_name(self) -> bool:
        """Whether the model was loaded with ``attn_implementation="rehead_tiled"``, so that it had it before."""
        return any(layer.how == "interface" and layer.was == NAME for layer in self.layers)

    def enter(self) -> None:
        """Add a user; the first one installs the attention."""
        if not self._users:
            self._install()
        self._users += 1

    def leave(self) -> None:
        """Remove a user; after the last one the model's own attention is restored."""
        self._users -= 1
        if not self._users:
            self._undo.run()

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Use the model's own attention inside the block, without any variants."""
        self._undo.run()
        try:
            yield
        finally:
            self._install()

    def _install(self) -> None:
        register()
        undo = self._undo
        modules = [module for _, module in self._attention.interface + self._attention.own]
        try:
            copies = own_configs(self.model, undo)
            for layer, module in zip(self.layers, modules, strict=True):
                undo.set_attribute(module, LAYER, layer)
                if adapters.adapter_for(module) is not None:
                    adapters.adapt(module, undo)
            self._set_implementation(modules, copies)
            undo.add(self.model.register_forward_pre_hook(_refuse_arguments, with_kwargs=True).remove)
            undo.set_attribute(self.model, INSTALLED, self)
        except BaseException:
            undo.run()
            raise

    def _set_implementation(self, modules: list[nn.Module], copies: dict[int, Any]) -> None:
        """Point the (copied) configs of the layers, and of the models that make their masks, at the tiled attention."""
        targets: dict[int, Any] = {}
        for module in modules:
            config = module.__dict__.get("config")
            if config is not None:
                targets[id(config)] = config
        for config in copies.values():
            if not targets or config is getattr(self.model, "config", None):
                text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
                targets[id(text)] = text
        for module in self.model.modules():
            # Modules between the layers and the top that hold a config of their own build the mask from it.
            config = module.__dict__.get("config")
            if config is not None and any(type(config) is type(target) for target in list(targets.values())):
                targets[id(config)] = config
        for config in targets.values():
            # The public setter would also set the name in sub-configs, and so in towers that must stay unchanged.
            config._attn_implementation_internal = NAME


def installation(model: nn.Module) -> Installation | None:
    """The tiled attention of a model, if it is installed."""
    return model.__dict__.get(INSTALLED)


def _implementation(module: nn.Module, model: nn.Module) -> str:
    config = module.__dict__.get("config") or getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", None) or "eager")


def _refuse_unknown(model: nn.Module, attention: AttentionModules) -> None:
    missing = [(name, module) for name, module in attention.own if adapters.adapter_for(module) is None]
    if missing:
        classes = sorted({type(module).__name__ for _, module in missing})
        raise UnsupportedError(
            f"{type(model).__name__} computes attention itself in {', '.join(classes)}, for which there is no adapter; "
            "see `rehead patches` for what can be patched"
        )
    if not attention.interface and not attention.own:
        raise UnsupportedError(f"{type(model).__name__} has no softmax attention layer to patch; see `rehead patches`")


def check_model(model: nn.Module) -> None:
    """Refuse a model that the tiled attention cannot run on; changes nothing.

    Raises:
        UsageError: the config asks for attention weights.
        UnsupportedError: meta device, tensor parallelism, or an unsupported dtype or head_dim.
    """
    floating: set[torch.dtype] = set()
    offloaded = _offloaded(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and id(parameter) not in offloaded:
            raise UnsupportedError(f"{name} is on the meta device and has no values; load the weights before patching")
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise UnsupportedError(
                f"{name} is split over devices; load the model without tp_plan, or patch it before fully_shard"
            )
        if parameter.is_floating_point():
            floating.add(parameter.dtype)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedError("the model is split over GPUs by tensor parallelism; load it without tp_plan")
    usable = [dtype for dtype in floating if dtype in DTYPES]
    if floating and not usable:
        raise UnsupportedError(
            f"the model's parameters are {', '.join(sorted(str(d) for d in floating))}; "
            "cast it to float32, bfloat16 or float16"
        )
    config = getattr(model, "config", None)
    if getattr(config, "output_attentions", False):
        raise UsageError(
            "config.output_attentions=True asks for attention weights, which tiled attention never forms; "
            "set it to False before patching"
        )
    for name, module in model.named_modules():
        dim = module.__dict__.get("head_dim")
        on_gpu = dim is not None and any(p.is_cuda for p in module.parameters(recurse=True))
        if on_gpu and isinstance(dim, int) and dim > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"{name} has head_dim {dim}, over the {MAX_HEAD_DIM} that the GPU kernels take; "
                "leave it on attn_implementation='sdpa'"
            )


def _offloaded(model: nn.Module) -> set[int]:
    """Ids of the parameters that accelerate keeps elsewhere and brings in as their module runs (``device_map``)."""
    return {
        id(parameter)
        for module in model.modules()
        if getattr(module.__dict__.get("_hf_hook"), "offload", False)
        for parameter in module.parameters(recurse=False)
    }


def _cache_layers(cache: Any) -> list[Any]:
    """Layers of a cache, those of both halves of an encoder-decoder cache included."""
    halves = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    return [layer for part in (cache, *halves) for layer in getattr(part, "layers", None) or ()]


def _is_quantised(layer: Any) -> bool:
    """Whether a cache layer stores keys and values in a quantised form; its base class has another name by version."""
    return any("Quantized" in cls.__name__ for cls in type(layer).__mro__)


def _refuse_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: what a call asks for that no tiled attention can give."""
    if kwargs.get("output_attentions"):
        raise UsageError(
            "output_attentions=True asks for attention weights, which tiled attention never forms; "
            "revert the patch for that run, or leave output_attentions out"
        )
    cache = passed_cache(kwargs)
    if isinstance(cache, Cache) and any(_is_quantised(layer) for layer in _cache_layers(cache)):
        raise UnsupportedError(
            "the KV cache is quantised, which rehead_tiled does not read; use a DynamicCache or a StaticCache "
            "(leave cache_implementation='quantized' out)"
        )
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    config: Any = getattr(module, "config", None)
    if config is not None:
        refuse_stale_call(config.get_text_config(decoder=True), kwargs, tokens)
